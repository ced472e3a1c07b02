// For each of many rows the most similar of many other rows, without the matrix of similarities.
#pragma once

#include "cuda/pairs.h"

namespace thresher {

// best[b, i] = the largest product of the unit vectors of source i with one of a target, and which
// target that is; of equal ones the first.  Targets of size 0 are padding: their similarity is
// -PADDING, and so is what is no number.  `best` starts at 0; each block sees one tile of all pairs and
// joins it to the others' by a maximum.
//
// `pairs.source(item, i)` and `pairs.target(item, j)` are tokens; of the sources only the first
// `pairs.wanted()` are looked at.
template <class Pairs>
__global__ void nearest(Pairs pairs, const float* units, const float* size, int tokens,
                        int64_t depth, int sources, int targets, Found* best) {
  __shared__ Tiles tile;
  __shared__ Found winners[TILE][HALF_TILE + 1];
  const OwnTile at(sources, targets);
  const int64_t item = at.item;
  const int wanted = pairs.wanted();
  if (at.first_row >= wanted) return;

  float sum[2][2] = {};
  multiply(
      at, tile, units + item * tokens * depth, depth,
      [&](int i) { return i < wanted ? pairs.source(item, i) : -1; },
      [&](int j) { return j < targets ? pairs.target(item, j) : -1; }, sum);
  for (int i = 0; i < 2; ++i) {
    Found own = 0;
    for (int j = 0; j < 2; ++j) {
      const int target = at.column(j);
      if (target >= targets) continue;
      const bool padding = size[item * tokens + pairs.target(item, target)] == 0;
      const bool none = padding || sum[i][j] != sum[i][j];
      own = max(own, found(none ? -PADDING : sum[i][j], target));
    }
    winners[at.y() + i * HALF_TILE][at.x()] = own;
  }
  __syncthreads();
  const int row = at.y() * HALF_TILE + at.x();
  if (row >= TILE || at.first_row + row >= wanted) return;
  Found most = 0;
  for (int k = 0; k < HALF_TILE; ++k) most = max(most, winners[row][k]);
  atomicMax(best + item * sources + at.first_row + row, most);
}

// Finds the units, clears `best` and launches it, for tokens of `batch` items.
template <class T, class Pairs>
void find_nearest(Launcher& launch, const T* from, int64_t batch, int tokens, int64_t heads,
                  int64_t depth, const float* size, Pairs pairs, int sources, int targets,
                  float* units, Found* best) {
  find_units(launch, from, batch, tokens, heads, depth, units);
  launch.clear(best, batch * sources);
  launch(tiles(batch, sources, targets), tile_threads(), nearest<Pairs>, pairs, units, size,
         tokens, depth, sources, targets, best);
}

}  // namespace thresher
