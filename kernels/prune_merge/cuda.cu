// PruneMerge in CUDA; see reference.py for what it computes.
//
// Ranks, places, nearest staying token of each joining one, lists of those that join, outgoing rows.  The
// count `pruned` decides no shape and is read on the device, where it is bounded to what can be reached.
#include "cuda/merging.h"

namespace thresher {
namespace {

// All that the steps share.  Sources are counted by rank, as many as join if `pruned` is all; targets from the
// first behind the prefix.
struct Join : Groups {
  int protect;
  const int* count;  // how many join
  int* joining;      // [B, sources], tokens

  __device__ int wanted() const { return *count; }
  __device__ bool joins(int64_t, int) const { return true; }
  __device__ void leave(int64_t, int) const {}
  __device__ int source(int64_t item, int index) const { return joining[item * sources + index]; }
  __device__ int target(int64_t item, int index) const {
    return origin[item * keep + protect + index];
  }
};

// Lists begin empty; how many will join is counted.
__global__ void begin(Join of, int64_t tokens, const int64_t* pruned, int* count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
  if (at < tokens) of.head[at] = -1;
  if (at > 0) return;
  const int64_t cut = *pruned;
  *count = cut > of.keep ? static_cast<int>(min(cut - of.keep, int64_t{of.sources})) : 0;
}

// The plain mean; those that join add to the size as far as they are alike.
struct PlainMean {
  __device__ PlainMean(const Join& of, int64_t item, int from, int first) {
    const float* sizes = of.size + item * of.tokens;
    int count = 1;
    size = sizes[from];
    for (int s = first; s >= 0; s = of.next[item * of.sources + s]) {
      const float joined = sizes[of.source(item, s)];
      count += joined != 0;
      size += number_of(of.best[item * of.sources + s]) * joined;
    }
    if (first >= 0) size = fmaxf(size, fminf(sizes[from], 1.0f));
    own = 1.0f / static_cast<float>(count);
  }
  __device__ float share(float) const { return own; }

  float size, own;
};

template <class T>
int compute(const Call& call, Scratch& scratch) {
  const Tensor &given = call.inputs[0], &size = call.inputs[1], &score = call.inputs[2],
               &pruned = call.inputs[3];
  const Tensor &y = call.outputs[0], &out_size = call.outputs[1], &kept = call.outputs[2],
               &slot = call.outputs[3];
  const Stream x(given);
  if (!has_shape(size, x.batch, x.tokens) || !has_shape(score, x.batch, x.tokens) ||
      count_of(pruned) != 1)
    return WRONG_SHAPE;
  if (size.element != FLOAT || score.element != FLOAT || pruned.element != INT64)
    return WRONG_TYPE;
  if (call.protect < 0 || call.protect > x.tokens) return WRONG_COUNT;
  const int64_t all = x.batch * x.tokens;
  int* count = scratch.take<int>(1);
  int* rank = scratch.take<int>(all);
  float* units = scratch.take<float>(all * x.width);
  Found* best = scratch.take<Found>(all);
  Join of = {};
  of.origin = scratch.take<int>(all);
  of.joining = scratch.take<int>(all);
  of.head = scratch.take<int>(all);
  of.next = scratch.take<int>(all);
  if (!scratch.ready()) return scratch.status();

  if (call.keep < call.protect || call.keep > x.tokens) return WRONG_COUNT;
  of.tokens = x.tokens;
  of.protect = static_cast<int>(call.protect);
  of.keep = static_cast<int>(call.keep);
  of.sources = of.keep > of.protect ? of.merging() : 0;
  of.count = count;
  if (!has_shape(y, x.batch, of.keep, x.width) || !fits(out_size, FLOAT, x.batch, of.keep) ||
      !fits(kept, INT64, x.batch, of.keep) || !fits(slot, INT64, x.batch, of.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(size) || !present(score) || !present(pruned) ||
      !present(y))
    return NO_DATA;
  of.size = static_cast<const float*>(size.data);
  of.best = best;
  of.slot = static_cast<int64_t*>(slot.data);

  Launcher launch(call);
  const auto* tokens = static_cast<const T*>(given.data);
  const int64_t blocks = x.batch * parts(x.tokens, BLOCK);
  launch(parts(all + 1, BLOCK), dim3(BLOCK), begin, of, all,
         static_cast<const int64_t*>(pruned.data), count);
  launch(blocks, dim3(BLOCK), rank_by_counting<ByScore>,
         ByScore{static_cast<const float*>(score.data), of.size, x.tokens, of.protect}, x.tokens,
         rank);
  launch(blocks, dim3(BLOCK), place,
         Placement{rank, x.tokens, of.keep, of.sources, count, of.origin, of.joining, of.slot});
  if (of.sources) {
    find_nearest(launch, tokens, x.batch, x.tokens, 1, x.width, of.size, of, of.sources,
                 of.keep - of.protect, units, best);
    launch(x.batch * parts(of.sources, BLOCK), dim3(BLOCK), link<Join>, of);
  }
  launch(x.batch * of.keep, dim3(BLOCK), write_means<T, PlainMean, Join>, of, tokens, x.width,
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
