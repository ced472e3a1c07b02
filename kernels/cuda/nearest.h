// For each of many rows the most similar of many other rows, without the matrix of similarities.
#pragma once

#include "cuda/rows.h"

namespace thresher {

constexpr int UNIT_ROWS = 4;  // rows of a block of unit_rows
constexpr int TILE = 32;      // rows and targets of a block of nearest
constexpr int HALF_TILE = TILE / 2;
constexpr int DEPTH = 16;     // channels in shared memory at once

// units[b, n] = the mean over the heads of from[b, :, n] as a unit vector.  Threads (LANES, UNIT_ROWS).
template <class T>
__global__ void unit_rows(const T* from, int64_t rows, int tokens, int64_t heads, int64_t depth,
                          float* units) {
  __shared__ float shared[UNIT_ROWS][LANES];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * UNIT_ROWS + threadIdx.y;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t item = row / tokens, token = row % tokens;
  float square = 0;
  if (row < rows)
    for (int64_t c = lane; c < depth; c += LANES) {
      float sum = 0;
      for (int64_t head = 0; head < heads; ++head)
        sum += widen(from[((item * heads + head) * tokens + token) * depth + c]);
      const float mean = sum / static_cast<float>(heads);
      units[row * depth + c] = mean;
      square += mean * mean;
    }
  const float length = fmaxf(sqrtf(sum_of_lanes(square, shared)), EPSILON);
  if (row < rows)
    for (int64_t c = lane; c < depth; c += LANES) units[row * depth + c] /= length;
}

// best[b, i] = the largest product of the unit vectors of source i with one of a target, and which
// target that is; of equal ones the first.  Targets of size 0 are padding: their similarity is
// -PADDING.  `best` starts at 0; each block sees one tile of all pairs.  Threads (HALF_TILE, HALF_TILE).
//
// `pairs.source(item, i)` and `pairs.target(item, j)` are tokens; of the sources only the first
// `pairs.wanted()` are looked at.
template <class Pairs>
__global__ void nearest(Pairs pairs, const float* units, const float* size, int tokens,
                        int64_t depth, int sources, int targets, Found* best) {
  __shared__ float a[DEPTH][TILE + 1], b[DEPTH][TILE + 1];
  __shared__ Found winners[TILE][HALF_TILE + 1];
  const int down = (sources + TILE - 1) / TILE, across = (targets + TILE - 1) / TILE;
  const int64_t item = blockIdx.x / across / down;
  const int first = static_cast<int>(blockIdx.x / across % down) * TILE;
  const int first_target = static_cast<int>(blockIdx.x % across) * TILE;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const float* of_item = units + item * tokens * depth;
  const int wanted = pairs.wanted();
  if (first >= wanted) return;

  float sum[2][2] = {};
  for (int64_t start = 0; start < depth; start += DEPTH) {
    __syncthreads();  // the last tiles have been read
    for (int half = 0; half < 2; ++half) {
      const int row = y + half * HALF_TILE;
      const int64_t c = start + x;  // DEPTH is HALF_TILE
      const bool source = first + row < wanted && c < depth;
      const bool target = first_target + row < targets && c < depth;
      a[x][row] = source ? of_item[pairs.source(item, first + row) * depth + c] : 0;
      b[x][row] = target ? of_item[pairs.target(item, first_target + row) * depth + c] : 0;
    }
    __syncthreads();
    for (int c = 0; c < DEPTH; ++c)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          sum[i][j] += a[c][y + i * HALF_TILE] * b[c][x + j * HALF_TILE];
  }
  for (int i = 0; i < 2; ++i) {
    Found own = 0;
    for (int j = 0; j < 2; ++j) {
      const int target = first_target + x + j * HALF_TILE;
      if (target >= targets) continue;
      const bool padding = size[item * tokens + pairs.target(item, target)] == 0;
      own = max(own, found(padding ? -PADDING : sum[i][j], target));
    }
    winners[y + i * HALF_TILE][x] = own;
  }
  __syncthreads();
  const int row = y * HALF_TILE + x;
  if (row >= TILE || first + row >= wanted) return;
  Found most = 0;
  for (int k = 0; k < HALF_TILE; ++k) most = max(most, winners[row][k]);
  atomicMax(best + item * sources + first + row, most);
}

// Launches both for tokens of `batch` items.
template <class T, class Pairs>
void find_nearest(Launcher& launch, const T* from, int64_t batch, int tokens, int64_t heads,
                  int64_t depth, const float* size, Pairs pairs, int sources, int targets,
                  float* units, Found* best) {
  static_assert(DEPTH == HALF_TILE, "a thread loads one channel");
  launch(parts(batch * tokens, UNIT_ROWS), dim3(LANES, UNIT_ROWS), unit_rows<T>, from,
         batch * tokens, tokens, heads, depth, units);
  launch(batch * parts(sources, TILE) * parts(targets, TILE), dim3(HALF_TILE, HALF_TILE),
         nearest<Pairs>, pairs, units, size, tokens, depth, sources, targets, best);
}

}  // namespace thresher
