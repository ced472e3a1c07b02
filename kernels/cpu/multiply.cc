#include "cpu/multiply.h"

#include "cpu/tile.h"

namespace thresher {
namespace {

constexpr int64_t CHUNK = 16;  // rows of a matrix between two fetches
constexpr int64_t AHEAD = 64;  // rows between what is read and what is fetched of the first matrix

template <class S>
int64_t chunks_of(const Multiplication<S>& of, int64_t rows, int64_t panels) {
  const int64_t columns = panels * LANES;
  return (of.rows + rows - 1) / rows * ((of.matrix.width + columns - 1) / columns) *
         (of.matrix.depth / CHUNK);
}

// Fetches all matrices in the order in which they will be read, a few rows with every chunk that is
// multiplied: as many that large products make up for the small ones, which could not wait for theirs.
template <class S>
class Fetcher {
 public:
  Fetcher(const Multiplication<S>* products, int64_t count, int64_t rows, int64_t panels)
      : product_(products), last_(products + count - 1), left_(0), rows_(0), chunks_(1), due_(0) {
    for (int64_t i = 0; i < count; ++i) {
      chunks_ += chunks_of(products[i], rows, panels);
      if (i > 0) rows_ += products[i].matrix.depth;
    }
    begin(AHEAD);
    first_ = left_;
  }

  THRESHER_INLINE void step() {
    if (first_ > 0) {  // nobody has fetched the first one
      const int64_t count = CHUNK < left_ ? CHUNK : left_;
      first_ -= count;
      fetch(count);
      return;
    }
    for (due_ += rows_; due_ >= chunks_;) {
      if (left_ == 0 && product_ < last_) {
        ++product_;
        begin(0);
      }
      const int64_t wanted = due_ / chunks_, count = wanted < left_ ? wanted : left_;
      if (count == 0) return;
      due_ -= count * chunks_;
      fetch(count);
    }
  }

 private:
  void begin(int64_t row) {
    const Columns<S>& matrix = product_->matrix;
    at_ = matrix.data + row * matrix.stride;
    stride_ = matrix.stride;
    left_ = std::max<int64_t>(0, matrix.depth - row);
  }
  THRESHER_INLINE void fetch(int64_t count) {
    constexpr int64_t LINE = 64 / sizeof(S);
    left_ -= count;
    for (int64_t i = 0; i < count; ++i, at_ += stride_)
      for (int64_t column = 0; column < BLOCK; column += LINE)
        __builtin_prefetch(at_ + column, 0, 2);
  }

  const Multiplication<S>*product_, *last_;
  const S* at_;
  int64_t stride_, left_;         // rows of this matrix
  int64_t first_;                 // of the first one
  int64_t rows_, chunks_, due_;  // of all; `due_` is in rows times chunks
};

// The first `count` of LANES columns; zeros for the others.
template <class S>
THRESHER_INLINE Vector<Wide<S>> load_some(const S* from, int64_t count) {
  S held[LANES] = {};
  std::memcpy(held, from, static_cast<size_t>(count) * sizeof(S));
  return load_wide(held);
}

// ROWS rows by PANELS vectors of columns; if not WHOLE, by the last columns, which fill no vector.
template <class S, int ROWS, int PANELS, bool WHOLE>
THRESHER_INLINE void tile(const Multiplication<S>& of, int64_t row, int64_t from,
                          Fetcher<S>& fetcher) {
  using W = Wide<S>;
  const int64_t depth = of.matrix.depth, stride = of.matrix.stride, some = of.matrix.width - from;
  Vector<W> sum[PANELS][ROWS] = {};
  const W* x = of.x + row * depth;
  const S* columns = of.matrix.data + from;
  const auto column = [&](int64_t i, int64_t p) __attribute__((always_inline)) {
    if constexpr (WHOLE) return load_wide(columns + i * stride + p * LANES);
    return load_some(columns + i * stride, some);
  };
  int64_t at = 0;
  for (; at + CHUNK <= depth; at += CHUNK, x += CHUNK, columns += CHUNK * stride) {
    fetcher.step();
    add_products<ROWS, PANELS>(sum, x, depth, CHUNK, column);
  }
  add_products<ROWS, PANELS>(sum, x, depth, depth - at, column);
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t p = 0; p < PANELS; ++p) {
      const int64_t place = of.place ? of.place[row + r] : row + r;
      W* to = of.y + place * of.stride + from + p * LANES;
      if constexpr (WHOLE)
        store(to, load(to) + sum[p][r]);
      else
        for (int64_t i = 0; i < some; ++i) to[i] += sum[p][r][i];
    }
}

// The rows from `row` on, ROWS at a time and then fewer.
template <class S, int ROWS, int PANELS, bool WHOLE>
THRESHER_INLINE void down(const Multiplication<S>& of, int64_t row, int64_t from,
                          Fetcher<S>& fetcher) {
  for (; row + ROWS <= of.rows; row += ROWS) tile<S, ROWS, PANELS, WHOLE>(of, row, from, fetcher);
  if constexpr (ROWS > 1) down<S, ROWS / 2, PANELS, WHOLE>(of, row, from, fetcher);
}

template <class S, int ROWS, int PANELS>
THRESHER_INLINE void in_order(const Multiplication<S>* products, int64_t count) {
  Fetcher<S> fetcher(products, count, ROWS, PANELS);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t width = products[i].matrix.width;
    int64_t from = 0;
    for (; from + PANELS * LANES <= width; from += PANELS * LANES)
      down<S, ROWS, PANELS, true>(products[i], 0, from, fetcher);
    for (; from + LANES <= width; from += LANES)
      down<S, ROWS, 1, true>(products[i], 0, from, fetcher);
    if (from < width) down<S, 1, 1, false>(products[i], 0, from, fetcher);
  }
}

template <class S>
THRESHER_VECTORISED void multiply_all(const Multiplication<S>* products, int64_t count) {
  if (sizeof(Wide<S>) == sizeof(float) && many_registers())
    in_order<S, 12, 2>(products, count);
  else
    in_order<S, 6, 1>(products, count);
}

}  // namespace

template <class S>
void multiply(const Multiplication<S>* products, int64_t count) {
  if (count > 0) multiply_all(products, count);
}

#define THRESHER_INSTANTIATE(S) template void multiply<S>(const Multiplication<S>*, int64_t)
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
