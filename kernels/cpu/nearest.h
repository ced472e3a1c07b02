// For each of many rows the most similar of many other rows, without the matrix of similarities.  The rows that are
// packed as targets are either those to be found or, where they are few, those that look for another.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/rows.h"

namespace thresher {

constexpr double EPSILON = 1e-12;  // a zero row gets similarity 0 to everything
constexpr double PADDING = 1e4;    // beyond every cosine

constexpr int64_t PAIR_ROWS = 96;  // rows that stay in the cache while the targets pass
constexpr int64_t PANEL = 16;  // a multiple of every vector's lanes
inline int64_t padded_to_panels(int64_t rows) { return (rows + PANEL - 1) / PANEL * PANEL; }

// Rows in panels: PANEL side by side, so that vectors hold a channel of several of them.
template <class W>
class Targets {
 public:
  Targets(Arena& arena, int64_t count, int64_t depth)
      : count(count), depth(depth), data_(arena.take<W>(padded() * depth)),
        limit_(arena.take<W>(padded())) {}

  // Stores a row; padding is found only where there is nothing else.
  void set(int64_t row, const W* values, bool padding) {
    W* at = place(row);
    for (int64_t channel = 0; channel < depth; ++channel) at[channel * PANEL] = values[channel];
    limit_[row] = padding ? W(-PADDING) : std::numeric_limits<W>::infinity();
  }
  // Fills the places behind the last row; they are never found.
  void close() {
    for (int64_t row = count; row < padded(); ++row) {
      W* at = place(row);
      for (int64_t channel = 0; channel < depth; ++channel) at[channel * PANEL] = 0;
      limit_[row] = -std::numeric_limits<W>::infinity();
    }
  }
  // The first channel of a row and those beside it; the next channel is PANEL further on.
  const W* column(int64_t row) const { return place(row); }
  const W* limit(int64_t row) const { return limit_ + row; }
  // How many rows fill the panels.
  int64_t padded() const { return padded_to_panels(count); }

  const int64_t count, depth;

 private:
  W* place(int64_t row) const { return data_ + row / PANEL * depth * PANEL + row % PANEL; }

  W* data_;
  W* limit_;
};

// The sum of `count` rows `stride` apart, of `width` elements, divided by its length, or by `least` where
// that is more.
template <class T>
void unit_sum(Wide<T>* to, const T* from, int64_t count, int64_t stride, int64_t width, Wide<T> least) {
  using W = Wide<T>;
  dispatch([&](auto isa) THRESHER_INLINED {
    using I = decltype(isa);
    Vector<I, W> squares = {};
    int64_t i = 0;
    for (; i + LANES<I, W> <= width; i += LANES<I, W>) {
      Vector<I, W> sum = load_wide<I>(from + i);
      for (int64_t row = 1; row < count; ++row) sum += load_wide<I>(from + row * stride + i);
      store(to + i, sum);
      squares += sum * sum;
    }
    W total = lane_sum(squares);
    for (; i < width; ++i) {
      W sum = widen(from[i]);
      for (int64_t row = 1; row < count; ++row) sum += widen(from[row * stride + i]);
      to[i] = sum;
      total += sum * sum;
    }
    const W length = std::sqrt(total), inverse = 1 / (length > least ? length : least);
    for (i = 0; i < width; ++i) to[i] *= inverse;
  });
}

// A row as a unit vector.
template <class T>
void unit_row(Wide<T>* to, const T* from, int64_t width) {
  unit_sum(to, from, 1, 0, width, static_cast<Wide<T>>(EPSILON));
}

// For `rows` consecutive rows of `depth` values: the largest product with a target, and which target
// that is; of equal ones the first.  There must be a target.
template <class W>
void nearest(const W* rows, int64_t count, const Targets<W>& targets, W* best, int64_t* into);

// Numbers of rows beside values of W in vectors.
template <class W>
using Number = std::conditional_t<sizeof(W) == sizeof(int32_t), int32_t, int64_t>;

// The other way round: for each target the largest product with one of at most PAIR_ROWS consecutive rows, and which
// row that is, counted from `first`; of equal ones the first.  `limit` is the most that each row may count for:
// -PADDING for padding, else infinity.  `best` and `into` fill the targets' panels; what is better already stays.
template <class W>
void nearest_rows(const W* rows, const W* limit, int64_t first, int64_t count, const Targets<W>& targets, W* best,
                  Number<W>* into);

// As `nearest` for `count` rows of each item of a batch, of which `first(item)` is the first, in parts of
// at least `grain` rows; `best` and `into` are [batch, count].
template <class W, class First>
void nearest_by_item(const Context& context, int64_t count, int64_t grain, const First& first,
                     const std::vector<Targets<W>>& targets, W* best, int64_t* into) {
  const int64_t batch = static_cast<int64_t>(targets.size());
  parallel_by_item(context, batch, count, grain, [&](int64_t item, int64_t row, int64_t size) {
    const int64_t at = item * count + row;
    nearest(first(item) + row * targets[item].depth, size, targets[item], best + at, into + at);
  });
}

}  // namespace thresher
