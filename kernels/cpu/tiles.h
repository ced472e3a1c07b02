// All products of many rows with many targets, a tile of them in registers at a time, never a matrix.
#pragma once

#include "cpu/nearest.h"

namespace thresher {

constexpr int64_t TILE_ROWS = 6;    // with one panel their sums fill the registers of AVX2
constexpr int64_t BLOCK_ROWS = 96;  // rows that stay in the cache while the panels pass

// Whether two panels fit beside each other: each row's value is then read once for both.
inline bool two_panels_fit() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx512f");
  return found;
#else
  return false;
#endif
}

// The products of ROWS rows with PANELS panels from `at` on, by panel and row, a target in each lane.
template <class W, int64_t ROWS, int64_t PANELS>
using Tile = Vector<W>[PANELS][ROWS];

template <int64_t ROWS, int64_t PANELS, class W, class Use>
THRESHER_INLINE void use_tile(const W* rows, int64_t row, const Targets<W>& targets, int64_t at,
                              Use& use) {
  const int64_t depth = targets.depth;
  const W *from = rows + row * depth, *panel = targets.panel(at);
  Tile<W, ROWS, PANELS> sum = {};
  for (int64_t channel = 0; channel < depth; ++channel) {
    Vector<W> target[PANELS];
    for (int64_t p = 0; p < PANELS; ++p) target[p] = load(panel + (p * depth + channel) * LANES);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t p = 0; p < PANELS; ++p) sum[p][r] += from[r * depth + channel] * target[p];
  }
  use.template tile<ROWS, PANELS>(row, at, sum);
}

template <int64_t PANELS, class W, class Use>
THRESHER_INLINE void use_panels(const W* rows, int64_t count, const Targets<W>& targets, int64_t at,
                                Use& use) {
  int64_t row = 0;
  for (; row + TILE_ROWS <= count; row += TILE_ROWS)
    use_tile<TILE_ROWS, PANELS>(rows, row, targets, at, use);
  for (; row < count; ++row) use_tile<1, PANELS>(rows, row, targets, at, use);
}

// Calls use.tile<ROWS, PANELS>(row, at, products) for all of at most BLOCK_ROWS consecutive rows, the
// panels of each row in order.
template <class W, class Use>
THRESHER_INLINE void use_products(const W* rows, int64_t count, const Targets<W>& targets, Use& use) {
  int64_t panel = 0;
  if (two_panels_fit())
    for (; panel + 2 <= targets.panels; panel += 2) use_panels<2>(rows, count, targets, panel, use);
  for (; panel < targets.panels; ++panel) use_panels<1>(rows, count, targets, panel, use);
}

}  // namespace thresher
