// SelectDiverse in CUDA; see reference.py for what it computes.
//
// Unit rows, similarities of all pairs, how near each token's nearest is, the choice, places, outgoing rows.
// The matrix of similarities is kept: a round of the choice, in one block, then reads one row of it, and not
// all tokens.
#include "cuda/pairs.h"
#include "cuda/rank.h"

namespace thresher {
namespace {

constexpr float CHOSEN = 2 * PADDING;  // beyond padding: never picked again
constexpr int SIDE = 16;               // of the square of threads of `choose`
constexpr int CHOOSERS = SIDE * SIDE;
constexpr int64_t MOST_PAIRS = INT64_MAX / 64;

// All that the steps share.  The pool is what is behind the prefix.
struct Choice {
  int64_t batch;
  int tokens, protect, pool, keep;
  const float* size;
  float* closeness;  // [B, M, M], by row: what the others are no nearer to once that one is picked
  float* nearest;    // [B, M], of each to its nearest other
  float* reached;    // [B, M], of each to the nearest picked one
  int* rank;         // [B, N], below `keep` for those that stay

  __device__ bool padding(int64_t item, int index) const {
    return size[item * tokens + protect + index] == 0;
  }
};

// One block for each tile on and above the diagonal, which serves the other side too.
__global__ void find_closeness(Choice of, const float* units, int64_t depth) {
  __shared__ Tiles tile;
  const OwnTile at(of.pool, of.pool);
  if (at.first_column < at.first_row) return;
  const auto token = [&](int i) { return i < of.pool ? of.protect + i : -1; };
  float sum[2][2] = {};
  multiply(at, tile, units + at.item * of.tokens * depth, depth, token, token, sum);
  float* to = of.closeness + at.item * of.pool * of.pool;
  const auto put = [&](int from, int other, float cosine) {
    float near = cosine == cosine ? cosine : -PADDING;  // NaN is far from everything
    if (of.padding(at.item, other)) near = PADDING;
    if (from == other) near = CHOSEN;
    to[static_cast<int64_t>(from) * of.pool + other] = near;
  };
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      if (at.row(i) >= of.pool || at.column(j) >= of.pool) continue;
      put(at.row(i), at.column(j), sum[i][j]);
      if (at.first_column > at.first_row) put(at.column(j), at.row(i), sum[i][j]);
    }
}

// What is beyond every cosine is the token itself or padding, and nobody's neighbour.  Threads
// (LANES, UNIT_ROWS).
__global__ void find_nearest_others(Choice of) {
  __shared__ float shared[UNIT_ROWS][LANES];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * UNIT_ROWS + threadIdx.y;
  const int lane = static_cast<int>(threadIdx.x);
  const bool here = row < of.batch * of.pool;
  float most = -PADDING;
  if (here)
    for (int i = lane; i < of.pool; i += LANES) {
      const float near = of.closeness[row * of.pool + i];
      if (near < PADDING) most = fmaxf(most, near);
    }
  shared[threadIdx.y][lane] = most;
  __syncthreads();
  if (!here || lane > 0) return;
  for (int k = 0; k < LANES; ++k) most = fmaxf(most, shared[threadIdx.y][k]);
  of.nearest[row] =
      of.padding(row / of.pool, static_cast<int>(row % of.pool)) ? PADDING : most;
}

// The largest of the values of all CHOOSERS threads, the same in all of them.
__device__ Found most_of_block(Found own, Found (&all)[CHOOSERS], Found (&columns)[SIDE]) {
  const int lane = static_cast<int>(threadIdx.x);
  all[lane] = own;
  __syncthreads();  // all have read the last columns, too
  if (lane < SIDE) {
    Found most = 0;
    for (int k = 0; k < SIDE; ++k) most = max(most, all[k * SIDE + lane]);
    columns[lane] = most;
  }
  __syncthreads();
  Found most = 0;
  for (int k = 0; k < SIDE; ++k) most = max(most, columns[k]);
  return most;
}

// One block for each item, one round for each pick.  CHOOSERS threads.
__global__ void choose(Choice of) {
  __shared__ Found all[CHOOSERS], columns[SIDE];
  const int64_t item = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  const float* closeness = of.closeness + item * of.pool * of.pool;
  float* __restrict__ reached = of.reached + item * of.pool;
  int* rank = of.rank + item * of.tokens;
  for (int i = lane; i < of.tokens; i += CHOOSERS) rank[i] = i < of.protect ? i : of.keep;
  for (int i = lane; i < of.pool; i += CHOOSERS) reached[i] = -PADDING;

  const float* seen = of.nearest + item * of.pool;  // which the first pick goes by
  for (int next = of.protect; next < of.keep; ++next) {
    Found least = 0;
    for (int i = lane; i < of.pool; i += CHOOSERS) {
      const float near = fmaxf(reached[i], seen[i]);
      if (next > of.protect) reached[i] = near;
      least = max(least, found(-near, i));
    }
    const int pick = index_of(most_of_block(least, all, columns));
    if (lane == 0) rank[of.protect + pick] = next;
    seen = closeness + static_cast<int64_t>(pick) * of.pool;
  }
}

template <class T>
int compute(const Call& call, Scratch& scratch) {
  const Tensor &given = call.inputs[0], &size = call.inputs[1];
  const Tensor &y = call.outputs[0], &kept = call.outputs[1], &slot = call.outputs[2];
  const Stream x(given);
  if (!has_shape(size, x.batch, x.tokens)) return WRONG_SHAPE;
  if (size.element != FLOAT) return WRONG_TYPE;
  if (call.protect < 0 || call.protect >= x.tokens) return WRONG_COUNT;
  Choice of = {};
  of.batch = x.batch;
  of.tokens = x.tokens;
  of.protect = static_cast<int>(call.protect);
  of.pool = of.tokens - of.protect;
  const int64_t all = x.batch * of.pool;
  if (all > MOST_PAIRS / of.pool) return TOO_LARGE;
  float* units = scratch.take<float>(x.batch * x.tokens * x.width);
  of.closeness = scratch.take<float>(all * of.pool);
  of.nearest = scratch.take<float>(all);
  of.reached = scratch.take<float>(all);
  of.rank = scratch.take<int>(x.batch * x.tokens);
  int* origin = scratch.take<int>(x.batch * x.tokens);
  if (!scratch.ready()) return scratch.status();

  if (call.keep <= call.protect || call.keep > x.tokens) return WRONG_COUNT;
  of.keep = static_cast<int>(call.keep);
  if (!has_shape(y, x.batch, of.keep, x.width) || !fits(kept, INT64, x.batch, of.keep) ||
      !fits(slot, INT64, x.batch, x.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(size) || !present(y)) return NO_DATA;
  of.size = static_cast<const float*>(size.data);

  Launcher launch(call);
  const auto* tokens = static_cast<const T*>(given.data);
  find_units(launch, tokens, x.batch, x.tokens, 1, x.width, units);
  launch(tiles(x.batch, of.pool, of.pool), tile_threads(), find_closeness, of, units, x.width);
  launch(parts(all, UNIT_ROWS), dim3(LANES, UNIT_ROWS), find_nearest_others, of);
  launch(x.batch, dim3(CHOOSERS), choose, of);
  launch(x.batch * parts(x.tokens, BLOCK), dim3(BLOCK), place,
         Placement{of.rank, x.tokens, of.keep, 0, nullptr, origin, nullptr,
                   static_cast<int64_t*>(slot.data)});
  launch(x.batch * of.keep, dim3(BLOCK), copy_rows<T>, tokens, x.tokens, of.keep, of.keep, x.width,
         origin, static_cast<T*>(y.data), static_cast<int64_t*>(kept.data));
  return launch.status();
}

}  // namespace

int select_diverse(const Call& call, Scratch& scratch) {
  if (call.inputs[0].rank != 3) return WRONG_SHAPE;
  return by_type(call.inputs[0].element,
                 [&](auto type) { return compute<decltype(type)>(call, scratch); });
}

}  // namespace thresher
