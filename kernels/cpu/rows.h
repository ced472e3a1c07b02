// Rows of tokens: copied as they are, or summed in the wide type.
#pragma once

#include <cstring>

#include "cpu/kernel.h"

namespace thresher {

constexpr int64_t ROW_BYTES = 1 << 16;  // of rows that are worth a thread of their own

// How many rows of `width` elements make a part of parallel work.
template <class T>
int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, ROW_BYTES / std::max<int64_t>(1, width * int64_t{sizeof(T)}));
}

template <class T>
THRESHER_INLINE void copy_row(T* to, const T* from, int64_t width) {
  std::memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// sum = weight * row
template <class T>
THRESHER_INLINE void begin_sum(Wide<T>* sum, Wide<T> weight, const T* row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] = weight * widen(row[i]);
}
// sum += weight * row
template <class T>
THRESHER_INLINE void add_to_sum(Wide<T>* sum, Wide<T> weight, const T* row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += weight * widen(row[i]);
}
template <class T>
THRESHER_INLINE void end_sum(T* to, const Wide<T>* sum, int64_t width) {
  for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(sum[i]);
}

// The tokens of a node: [batch, tokens, width].
template <class T>
struct Stream {
  explicit Stream(const Tensor<T>& x)
      : batch(x.shape.size() == 3 ? x.shape[0] : 0), tokens(x.shape.size() == 3 ? x.shape[1] : 0),
        width(x.shape.size() == 3 ? x.shape[2] : 0), data(x.data) {
    demand(x.shape.size() == 3, "x is [B, N, C]", x.shape);
  }
  const T* row(int64_t item, int64_t token) const { return data + (item * tokens + token) * width; }

  const int64_t batch, tokens, width;
  const T* const data;
};

// Calls body(item, first, count) in parallel on parts of at least `grain` of the `rows` rows of each item.
template <class Body>
void parallel_by_item(const Context& context, int64_t batch, int64_t rows, int64_t grain,
                      const Body& body) {
  context.parallel(batch * rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t item = begin / rows, count = std::min(end, (item + 1) * rows) - begin;
      body(item, begin % rows, count);
      begin += count;
    }
  });
}

// A token and what it is ranked by.
struct Ranked {
  uint64_t key;
  int64_t index;
};
// The higher key first; of equal ones the lower index.
THRESHER_INLINE bool operator<(const Ranked& a, const Ranked& b) {
  return a.key != b.key ? a.key > b.key : a.index < b.index;
}
THRESHER_INLINE bool by_index(const Ranked& a, const Ranked& b) { return a.index < b.index; }

}  // namespace thresher
