#include "cpu/multiply.h"

#include "cpu/tile.h"

namespace thresher {
namespace {

constexpr int64_t CHUNK = 16;  // rows of a panel between two fetches
constexpr int64_t AHEAD = 64;  // rows between what is read and what is fetched of the first panel

inline int64_t tiles_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }

// Fetches all matrices in the order in which they will be read, a few rows with every chunk that is
// multiplied: as many that large products make up for the small ones, which could not wait for theirs.
template <class I, class S>
class Fetcher {
 public:
  Fetcher(const Multiplication<S>* products, int64_t count, bool more)
      : product_(products), last_(products + count - (more ? 0 : 1)), due_(0) {
    int64_t chunks = 1, rows = 0;
    for (int64_t i = 0; i < count; ++i)
      chunks += tiles_of(products[i].rows, MOST_ROWS<I>) * PANELS * (products[i].depth / CHUNK);
    for (const Multiplication<S>* of = products + 1; of <= last_; ++of) rows += of->depth * PANELS;
    rate_ = (rows << FRACTION) / chunks + 1;
    begin(AHEAD);
    first_ = left_;
  }

  THRESHER_INLINE void step() {
    if (first_ > 0) {  // it may be that nobody has fetched the first one
      const int64_t count = CHUNK < left_ ? CHUNK : left_;
      first_ -= count;
      fetch(count);
      return;
    }
    for (due_ += rate_; due_ >> FRACTION;) {
      if (left_ == 0 && product_ < last_) {
        ++product_;
        begin(0);
      }
      const int64_t wanted = due_ >> FRACTION, count = wanted < left_ ? wanted : left_;
      if (count == 0) return;
      due_ -= count << FRACTION;
      fetch(count);
    }
  }

 private:
  static constexpr int64_t COLUMNS = TILE_COLUMNS<I, Wide<S>>, PANELS = BLOCK / COLUMNS;
  static constexpr int FRACTION = 16;  // bits

  void begin(int64_t row) {
    at_ = product_->matrix + row * COLUMNS;
    left_ = std::max<int64_t>(0, product_->depth * PANELS - row);
  }
  THRESHER_INLINE void fetch(int64_t count) {
    constexpr int64_t LINE = 64 / sizeof(S);
    left_ -= count;
    for (const S* end = at_ + count * COLUMNS; at_ < end; at_ += LINE) __builtin_prefetch(at_, 0, 2);
  }

  const Multiplication<S>*product_, *last_;
  const S* at_;
  int64_t left_;        // rows of this matrix's panels
  int64_t first_;       // of the first one's
  int64_t rate_, due_;  // rows with every chunk, and those that have not been fetched yet
};

// ROWS rows and a panel; `of` is a copy, which no store to y can change.
template <class I, int ROWS, class S>
THRESHER_INLINE void tile(Multiplication<S> of, int64_t row, int64_t from, Fetcher<I, S>& fetcher) {
  using W = Wide<S>;
  constexpr int64_t ONE = LANES<I, W>, COLUMNS = TILE_COLUMNS<I, W>;
  Tile<I, W, ROWS, VECTORS> sum = {};
  const W* x = of.x + row * of.x_stride;
  const S* panel = of.matrix + from * of.depth;
  const auto column = [&](int64_t i, int64_t v)
      THRESHER_INLINED { return load_wide<I>(panel + i * COLUMNS + v * ONE); };
  int64_t at = 0;
  for (; at + CHUNK <= of.depth; at += CHUNK, x += CHUNK, panel += CHUNK * COLUMNS) {
    fetcher.step();
    add_products<I, ROWS, VECTORS>(sum, x, of.x_stride, CHUNK, column);
  }
  add_products<I, ROWS, VECTORS>(sum, x, of.x_stride, of.depth - at, column);
  for (int64_t r = 0; r < ROWS; ++r) {
    W* to = of.y + (of.place ? of.place[row + r] : row + r) * of.y_stride + from;
    for (int64_t v = 0; v < VECTORS; ++v, to += ONE)
      store(to, (of.begin ? load_wide<I>(of.begin + from + v * ONE) : load<I>(to)) + sum[v][r]);
  }
}

// `count` rows from `row` on, at most MOST.
template <class I, int MOST, class S>
THRESHER_INLINE void some(const Multiplication<S>& of, int64_t row, int64_t count, Fetcher<I, S>& fetcher) {
  if (count == MOST)
    for (int64_t from = 0; from < BLOCK; from += TILE_COLUMNS<I, Wide<S>>) tile<I, MOST>(of, row, from, fetcher);
  else if constexpr (MOST > 1)
    some<I, MOST - 1>(of, row, count, fetcher);
}

// In tiles of about the same height, as a single row would take as long as several.
template <class I, class S>
THRESHER_INLINE void in_order(const Multiplication<S>* products, int64_t count, bool more) {
  constexpr int MOST = MOST_ROWS<I>;
  Fetcher<I, S> fetcher(products, count, more);
  for (const Multiplication<S>* of = products; of < products + count; ++of) {
    const int64_t tiles = tiles_of(of->rows, MOST);
    for (int64_t at = 0; at < tiles; ++at) {
      const int64_t begin = of->rows * at / tiles, end = of->rows * (at + 1) / tiles;
      some<I, MOST>(*of, begin, end - begin, fetcher);
    }
  }
}

}  // namespace

template <class S>
void multiply(const Multiplication<S>* products, int64_t count, bool more) {
  if (count == 0) return;
  dispatch([&](auto isa) THRESHER_INLINED { in_order<decltype(isa)>(products, count, more); });
}

#define THRESHER_INSTANTIATE(S) template void multiply<S>(const Multiplication<S>*, int64_t, bool)
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
