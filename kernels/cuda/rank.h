// Rankings by counting: quadratic, but with no sort, no recursion and no order of threads in it.
#pragma once

#include "cuda/kernel.h"

namespace thresher {

// Which item and which of its elements a thread of a block of BLOCK threads is there for.
struct Mine {
  __device__ explicit Mine(int count)
      : item(blockIdx.x / ((count + BLOCK - 1) / BLOCK)),
        index(static_cast<int>(blockIdx.x % ((count + BLOCK - 1) / BLOCK)) * BLOCK +
              static_cast<int>(threadIdx.x)) {}
  int64_t item;
  int index;
};

// rank[i] = how many come before i: those with a larger key, of equal ones those with a lower index.
// `keys(item, i)` is an integer.
template <class Keys>
__global__ void rank_by_counting(Keys keys, int count, int* rank) {
  __shared__ uint32_t tile[BLOCK];
  const Mine mine(count);
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t own = mine.index < count ? keys(mine.item, mine.index) : 0;
  int before = 0;
  for (int start = 0; start < count; start += BLOCK) {
    __syncthreads();  // the last tile has been read
    if (start + lane < count) tile[lane] = keys(mine.item, start + lane);
    __syncthreads();
    const int filled = min(BLOCK, count - start);
    for (int k = 0; k < filled; ++k)
      before += tile[k] > own || (tile[k] == own && start + k < mine.index);
  }
  if (mine.index < count) rank[mine.item * count + mine.index] = before;
}

// Tokens by score, the prefix first, padding (size 0; size may be null) last.
struct ByScore {
  const float* score;
  const float* size;
  int tokens, protect;

  __device__ uint32_t operator()(int64_t item, int token) const {
    if (token < protect) return FIRST_KEY;
    const int64_t at = item * tokens + token;
    return order_key(size && size[at] == 0 ? -3.402823466e38f : score[at]);
  }
};

// Where ranked tokens go: the first `keep` stay and leave in index order, the next are listed by rank,
// the rest goes.
struct Placement {
  const int* rank;
  int tokens, keep, most;
  const int* join;  // how many are listed; null for `most`
  int* origin;      // [B, K], the token of each outgoing row
  int* joining;     // [B, most]
  int64_t* slot;    // [B, N] or null; -1 for all that do not stay
};

[[maybe_unused]] static __global__ void place(Placement by) {
  __shared__ int tile[BLOCK];
  const Mine mine(by.tokens);
  const int lane = static_cast<int>(threadIdx.x);
  const int* rank = by.rank + mine.item * by.tokens;
  int before = 0;
  for (int start = 0; start < by.tokens; start += BLOCK) {
    __syncthreads();  // the last tile has been read
    if (start + lane < by.tokens) tile[lane] = rank[start + lane];
    __syncthreads();
    const int filled = min(BLOCK, min(by.tokens, mine.index) - start);
    for (int k = 0; k < filled; ++k) before += tile[k] < by.keep;
  }
  if (mine.index >= by.tokens) return;
  const int own = rank[mine.index];
  if (own < by.keep)
    by.origin[mine.item * by.keep + before] = mine.index;
  else if (own - by.keep < (by.join ? *by.join : by.most))
    by.joining[mine.item * by.most + own - by.keep] = mine.index;
  if (by.slot) by.slot[mine.item * by.tokens + mine.index] = own < by.keep ? before : -1;
}

}  // namespace thresher
