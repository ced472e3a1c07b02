// Products of a few rows with a few vectors of columns, summed in registers.
#pragma once

#include "cpu/numeric.h"

namespace thresher {

constexpr int VECTORS = 2;  // for which each value of a row is read once
template <class I>
inline constexpr int MOST_ROWS = I::SUMS / VECTORS;

template <class I, class W>
inline constexpr int64_t TILE_COLUMNS = VECTORS * LANES<I, W>;
// On this processor.
template <class W>
int64_t tile_columns() {
  int64_t found = 0;
  dispatch([&](auto isa) THRESHER_INLINED { found = TILE_COLUMNS<decltype(isa), W>; });
  return found;
}

// By vector of columns and row.
template <class I, class W, int ROWS, int COUNT>
using Tile = Vector<I, W>[COUNT][ROWS];

// sum[v][r] += rows[r][i] * column(i, v) for i in [0, depth); rows lie `stride` apart.
template <class I, int ROWS, int COUNT, class W, class Column>
THRESHER_INLINE void add_products(Tile<I, W, ROWS, COUNT>& sum, const W* rows, int64_t stride, int64_t depth,
                                  const Column& column) {
  for (int64_t i = 0; i < depth; ++i) {
    Vector<I, W> at[COUNT];
    for (int64_t v = 0; v < COUNT; ++v) at[v] = column(i, v);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t v = 0; v < COUNT; ++v) sum[v][r] += rows[r * stride + i] * at[v];
  }
}

}  // namespace thresher
