// Unit vectors of tokens, and their products a tile of pairs at a time.
#pragma once

#include "cuda/rows.h"

namespace thresher {

constexpr int UNIT_ROWS = 4;  // rows of a block of unit_rows
constexpr int TILE = 32;      // rows and columns of a tile of pairs
constexpr int HALF_TILE = TILE / 2;
constexpr int DEPTH = HALF_TILE;  // channels in shared memory at once: a thread loads one

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

template <class T>
void find_units(Launcher& launch, const T* from, int64_t batch, int tokens, int64_t heads,
                int64_t depth, float* units) {
  launch(parts(batch * tokens, UNIT_ROWS), dim3(LANES, UNIT_ROWS), unit_rows<T>, from,
         batch * tokens, tokens, heads, depth, units);
}

// Which tile of which item's pairs a block is there for, and which four of them its thread: a row and a
// column, and those HALF_TILE further on.  Threads (HALF_TILE, HALF_TILE).
struct OwnTile {
  __device__ OwnTile(int rows, int columns) {
    const int down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
    item = blockIdx.x / across / down;
    first_row = static_cast<int>(blockIdx.x / across % down) * TILE;
    first_column = static_cast<int>(blockIdx.x % across) * TILE;
  }
  __device__ int row(int half) const { return first_row + y() + half * HALF_TILE; }
  __device__ int column(int half) const { return first_column + x() + half * HALF_TILE; }
  __device__ int x() const { return static_cast<int>(threadIdx.x); }
  __device__ int y() const { return static_cast<int>(threadIdx.y); }

  int64_t item;
  int first_row, first_column;
};
inline int64_t tiles(int64_t batch, int64_t rows, int64_t columns) {
  return batch * parts(rows, TILE) * parts(columns, TILE);
}
inline dim3 tile_threads() { return dim3(HALF_TILE, HALF_TILE); }

struct Tiles {
  float a[DEPTH][TILE + 1], b[DEPTH][TILE + 1];
};

// sum[i][j] += the product of the unit vectors of row i and column j of a thread.  `token_of_row` and
// `token_of_column` tell where in `units` they are, a negative number where there is none.
template <class Row, class Column>
__device__ inline void multiply(const OwnTile& at, Tiles& tile, const float* units, int64_t depth,
                                const Row& token_of_row, const Column& token_of_column,
                                float (&sum)[2][2]) {
  const int x = at.x(), y = at.y();
  int64_t of_row[2], of_column[2];  // of those that the thread loads, which differ from its own
  for (int half = 0; half < 2; ++half) {
    of_row[half] = token_of_row(at.row(half));
    of_column[half] = token_of_column(at.first_column + y + half * HALF_TILE);
  }
  for (int64_t start = 0; start < depth; start += DEPTH) {
    __syncthreads();  // the last tiles have been read
    const int64_t c = start + x;
    for (int half = 0; half < 2; ++half) {
      const int row = y + half * HALF_TILE;
      tile.a[x][row] = of_row[half] >= 0 && c < depth ? units[of_row[half] * depth + c] : 0;
      tile.b[x][row] = of_column[half] >= 0 && c < depth ? units[of_column[half] * depth + c] : 0;
    }
    __syncthreads();
    for (int k = 0; k < DEPTH; ++k)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          sum[i][j] += tile.a[k][y + i * HALF_TILE] * tile.b[k][x + j * HALF_TILE];
  }
}

}  // namespace thresher
