// BipartiteMerge and RankedBipartiteMerge in CUDA; see reference.py for what they compute.
//
// Unit keys, nearest targets, ranks of the sources, places of all tokens, outgoing rows.
#include "cuda/nearest.h"
#include "cuda/rank.h"

namespace thresher {
namespace {

// All that the steps share; sources and targets are counted from the first of their kind.
struct Merge {
  int tokens, protect, keep, first_source, first_target, sources, targets;
  bool by_index;
  const float* size;
  const Found* best;  // [B, S], the most similar target of each source
  const int* rank;    // [B, S]
  int* origin;        // [B, K], the token of each outgoing row
  int* head;          // [B, T], the first source that joins a target, or -1
  int* next;          // [B, S], the next one that joins the same target, or -1
  int64_t* slot;      // [B, N] or null

  __host__ __device__ int merging() const { return tokens - keep; }
  __device__ int before() const { return protect + sources - merging(); }  // rows before the targets
  __device__ int wanted() const { return sources; }
  __device__ int source(int64_t, int index) const { return first_source + 2 * index; }
  __device__ int target(int64_t, int index) const { return first_target + 2 * index; }
};

// Sources that merge most gladly first, padding (size 0) before all others.
struct BySimilarity {
  Merge of;

  __device__ uint32_t operator()(int64_t item, int index) const {
    const bool padding = of.size[item * of.tokens + of.source(item, index)] == 0;
    return order_key(padding ? PADDING : number_of(of.best[item * of.sources + index]));
  }
};

// One thread for each token: prefix and targets get their places, and lists begin empty.
__global__ void place_others(Merge of) {
  const Mine mine(of.tokens);
  if (mine.index >= of.tokens) return;
  const int behind = mine.index - of.first_target;
  int row = mine.index;
  if (mine.index >= of.protect) {
    if (behind < 0 || behind % 2) return;  // a source
    row = of.before() + behind / 2;
    of.head[mine.item * of.targets + behind / 2] = -1;
  }
  of.origin[mine.item * of.keep + row] = mine.index;
  if (of.slot) of.slot[mine.item * of.tokens + mine.index] = row;
}

// One thread for each source: its place, or its neighbours in the list of its target.
__global__ void place_sources(Merge of) {
  __shared__ int ranks[BLOCK], joined[BLOCK];
  const Mine mine(of.sources);
  const int lane = static_cast<int>(threadIdx.x);
  const int* rank = of.rank + mine.item * of.sources;
  const Found* best = of.best + mine.item * of.sources;
  const bool here = mine.index < of.sources;
  const int target = here && of.targets ? index_of(best[mine.index]) : -1;
  int staying = 0, next = -1;
  bool first = true;
  for (int start = 0; start < of.sources; start += BLOCK) {
    __syncthreads();  // the last tiles have been read
    if (start + lane < of.sources) {
      ranks[lane] = rank[start + lane];
      joined[lane] = of.targets ? index_of(best[start + lane]) : -1;
    }
    __syncthreads();
    const int filled = min(BLOCK, of.sources - start);
    for (int k = 0; k < filled; ++k) {
      const bool merges = ranks[k] < of.merging();
      staying += !merges && start + k < mine.index;
      if (merges && joined[k] == target && start + k < mine.index) first = false;
      if (merges && joined[k] == target && start + k > mine.index && next < 0) next = start + k;
    }
  }
  if (!here) return;
  const int own = rank[mine.index], token = of.source(mine.item, mine.index);
  int row;
  if (own < of.merging()) {
    of.next[mine.item * of.sources + mine.index] = next;
    if (first) of.head[mine.item * of.targets + target] = mine.index;
    row = of.before() + target;
  } else {
    row = of.protect + (of.by_index ? staying : own - of.merging());
    of.origin[mine.item * of.keep + row] = token;
  }
  if (of.slot) of.slot[mine.item * of.tokens + token] = row;
}

// One block for each outgoing row.
template <class T>
__global__ void write_rows(Merge of, const T* x, int64_t width, T* y, float* out_size,
                           int64_t* kept) {
  const int64_t item = blockIdx.x / of.keep;
  const int row = static_cast<int>(blockIdx.x % of.keep), target = row - of.before();
  const int from = of.origin[item * of.keep + row];
  const int first = target < 0 ? -1 : of.head[item * of.targets + target];
  const int* next = of.next + item * of.sources;
  const float* size = of.size + item * of.tokens;
  const T* tokens = x + item * of.tokens * width;
  float total = size[from];
  for (int s = first; s >= 0; s = next[s]) total += size[of.source(item, s)];
  if (threadIdx.x == 0) {
    if (out_size) out_size[item * of.keep + row] = total;
    if (kept) kept[item * of.keep + row] = from;
  }
  T* to = y + (item * of.keep + row) * width;
  if (first < 0) {
    copy_row(to, tokens + from * width, width);
    return;
  }
  const float share = total == 0 ? 1.0f : size[from] / total;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    float sum = share * widen(tokens[from * width + c]);
    for (int s = first; s >= 0; s = next[s]) {
      const int token = of.source(item, s);
      if (size[token] != 0) sum += size[token] / total * widen(tokens[token * width + c]);
    }
    to[c] = narrow<T>(sum);
  }
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
  of.head = scratch.take<int>(x.batch * of.targets);
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
  launch(blocks, dim3(BLOCK), rank_by_counting<BySimilarity>, BySimilarity{of}, of.sources, rank);
  launch(x.batch * parts(of.tokens, BLOCK), dim3(BLOCK), place_others, of);
  launch(blocks, dim3(BLOCK), place_sources, of);
  launch(x.batch * of.keep, dim3(BLOCK), write_rows<T>, of, static_cast<const T*>(given.data),
         x.width, static_cast<T*>(y.data), static_cast<float*>(out_size.data),
         static_cast<int64_t*>(kept.data));
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
