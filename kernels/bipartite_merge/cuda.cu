// BipartiteMerge and RankedBipartiteMerge in CUDA; see reference.py for what they compute.
//
// Unit keys, nearest targets, ranks of the sources, places of all tokens, outgoing rows.
#include "cuda/merging.h"

namespace thresher {
namespace {

// All that the steps share; sources and targets are counted from the first of their kind.
struct Merge : Groups {
  int protect, first_source, first_target, targets;
  bool by_index;
  const int* rank;  // [B, S]

  __device__ int before() const { return protect + sources - merging(); }  // rows before the targets
  __device__ int wanted() const { return sources; }
  __device__ bool joins(int64_t item, int index) const {
    return rank[item * sources + index] < merging();
  }
  __device__ void leave(int64_t, int) const {}
  __device__ int source(int64_t, int index) const { return first_source + 2 * index; }
  __device__ int target(int64_t, int index) const { return first_target + 2 * index; }
};

// One thread for each token: its row, unless it merges; no list has begun.
__global__ void place_tokens(Merge of) {
  __shared__ int ranks[BLOCK];
  const Mine mine(of.tokens);
  const int lane = static_cast<int>(threadIdx.x), behind = mine.index - of.first_source;
  const int source = behind >= 0 && behind % 2 == 0 ? behind / 2 : -1;
  const int* rank = of.rank + mine.item * of.sources;
  int staying = 0;  // before it
  for (int start = 0; start < of.sources; start += BLOCK) {
    __syncthreads();  // the last tile has been read
    if (start + lane < of.sources) ranks[lane] = rank[start + lane];
    __syncthreads();
    const int filled = min(BLOCK, min(of.sources, source) - start);
    for (int k = 0; k < filled; ++k) staying += ranks[k] >= of.merging();
  }
  if (mine.index >= of.tokens) return;
  of.head[mine.item * of.tokens + mine.index] = -1;
  int row = mine.index;  // of the prefix
  if (source >= 0) {
    const int order = rank[source] - of.merging();
    if (order < 0) return;
    row = of.protect + (of.by_index ? staying : order);
  } else if (mine.index >= of.protect) {
    row = of.before() + (mine.index - of.first_target) / 2;
  }
  of.origin[mine.item * of.keep + row] = mine.index;
  if (of.slot) of.slot[mine.item * of.tokens + mine.index] = row;
}

template <class T>
int merge(const Call& call, Scratch& scratch, bool by_index) {
  const Tensor &given = call.inputs[0], &size = call.inputs[1], &metric = call.inputs[2];
  const Tensor &y = call.outputs[0], &out_size = call.outputs[1], &kept = call.outputs[2],
               &slot = call.outputs[3];
  const Stream x(given);
  if (!has_shape(size, x.batch, x.tokens) || metric.rank != 4 || metric.dims[0] != x.batch ||
      metric.dims[1] == 0 || metric.dims[2] != x.tokens)
    return WRONG_SHAPE;
  if (size.element != FLOAT || metric.element != given.element) return WRONG_TYPE;
  if (call.protect < 0 || call.protect > x.tokens) return WRONG_COUNT;

  Merge of = {};
  of.tokens = x.tokens;
  of.protect = static_cast<int>(call.protect);
  of.first_source = of.protect + of.protect % 2;
  of.first_target = of.protect + 1 - of.protect % 2;
  of.sources = of.tokens > of.first_source ? (of.tokens - of.first_source + 1) / 2 : 0;
  of.targets = of.tokens > of.first_target ? (of.tokens - of.first_target + 1) / 2 : 0;
  of.by_index = by_index;
  float* units = scratch.take<float>(x.batch * of.tokens * metric.dims[3]);
  Found* best = scratch.take<Found>(x.batch * of.sources);
  int* rank = scratch.take<int>(x.batch * of.sources);
  of.origin = scratch.take<int>(x.batch * of.tokens);
  of.head = scratch.take<int>(x.batch * of.tokens);
  of.next = scratch.take<int>(x.batch * of.sources);
  if (!scratch.ready()) return scratch.status();

  const int least = of.tokens - (of.targets ? of.sources : 0);
  if (call.keep < least || call.keep > of.tokens) return WRONG_COUNT;
  of.keep = static_cast<int>(call.keep);
  if (!has_shape(y, x.batch, of.keep, x.width) || !fits(out_size, FLOAT, x.batch, of.keep) ||
      !fits(kept, INT64, x.batch, of.keep) || !fits(slot, INT64, x.batch, of.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(size) || !present(metric) || !present(y)) return NO_DATA;
  of.size = static_cast<const float*>(size.data);
  of.best = best;
  of.rank = rank;
  of.slot = static_cast<int64_t*>(slot.data);

  Launcher launch(call);
  const int64_t blocks = x.batch * parts(of.sources, BLOCK);
  find_nearest(launch, static_cast<const T*>(metric.data), x.batch, of.tokens, metric.dims[1],
               metric.dims[3], of.size, of, of.sources, of.targets, units, best);
  launch(blocks, dim3(BLOCK), rank_by_counting<BySimilarity<Merge>>, BySimilarity<Merge>{of},
         of.sources, rank);
  launch(x.batch * parts(of.tokens, BLOCK), dim3(BLOCK), place_tokens, of);
  launch(blocks, dim3(BLOCK), link<Merge>, of);
  launch(x.batch * of.keep, dim3(BLOCK), write_means<T, MeanBySize, Merge>, of,
         static_cast<const T*>(given.data), x.width, static_cast<T*>(y.data),
         static_cast<float*>(out_size.data), static_cast<int64_t*>(kept.data));
  return launch.status();
}

int merge(const Call& call, Scratch& scratch, bool by_index) {
  if (call.inputs[0].rank != 3) return WRONG_SHAPE;
  return by_type(call.inputs[0].element, [&](auto type) {
    return merge<decltype(type)>(call, scratch, by_index);
  });
}

}  // namespace

int bipartite_merge(const Call& call, Scratch& scratch) { return merge(call, scratch, true); }
int ranked_bipartite_merge(const Call& call, Scratch& scratch) {
  return merge(call, scratch, false);
}

}  // namespace thresher
