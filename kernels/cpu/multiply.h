// Rows times matrices that stay as they lie: few rows or many, at any places of the result.
#pragma once

#include <algorithm>

#include "cpu/numeric.h"

namespace thresher {

constexpr int64_t BLOCK = 2 * LANES;  // columns that are multiplied together

inline int64_t blocks_of(int64_t width) { return (width + BLOCK - 1) / BLOCK; }

// Some columns, at most BLOCK, of a matrix whose rows are `stride` elements apart.
template <class S>
struct Columns {
  // The block of this number of a matrix [depth, stride].
  Columns(const S* matrix, int64_t depth, int64_t stride, int64_t block)
      : data(matrix + block * BLOCK), depth(depth), stride(stride),
        width(std::min(BLOCK, stride - block * BLOCK)) {}

  const S* data;
  int64_t depth, stride, width;
};

// y[r] += x[r] * matrix for consecutive rows of x.
template <class S>
struct Multiplication {
  const Wide<S>* x;  // [rows, depth]
  int64_t rows;
  Columns<S> matrix;
  Wide<S>* y;
  int64_t stride;        // between rows of y
  const int64_t* place;  // of each row in y; null: in order
};

// All of them, one after another; each one's matrix is fetched during the one before, so that small
// products do not wait for the memory.  What is added to a row does not depend on the other rows.
template <class S>
void multiply(const Multiplication<S>* products, int64_t count);

}  // namespace thresher
