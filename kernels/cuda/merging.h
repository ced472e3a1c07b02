// Tokens that join others: lists of who joins whom, and the rows that become of it.
#pragma once

#include "cuda/nearest.h"
#include "cuda/rank.h"

namespace thresher {

// Sources may join a target each.  Operators add what is a source and what a target, as `nearest` has it.
struct Groups {
  int tokens, keep, sources;
  const float* size;
  const Found* best;  // [B, sources], the most similar target of each
  int* origin;        // [B, K], the token of each outgoing row
  int* head;          // [B, N], the first source that joins a token, or -1
  int* next;          // [B, sources], the next one that joins the same token, or -1
  int64_t* slot;      // [B, N] or null

  __host__ __device__ int merging() const { return tokens - keep; }
};

// Sources that merge most gladly first, padding (size 0) before all others.
template <class Pairs>
struct BySimilarity {
  Pairs of;

  __device__ uint32_t operator()(int64_t item, int index) const {
    const bool padding = of.size[item * of.tokens + of.source(item, index)] == 0;
    return order_key(padding ? PADDING : number_of(of.best[item * of.sources + index]));
  }
};

// One thread for each source: its neighbours in the list of its target.  `of.joins(item, i)` tells whether
// source i joins at all, of the first `of.wanted()`; `of.leave(item, i)` is told of those that do.
template <class Pairs>
__global__ void link(Pairs of) {
  __shared__ int joined[BLOCK];
  const Mine mine(of.sources);
  const int wanted = of.wanted(), lane = static_cast<int>(threadIdx.x);
  const auto target_of = [&](int i) {
    if (i >= wanted || !of.joins(mine.item, i)) return -1;
    return index_of(of.best[mine.item * of.sources + i]);
  };
  const int target = target_of(mine.index);
  bool first = true;
  int next = -1;
  for (int start = 0; start < wanted; start += BLOCK) {
    __syncthreads();  // the last tile has been read
    joined[lane] = target_of(start + lane);
    __syncthreads();
    for (int k = 0; k < BLOCK; ++k) {
      if (joined[k] != target) continue;
      if (start + k < mine.index) first = false;
      if (start + k > mine.index && next < 0) next = start + k;
    }
  }
  if (target < 0) return;
  of.next[mine.item * of.sources + mine.index] = next;
  if (first) of.head[mine.item * of.tokens + of.target(mine.item, target)] = mine.index;
  of.leave(mine.item, mine.index);
}

// The mean of a token and those that join it, from `first` on, by size.
struct MeanBySize {
  template <class Pairs>
  __device__ MeanBySize(const Pairs& of, int64_t item, int from, int first)
      : size(of.size[item * of.tokens + from]) {
    const float alone = size;
    for (int s = first; s >= 0; s = of.next[item * of.sources + s])
      size += of.size[item * of.tokens + of.source(item, s)];
    own = size == 0 ? 1.0f : alone / size;
  }
  __device__ float share(float joined) const { return joined / size; }

  float size, own;  // what leaves, and the share of the token that is joined
};

// Each row is a token or the mean of one and those that join it, which now live there; padding has no part in it.
// One block for each outgoing row.
template <class T, class Mean, class Pairs>
__global__ void write_means(Pairs of, const T* x, int64_t width, T* y, float* out_size,
                            int64_t* kept) {
  const int64_t item = blockIdx.x / of.keep;
  const int row = static_cast<int>(blockIdx.x % of.keep);
  const int from = of.origin[item * of.keep + row], first = of.head[item * of.tokens + from];
  const int* next = of.next + item * of.sources;
  const float* size = of.size + item * of.tokens;
  const T* tokens = x + item * of.tokens * width;
  const Mean mean(of, item, from, first);
  if (threadIdx.x == 0) {
    for (int s = first; of.slot && s >= 0; s = next[s])
      of.slot[item * of.tokens + of.source(item, s)] = row;
    if (out_size) out_size[item * of.keep + row] = mean.size;
    if (kept) kept[item * of.keep + row] = from;
  }
  T* to = y + (item * of.keep + row) * width;
  if (first < 0) {
    copy_row(to, tokens + from * width, width);
    return;
  }
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    float sum = mean.own * widen(tokens[from * width + c]);
    for (int s = first; s >= 0; s = next[s]) {
      const int token = of.source(item, s);
      if (size[token] != 0) sum += mean.share(size[token]) * widen(tokens[token * width + c]);
    }
    to[c] = narrow<T>(sum);
  }
}

}  // namespace thresher
