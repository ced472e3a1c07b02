// Rows times packed matrices: few rows or many, at any places of the result.
#pragma once

#include "cpu/packed.h"

namespace thresher {

// y[r] = begin + x[r] * matrix for consecutive rows of x; without `begin`, y[r] += x[r] * matrix.
template <class S>
struct Multiplication {
  const Wide<S>* x;
  int64_t x_stride, rows;
  const S* matrix;  // a block of Packed
  int64_t depth;
  const S* begin;  // [BLOCK], or null
  Wide<S>* y;      // BLOCK columns
  int64_t y_stride;
  const int64_t* place;  // of each row in y; null: in order
};

// All of them, one after another; each one's matrix is fetched during the one before, so that small
// products do not wait for the memory; with `more`, so is that of another one behind them, which this thread is
// likely to be given next.  What a row comes to does not depend on the other rows.
template <class S>
void multiply(const Multiplication<S>* products, int64_t count, bool more);

}  // namespace thresher
