// For each of many rows the most similar of many other rows, without the matrix of similarities.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/rows.h"

namespace thresher {

constexpr double EPSILON = 1e-12;  // a zero row gets similarity 0 to everything
constexpr double PADDING = 1e4;    // beyond every cosine

// Rows to be found: sixteen side by side, so that one vector holds a channel of all of them.
template <class W>
class Targets {
 public:
  Targets(Arena& arena, int64_t count, int64_t depth)
      : count(count), depth(depth), panels((count + LANES - 1) / LANES),
        data_(arena.take<W>(panels * depth * LANES)), limit_(arena.take<W>(panels * LANES)) {}

  // Stores a row; padding is found only where there is nothing else.
  void set(int64_t row, const W* values, bool padding) {
    W* at = data_ + row / LANES * depth * LANES + row % LANES;
    for (int64_t channel = 0; channel < depth; ++channel) at[channel * LANES] = values[channel];
    limit_[row] = padding ? W(-PADDING) : std::numeric_limits<W>::infinity();
  }
  // Fills the lanes behind the last row; they are never found.
  void close() {
    for (int64_t row = count; row < panels * LANES; ++row) {
      W* at = data_ + row / LANES * depth * LANES + row % LANES;
      for (int64_t channel = 0; channel < depth; ++channel) at[channel * LANES] = 0;
      limit_[row] = -std::numeric_limits<W>::infinity();
    }
  }
  const W* panel(int64_t index) const { return data_ + index * depth * LANES; }
  const W* limit(int64_t index) const { return limit_ + index * LANES; }

  const int64_t count, depth, panels;

 private:
  W* data_;
  W* limit_;
};

// The sum of `count` rows `stride` apart, of `width` elements, divided by its length, or by `least` where
// that is more; inlined into what is compiled for several instruction sets.
template <class T>
THRESHER_INLINE void unit_sum(Wide<T>* to, const T* from, int64_t count, int64_t stride, int64_t width,
                              Wide<T> least) {
  using W = Wide<T>;
  Vector<W> squares = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Vector<W> sum = load_wide(from + i);
    for (int64_t row = 1; row < count; ++row) sum += load_wide(from + row * stride + i);
    store(to + i, sum);
    squares += sum * sum;
  }
  W total = lane_sum<W>(squares);
  for (; i < width; ++i) {
    W sum = widen(from[i]);
    for (int64_t row = 1; row < count; ++row) sum += widen(from[row * stride + i]);
    to[i] = sum;
    total += sum * sum;
  }
  const W length = std::sqrt(total), inverse = 1 / (length > least ? length : least);
  for (i = 0; i < width; ++i) to[i] *= inverse;
}

// For `rows` consecutive rows of `depth` values: the largest product with a target, and which target
// that is; of equal ones the first.  There must be a target.
void nearest(const float* rows, int64_t count, const Targets<float>& targets, float* best,
             int64_t* into);
void nearest(const double* rows, int64_t count, const Targets<double>& targets, double* best,
             int64_t* into);

// The same for `count` rows of each item of a batch, of which `first(item)` is the first, in parts of
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
