// All products of many rows with many targets, a tile of them in registers at a time, never a matrix.
#pragma once

#include "cpu/nearest.h"
#include "cpu/tile.h"

namespace thresher {

constexpr int64_t PAIR_ROWS = 96;  // rows that stay in the cache while the panels pass

// The products of ROWS rows with PANELS panels from `at` on, by panel and row, a target in each lane.
template <class W, int ROWS, int PANELS>
using Tile = Vector<W>[PANELS][ROWS];

// The rows from `row` on, ROWS at a time and then fewer.
template <int ROWS, int PANELS, class W, class Use>
THRESHER_INLINE void use_panels(const W* rows, int64_t row, int64_t count, const Targets<W>& targets,
                                int64_t at, Use& use) {
  const int64_t depth = targets.depth;
  const W* panel = targets.panel(at);
  for (; row + ROWS <= count; row += ROWS) {
    Tile<W, ROWS, PANELS> sum = {};
    add_products<ROWS, PANELS>(sum, rows + row * depth, depth, depth,
                               [&](int64_t channel, int64_t p) __attribute__((always_inline)) {
                                 return load(panel + (p * depth + channel) * LANES);
                               });
    use.template tile<ROWS, PANELS>(row, at, sum);
  }
  if constexpr (ROWS > 1) use_panels<ROWS / 2, PANELS>(rows, row, count, targets, at, use);
}

// Calls use.tile<ROWS, PANELS>(row, at, products) for all of at most PAIR_ROWS consecutive rows, the panels
// of each row in order.
template <class W, class Use>
THRESHER_INLINE void use_products(const W* rows, int64_t count, const Targets<W>& targets, Use& use) {
  int64_t panel = 0;
  if (many_registers() && sizeof(W) == sizeof(float))
    for (; panel + 2 <= targets.panels; panel += 2)
      use_panels<12, 2>(rows, 0, count, targets, panel, use);
  for (; panel < targets.panels; ++panel) use_panels<6, 1>(rows, 0, count, targets, panel, use);
}

}  // namespace thresher
