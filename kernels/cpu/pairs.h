// All products of many rows with many targets, a tile of them in registers at a time, never a matrix.
#pragma once

#include "cpu/nearest.h"
#include "cpu/tile.h"

namespace thresher {

// The rows from `row` on, ROWS at a time and then fewer, with COUNT vectors of targets from `at` on.
template <class I, int ROWS, int COUNT, class W, class Use>
THRESHER_INLINE void use_vectors(const W* rows, int64_t row, int64_t count, const Targets<W>& targets,
                                 int64_t at, Use& use) {
  const int64_t depth = targets.depth;
  const W* columns[COUNT];
  for (int64_t v = 0; v < COUNT; ++v) columns[v] = targets.column(at + v * LANES<I, W>);
  for (; row + ROWS <= count; row += ROWS) {
    Tile<I, W, ROWS, COUNT> sum = {};
    add_products<I, ROWS, COUNT>(
        sum, rows + row * depth, depth, depth,
        [&](int64_t channel, int64_t v) THRESHER_INLINED { return load<I>(columns[v] + channel * PANEL); });
    use.template tile<ROWS, COUNT>(row, at, sum);
  }
  if constexpr (ROWS > 1) use_vectors<I, ROWS / 2, COUNT>(rows, row, count, targets, at, use);
}

// Calls use.tile<ROWS, COUNT>(row, target, products) for all of at most PAIR_ROWS consecutive rows, the targets of
// each row in order, and those behind the last one that fill a panel.
template <class I, class W, class Use>
THRESHER_INLINE void use_products(const W* rows, int64_t count, const Targets<W>& targets, Use& use) {
  constexpr int64_t ONE = LANES<I, W>, SEVERAL = VECTORS * ONE;
  const int64_t end = targets.padded();
  int64_t at = 0;
  for (; at + SEVERAL <= end; at += SEVERAL)
    use_vectors<I, MOST_ROWS<I>, VECTORS>(rows, 0, count, targets, at, use);
  for (; at < end; at += ONE) use_vectors<I, MOST_ROWS<I>, 1>(rows, 0, count, targets, at, use);
}

}  // namespace thresher
