#include "cpu/multiply.h"

#include "cpu/tile.h"

namespace thresher {
namespace {

constexpr int64_t CHUNK = 16;  // rows of a matrix between two fetches
constexpr int64_t AHEAD = 64;  // rows between what is read and what is fetched of the first matrix

inline int64_t tiles_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }

// Fetches all matrices in the order in which they will be read, a few rows with every chunk that is
// multiplied: as many that large products make up for the small ones, which could not wait for theirs.
template <class S>
class Fetcher {
 public:
  // Products are made in tiles of at most `rows` rows and `columns` columns.
  Fetcher(const Multiplication<S>* products, int64_t count, int64_t rows, int64_t columns)
      : product_(products), last_(products + count - 1), rows_(0), chunks_(1), due_(0) {
    for (int64_t i = 0; i < count; ++i) {
      chunks_ += tiles_of(products[i].rows, rows) * (BLOCK / columns) * (products[i].depth / CHUNK);
      if (i > 0) rows_ += products[i].depth;
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
    at_ = product_->matrix + row * BLOCK;
    left_ = std::max<int64_t>(0, product_->depth - row);
  }
  THRESHER_INLINE void fetch(int64_t count) {
    constexpr int64_t LINE = 64 / sizeof(S);
    left_ -= count;
    for (const S* end = at_ + count * BLOCK; at_ < end; at_ += LINE) __builtin_prefetch(at_, 0, 2);
  }

  const Multiplication<S>*product_, *last_;
  const S* at_;
  int64_t left_;                 // rows of this matrix
  int64_t first_;                // of the first one
  int64_t rows_, chunks_, due_;  // of all; `due_` is in rows times chunks
};

// ROWS rows by PANELS vectors of columns.
template <class S, int ROWS, int PANELS>
THRESHER_INLINE void tile(const Multiplication<S>& of, int64_t row, int64_t from,
                          Fetcher<S>& fetcher) {
  using W = Wide<S>;
  Vector<W> sum[PANELS][ROWS] = {};
  const W* x = of.x + row * of.x_stride;
  const S* columns = of.matrix + from;
  const auto column = [&](int64_t i, int64_t p)
      __attribute__((always_inline)) { return load_wide(columns + i * BLOCK + p * LANES); };
  int64_t at = 0;
  for (; at + CHUNK <= of.depth; at += CHUNK, x += CHUNK, columns += CHUNK * BLOCK) {
    fetcher.step();
    add_products<ROWS, PANELS>(sum, x, of.x_stride, CHUNK, column);
  }
  add_products<ROWS, PANELS>(sum, x, of.x_stride, of.depth - at, column);
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t p = 0; p < PANELS; ++p) {
      const int64_t place = of.place ? of.place[row + r] : row + r, column = from + p * LANES;
      W* to = of.y + place * of.y_stride + column;
      store(to, (of.begin ? load_wide(of.begin + column) : load(to)) + sum[p][r]);
    }
}

// `count` rows from `row` on, at most MOST.
template <class S, int MOST, int PANELS>
THRESHER_INLINE void some(const Multiplication<S>& of, int64_t row, int64_t count, int64_t from,
                          Fetcher<S>& fetcher) {
  if (count == MOST)
    tile<S, MOST, PANELS>(of, row, from, fetcher);
  else if constexpr (MOST > 1)
    some<S, MOST - 1, PANELS>(of, row, count, from, fetcher);
}

// In tiles of about the same height, as a single row would take as long as several.
template <class S, int MOST, int PANELS>
THRESHER_INLINE void in_order(const Multiplication<S>* products, int64_t count) {
  Fetcher<S> fetcher(products, count, MOST, PANELS * LANES);
  for (const Multiplication<S>* of = products; of < products + count; ++of) {
    const int64_t tiles = tiles_of(of->rows, MOST);
    for (int64_t from = 0; from < BLOCK; from += PANELS * LANES)
      for (int64_t at = 0; at < tiles; ++at) {
        const int64_t begin = of->rows * at / tiles, end = of->rows * (at + 1) / tiles;
        some<S, MOST, PANELS>(*of, begin, end - begin, from, fetcher);
      }
  }
}

template <class S>
THRESHER_MANY_REGISTERS void by_high_tiles(const Multiplication<S>* products, int64_t count) {
  in_order<S, 12, 2>(products, count);
}
template <class S>
THRESHER_VECTORISED void by_low_tiles(const Multiplication<S>* products, int64_t count) {
  in_order<S, 6, 1>(products, count);
}

}  // namespace

template <class S>
void multiply(const Multiplication<S>* products, int64_t count) {
  if (count == 0) return;
  if constexpr (sizeof(Wide<S>) == sizeof(float))
    if (many_registers()) return by_high_tiles(products, count);
  by_low_tiles(products, count);
}

#define THRESHER_INSTANTIATE(S) template void multiply<S>(const Multiplication<S>*, int64_t)
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
