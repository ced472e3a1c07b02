// Products of a few rows with a few vectors of columns, summed in registers.
#pragma once

#include "cpu/numeric.h"

namespace thresher {

// Whether sums of twelve rows by two vectors fit: each value of a row is then read once for both.
inline bool many_registers() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return found;
#else
  return false;
#endif
}

// sum[p][r] += rows[r][i] * column(i, p) for i in [0, depth); rows lie `stride` apart.
template <int ROWS, int PANELS, class W, class Column>
THRESHER_INLINE void add_products(Vector<W> (&sum)[PANELS][ROWS], const W* rows, int64_t stride,
                                  int64_t depth, const Column& column) {
  for (int64_t i = 0; i < depth; ++i) {
    Vector<W> at[PANELS];
    for (int64_t p = 0; p < PANELS; ++p) at[p] = column(i, p);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t p = 0; p < PANELS; ++p) sum[p][r] += rows[r * stride + i] * at[p];
  }
}

}  // namespace thresher
