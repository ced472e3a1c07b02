// PruneMerge in CUDA; see reference.py for what it computes.
//
// Ranks, places, nearest staying token of each joining one, lists of those that join, outgoing rows.
#include "cuda/nearest.h"
#include "cuda/rank.h"

namespace thresher {
namespace {

// All that the steps share.  Joining tokens are counted by rank, targets from the first behind the prefix.
struct Join {
  int tokens, protect, keep, join;
  const float* size;
  const Found* best;   // [B, J], the most similar target of each joining token
  int* origin;         // [B, K], the token of each outgoing row
  int* joining;        // [B, J], tokens
  int* head;           // [B, K], the first that joins a row, or -1
  int* next;           // [B, J], the next one that joins the same row, or -1
  int64_t* slot;       // [B, N] or null

  __device__ int source(int64_t item, int index) const { return joining[item * join + index]; }
  __device__ int target(int64_t item, int index) const {
    return origin[item * keep + protect + index];
  }
};

__global__ void empty_lists(int64_t count, int* head) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
  if (at < count) head[at] = -1;
}

// One thread for each joining token: its neighbours in the list of its target.
__global__ void link(Join of) {
  __shared__ int joined[BLOCK];
  const Mine mine(of.join);
  const int lane = static_cast<int>(threadIdx.x);
  const Found* best = of.best + mine.item * of.join;
  const bool here = mine.index < of.join;
  const int target = here ? index_of(best[mine.index]) : -1;
  bool first = true;
  int next = -1;
  for (int start = 0; start < of.join; start += BLOCK) {
    __syncthreads();  // the last tile has been read
    if (start + lane < of.join) joined[lane] = index_of(best[start + lane]);
    __syncthreads();
    const int filled = min(BLOCK, of.join - start);
    for (int k = 0; k < filled; ++k) {
      if (joined[k] == target && start + k < mine.index) first = false;
      if (joined[k] == target && start + k > mine.index && next < 0) next = start + k;
    }
  }
  if (!here) return;
  const int row = of.protect + target;
  of.next[mine.item * of.join + mine.index] = next;
  if (first) of.head[mine.item * of.keep + row] = mine.index;
  if (of.slot) of.slot[mine.item * of.tokens + of.source(mine.item, mine.index)] = row;
}

// One block for each outgoing row.
template <class T>
__global__ void write_rows(Join of, const T* x, int64_t width, T* y, float* out_size,
                           int64_t* kept) {
  const int64_t item = blockIdx.x / of.keep;
  const int row = static_cast<int>(blockIdx.x % of.keep);
  const int from = of.origin[item * of.keep + row], first = of.head[item * of.keep + row];
  const int* next = of.next + item * of.join;
  const float* size = of.size + item * of.tokens;
  const T* tokens = x + item * of.tokens * width;
  int count = 1;
  float total = size[from];
  for (int i = first; i >= 0; i = next[i]) {
    const float part = size[of.source(item, i)];
    count += part != 0;
    total += number_of(of.best[item * of.join + i]) * part;
  }
  if (first >= 0) total = fmaxf(total, fminf(size[from], 1.0f));
  if (threadIdx.x == 0) {
    if (out_size) out_size[item * of.keep + row] = total;
    if (kept) kept[item * of.keep + row] = from;
  }
  T* to = y + (item * of.keep + row) * width;
  if (first < 0) {
    copy_row(to, tokens + from * width, width);
    return;
  }
  const float weight = 1.0f / static_cast<float>(count);
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    float sum = weight * widen(tokens[from * width + c]);
    for (int i = first; i >= 0; i = next[i]) {
      const int token = of.source(item, i);
      if (size[token] != 0) sum += weight * widen(tokens[token * width + c]);
    }
    to[c] = narrow<T>(sum);
  }
}

template <class T>
int compute(const Call& call, Scratch& scratch) {
  const Tensor &given = call.inputs[0], &size = call.inputs[1], &score = call.inputs[2];
  const Tensor &y = call.outputs[0], &out_size = call.outputs[1], &kept = call.outputs[2],
               &slot = call.outputs[3];
  const Stream x(given);
  if (!has_shape(size, x.batch, x.tokens) || !has_shape(score, x.batch, x.tokens))
    return WRONG_SHAPE;
  if (size.element != FLOAT || score.element != FLOAT) return WRONG_TYPE;
  if (call.protect < 0 || call.protect > x.tokens) return WRONG_COUNT;
  const int64_t all = x.batch * x.tokens;
  int* rank = scratch.take<int>(all);
  float* units = scratch.take<float>(all * x.width);
  Found* best = scratch.take<Found>(all);
  Join of = {};
  of.origin = scratch.take<int>(all);
  of.joining = scratch.take<int>(all);
  of.head = scratch.take<int>(all);
  of.next = scratch.take<int>(all);
  if (!scratch.ready()) return scratch.status();

  if (call.pruned > x.tokens || call.keep > call.pruned ||
      call.keep < call.protect + (call.pruned > call.keep))
    return WRONG_COUNT;
  of.tokens = x.tokens;
  of.protect = static_cast<int>(call.protect);
  of.keep = static_cast<int>(call.keep);
  of.join = static_cast<int>(call.pruned - call.keep);
  if (!has_shape(y, x.batch, of.keep, x.width) || !fits(out_size, FLOAT, x.batch, of.keep) ||
      !fits(kept, INT64, x.batch, of.keep) || !fits(slot, INT64, x.batch, of.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(size) || !present(score) || !present(y)) return NO_DATA;
  of.size = static_cast<const float*>(size.data);
  of.best = best;
  of.slot = static_cast<int64_t*>(slot.data);

  Launcher launch(call);
  const auto* tokens = static_cast<const T*>(given.data);
  const int64_t blocks = x.batch * parts(x.tokens, BLOCK);
  launch(blocks, dim3(BLOCK), rank_by_counting<ByScore>,
         ByScore{static_cast<const float*>(score.data), of.size, x.tokens, of.protect}, x.tokens,
         rank);
  launch(blocks, dim3(BLOCK), place,
         Placement{rank, x.tokens, of.keep, of.join, of.origin, of.joining, of.slot});
  launch(parts(x.batch * of.keep, BLOCK), dim3(BLOCK), empty_lists, x.batch * of.keep, of.head);
  if (of.join) {
    launch.clear(best, x.batch * of.join);
    find_nearest(launch, tokens, x.batch, x.tokens, 1, x.width, of.size, of, of.join,
                 of.keep - of.protect, units, best);
    launch(x.batch * parts(of.join, BLOCK), dim3(BLOCK), link, of);
  }
  launch(x.batch * of.keep, dim3(BLOCK), write_rows<T>, of, tokens, x.width,
         static_cast<T*>(y.data), static_cast<float*>(out_size.data),
         static_cast<int64_t*>(kept.data));
  return launch.status();
}

}  // namespace

int prune_merge(const Call& call, Scratch& scratch) {
  if (call.inputs[0].rank != 3) return WRONG_SHAPE;
  return by_type(call.inputs[0].element,
                 [&](auto type) { return compute<decltype(type)>(call, scratch); });
}

}  // namespace thresher
