// TokenEnergy in CUDA; see reference.py for what it computes.
//
// Unit keys, sums over the tiles of pairs, means.  A tile leaves one number for each of its rows, and these are
// added up in order: there is no matrix of pairs, and no order of blocks in the result.
#include "cuda/pairs.h"
#include "cuda/rank.h"

namespace thresher {
namespace {

// All that the steps share.  The pool is what is behind the prefix.
struct Energy {
  int tokens, protect, pool, tiles;  // so many tiles hold the pool
  float margin;
  const float* size;
  float* felt;  // [B, tiles, N], the sum over one tile

  __device__ bool real(int64_t item, int index) const {
    return size[item * tokens + protect + index] > 0;
  }
  __device__ float feel(float cosine) const {
    return cosine >= margin ? cosine : expf(cosine - margin) - 1;
  }
};

// One block for each tile, of all tokens with those of the pool.
__global__ void feel(Energy of, const float* units, int64_t depth) {
  __shared__ Tiles tile;
  __shared__ float shared[TILE][HALF_TILE + 1];
  const OwnTile at(of.tokens, of.pool);
  float product[2][2] = {};
  multiply(
      at, tile, units + at.item * of.tokens * depth, depth,
      [&](int i) { return i < of.tokens ? i : -1; },
      [&](int j) { return j < of.pool ? of.protect + j : -1; }, product);
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
    for (int j = 0; j < 2; ++j)
      if (at.column(j) < of.pool && of.real(at.item, at.column(j))) sum += of.feel(product[i][j]);
    shared[at.y() + i * HALF_TILE][at.x()] = sum;
  }
  __syncthreads();
  const int row = at.y() * HALF_TILE + at.x(), token = at.first_row + row;
  if (row >= TILE || token >= of.tokens) return;
  float sum = 0;
  for (int k = 0; k < HALF_TILE; ++k) sum += shared[row][k];
  of.felt[(at.item * of.tiles + at.first_column / TILE) * of.tokens + token] = sum;
}

// One thread for each token.
__global__ void mean_of_tiles(Energy of, float* score) {
  __shared__ int shared[BLOCK];
  const Mine mine(of.tokens);
  int own = 0;
  for (int i = static_cast<int>(threadIdx.x); i < of.pool; i += BLOCK) own += of.real(mine.item, i);
  shared[threadIdx.x] = own;
  __syncthreads();
  if (mine.index >= of.tokens) return;
  int count = 0;
  for (int k = 0; k < BLOCK; ++k) count += shared[k];
  float sum = 0;
  for (int tile = 0; tile < of.tiles; ++tile)
    sum += of.felt[(mine.item * of.tiles + tile) * of.tokens + mine.index];
  score[mine.item * of.tokens + mine.index] = sum / static_cast<float>(max(count, 1));
}

template <class T>
int compute(const Call& call, Scratch& scratch) {
  const Tensor &metric = call.inputs[0], &size = call.inputs[1], &score = call.outputs[0];
  const int64_t batch = metric.dims[0], heads = metric.dims[1], depth = metric.dims[3];
  Energy of = {};
  of.tokens = static_cast<int>(metric.dims[2]);
  if (heads == 0 || !has_shape(size, batch, of.tokens)) return WRONG_SHAPE;
  if (size.element != FLOAT || score.element != FLOAT) return WRONG_TYPE;
  if (call.protect < 0 || call.protect > of.tokens) return WRONG_COUNT;
  of.protect = static_cast<int>(call.protect);
  of.pool = of.tokens - of.protect;
  of.tiles = static_cast<int>(parts(of.pool, TILE));
  float* units = scratch.take<float>(batch * of.tokens * depth);
  of.felt = scratch.take<float>(batch * of.tiles * of.tokens);
  if (!scratch.ready()) return scratch.status();

  if (!has_shape(score, batch, of.tokens)) return WRONG_SHAPE;
  if (!present(metric) || !present(size) || !present(score)) return NO_DATA;
  of.margin = static_cast<float>(call.margin);
  of.size = static_cast<const float*>(size.data);
  Launcher launch(call);
  find_units(launch, static_cast<const T*>(metric.data), batch, of.tokens, heads, depth, units);
  launch(tiles(batch, of.tokens, of.pool), tile_threads(), feel, of, units, depth);
  launch(batch * parts(of.tokens, BLOCK), dim3(BLOCK), mean_of_tiles, of,
         static_cast<float*>(score.data));
  return launch.status();
}

}  // namespace

int token_energy(const Call& call, Scratch& scratch) {
  if (call.inputs[0].rank != 4) return WRONG_SHAPE;
  return by_type(call.inputs[0].element,
                 [&](auto type) { return compute<decltype(type)>(call, scratch); });
}

}  // namespace thresher
