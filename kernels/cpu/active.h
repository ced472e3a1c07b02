// Products of few tokens that skip the rows of a matrix which no token needs.
#pragma once

#include <cmath>

#include "cpu/arena.h"
#include "cpu/kernel.h"

namespace thresher {

constexpr int64_t MOST_TOKENS = 8;  // at a time: with more the union of what they need fills up

// Whether |x| is at most the threshold, which NaN is not.
template <class T>
THRESHER_INLINE bool small(T x, float threshold) {
  return std::fabs(static_cast<float>(widen(x))) <= threshold;
}

// Tokens side by side: 1, 2, 4 or MOST_TOKENS of them.
inline int64_t side_by_side(int64_t tokens) { return tokens < 3 ? tokens : tokens < 5 ? 4 : 8; }

// The channels that some token keeps, in order.
template <class W>
struct Active {
  int64_t tokens, count;
  int64_t* index;  // [count]
  W* value;        // [count, side_by_side(tokens)], 0 where a token itself drops the channel
};

// Of x [tokens, width], at most MOST_TOKENS; without thresholds every channel is active.
template <class T>
Active<Wide<T>> active(Arena& arena, const T* x, const float* threshold, int64_t tokens,
                       int64_t width) {
  const int64_t step = side_by_side(tokens);
  Active<Wide<T>> found{tokens, 0, arena.take<int64_t>(width), arena.take<Wide<T>>(width * step)};
  if (tokens == 1) {
    for (int64_t i = 0; i < width; ++i) {  // no branch: which are kept cannot be foreseen
      found.index[found.count] = i;
      found.value[found.count] = widen(x[i]);
      found.count += !(threshold && small(x[i], threshold[i]));
    }
    return found;
  }
  for (int64_t i = 0; i < width; ++i) {
    bool used = false;
    for (int64_t token = 0; token < step; ++token) {
      const bool kept = token < tokens && !(threshold && small(x[token * width + i], threshold[i]));
      found.value[found.count * step + token] = kept ? widen(x[token * width + i]) : 0;
      used |= kept;
    }
    found.index[found.count] = i;
    found.count += used;
  }
  return found;
}

// [side_by_side(tokens), columns]: the sum of the active rows of `matrix` [width, columns], each times
// its value.  The memory is the arena's.
template <class S>
Wide<S>* sum_of_rows(const Context& context, Arena& arena, const Active<Wide<S>>& channels,
                     const S* matrix, int64_t columns);

// Multiplies each value by the product of its token in x [tokens, width] with the active row of
// `matrix` [.., width].
template <class S>
void times_products(const Context& context, const Active<Wide<S>>& channels, const S* matrix,
                    const Wide<S>* x, int64_t width);

}  // namespace thresher
