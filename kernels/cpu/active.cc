#include "cpu/active.h"

namespace thresher {
namespace {

constexpr int64_t PANEL = 8192;         // sums that stay in the first cache
constexpr int64_t PART_BYTES = 1 << 17;  // of rows that are worth a thread of their own
constexpr int64_t MOST_PARTS = 8;
constexpr int64_t SIDE_BY_SIDE = 8;  // rows of one token that are read together
constexpr int64_t AHEAD = 2048;  // bytes between what is read and what is fetched
constexpr int64_t STEP = 16;     // columns between two fetches: a line of a cache in float32, and whole vectors

// Rows that are read side by side.
template <class S, int ROWS>
struct Rows {
  const S* at[ROWS];
};

// Into the second cache: the first has too few misses in flight to keep the memory busy.
THRESHER_INLINE void fetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Calls body(i) for [0, width) in steps of vectors and fetches what comes AHEAD: at first of these
// rows, at last of the `next`.  Returns the first element that fills no step.
template <class I, class S, int ROWS, class Body>
THRESHER_INLINE int64_t along(const Rows<S, ROWS>& rows, const Rows<S, ROWS>& next, int64_t width,
                              const Body& body) {
  constexpr int64_t ONE = LANES<I, Wide<S>>;
  const int64_t whole = width / STEP * STEP;
  const int64_t turn = std::max<int64_t>(0, whole - AHEAD / int64_t{sizeof(S)});
  int64_t i = 0;
  for (const bool own : {true, false}) {
    uintptr_t ahead[ROWS];
    for (int r = 0; r < ROWS; ++r)
      ahead[r] = own ? reinterpret_cast<uintptr_t>(rows.at[r]) + AHEAD
                     : reinterpret_cast<uintptr_t>(next.at[r]) - turn * sizeof(S);
    for (const int64_t end = own ? turn : whole; i < end; i += STEP) {
      for (int r = 0; r < ROWS; ++r) fetch(ahead[r] + static_cast<uintptr_t>(i) * sizeof(S));
      for (int64_t at = i; at < i + STEP; at += ONE) body(at);
    }
  }
  return whole;
}

// sum[token] += value[row][token] * row, for ROWS rows and TOKENS of `stacked` tokens.
template <class I, class S, int ROWS, int TOKENS>
THRESHER_INLINE void add_rows(Wide<S>* sum, int64_t stride, const Rows<S, ROWS>& rows,
                              const Rows<S, ROWS>& next, const Wide<S>* values, int64_t stacked,
                              int64_t width) {
  using W = Wide<S>;
  W value[ROWS * TOKENS];
  for (int r = 0; r < ROWS; ++r)
    for (int token = 0; token < TOKENS; ++token)
      value[r * TOKENS + token] = values[r * stacked + token];
  int64_t i = along<I>(rows, next, width, [&](int64_t at) THRESHER_INLINED {
    Vector<I, W> row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = load_wide<I>(rows.at[r] + at);
    for (int token = 0; token < TOKENS; ++token) {
      Vector<I, W> total = load<I>(sum + token * stride + at);
      for (int r = 0; r < ROWS; ++r) total += value[r * TOKENS + token] * row[r];
      store(sum + token * stride + at, total);
    }
  });
  for (; i < width; ++i)
    for (int token = 0; token < TOKENS; ++token)
      for (int r = 0; r < ROWS; ++r)
        sum[token * stride + i] += value[r * TOKENS + token] * widen(rows.at[r][i]);
}

// The same for the active rows [begin, end), columns [0, width) from `matrix` on, all tokens.
template <class I, int TOKENS, class S>
THRESHER_INLINE void add_active(Wide<S>* sum, int64_t stride, const Active<Wide<S>>& channels,
                                int64_t begin, int64_t end, const S* matrix, int64_t columns,
                                int64_t width) {
  constexpr int ROWS = TOKENS == 1 ? SIDE_BY_SIDE : 4;  // more streams keep the memory busier
  const int64_t stacked = side_by_side(channels.tokens);
  const auto row = [&](int64_t at) {
    return matrix + channels.index[at < end ? at : end - 1] * columns;
  };
  for (int64_t token = 0; token < stacked; ++token)
    std::fill(sum + token * stride, sum + token * stride + width, Wide<S>(0));
  int64_t at = begin;
  for (; at + ROWS <= end; at += ROWS) {
    Rows<S, ROWS> rows, next;
    for (int r = 0; r < ROWS; ++r) rows.at[r] = row(at + r), next.at[r] = row(at + ROWS + r);
    for (int64_t token = 0; token < stacked; token += TOKENS)
      add_rows<I, S, ROWS, TOKENS>(sum + token * stride, stride, rows, next,
                                   channels.value + at * stacked + token, stacked, width);
  }
  for (; at < end; ++at)
    for (int64_t token = 0; token < stacked; token += TOKENS)
      add_rows<I, S, 1, TOKENS>(sum + token * stride, stride, {{row(at)}}, {{row(at + 1)}},
                                channels.value + at * stacked + token, stacked, width);
}

template <class S>
void add_active(Wide<S>* sum, int64_t stride, const Active<Wide<S>>& channels, int64_t begin,
                int64_t end, const S* matrix, int64_t columns, int64_t width) {
  const auto add = [&](auto tokens) {
    dispatch([&](auto isa) THRESHER_INLINED {
      add_active<decltype(isa), tokens()>(sum, stride, channels, begin, end, matrix, columns, width);
    });
  };
  if (channels.tokens == 1) return add(std::integral_constant<int, 1>{});
  if (channels.tokens == 2) return add(std::integral_constant<int, 2>{});
  add(std::integral_constant<int, 4>{});
}

// sums[0] += sums[1] + ... , each of so many columns.
template <class W>
void add_parts(W* sums, int64_t parts, int64_t size) {
  dispatch([&](auto) THRESHER_INLINED {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  });
}

// As many parts as are worth a thread, and a power of two, so that threads have equally much to do.
int64_t parts_of(int64_t bytes) {
  int64_t parts = 1;
  while (parts < MOST_PARTS && 2 * parts * PART_BYTES <= bytes) parts *= 2;
  return parts;
}

// to[r] = row[r] . x
template <class I, class S, int ROWS>
THRESHER_INLINE void dots(Wide<S>* to, const Rows<S, ROWS>& rows, const Rows<S, ROWS>& next,
                          const Wide<S>* x, int64_t width) {
  using W = Wide<S>;
  Vector<I, W> sums[ROWS] = {};
  int64_t i = along<I>(rows, next, width, [&](int64_t at) THRESHER_INLINED {
    const Vector<I, W> part = load<I>(x + at);
    for (int r = 0; r < ROWS; ++r) sums[r] += part * load_wide<I>(rows.at[r] + at);
  });
  for (int r = 0; r < ROWS; ++r) {
    to[r] = lane_sum(sums[r]);
    for (int64_t rest = i; rest < width; ++rest) to[r] += x[rest] * widen(rows.at[r][rest]);
  }
}

template <class I, class S>
THRESHER_INLINE void times_active(const Active<Wide<S>>& channels, int64_t begin, int64_t end, const S* matrix,
                                  const Wide<S>* x, int64_t width) {
  constexpr int ROWS = 8;
  const int64_t step = side_by_side(channels.tokens);
  const auto row = [&](int64_t at) {
    return matrix + channels.index[at < end ? at : end - 1] * width;
  };
  for (int64_t at = begin; at < end; at += ROWS) {
    Rows<S, ROWS> rows, next;
    for (int r = 0; r < ROWS; ++r) rows.at[r] = row(at + r), next.at[r] = row(at + ROWS + r);
    const int64_t count = std::min<int64_t>(ROWS, end - at);
    for (int64_t token = 0; token < channels.tokens; ++token) {
      Wide<S> product[ROWS];
      dots<I, S, ROWS>(product, rows, next, x + token * width, width);
      for (int64_t r = 0; r < count; ++r) {
        Wide<S>& value = channels.value[(at + r) * step + token];
        value = value != 0 ? value * product[r] : 0;  // a dropped neuron's product may overflow
      }
    }
  }
}

}  // namespace

template <class S>
Wide<S>* sum_of_rows(const Context& context, Arena& arena, const Active<Wide<S>>& channels,
                     const S* matrix, int64_t columns) {
  const int64_t stacked = side_by_side(channels.tokens), size = stacked * columns;
  const int64_t most = PANEL / stacked, panels = (columns + most - 1) / most;
  // Of one width, as parts of a row's length would keep one thread longer than the others.
  const int64_t even = (columns + std::max<int64_t>(panels, 1) - 1) / std::max<int64_t>(panels, 1);
  const int64_t panel = (even + STEP - 1) / STEP * STEP;
  const int64_t bytes = channels.count * columns * int64_t{sizeof(S)};
  const int64_t worth = parts_of(bytes);
  // Narrow matrices are split by rows too; sums do not depend on the number of threads.
  const int64_t splits = std::max<int64_t>(1, worth / std::max<int64_t>(panels, 1));
  const int64_t bundles = channels.count / SIDE_BY_SIDE;  // only the last part has single rows
  const auto row = [&](int64_t split) {
    return split < splits ? bundles * split / splits * SIDE_BY_SIDE : channels.count;
  };
  Wide<S>* sums = arena.take<Wide<S>>(splits * size);
  const int64_t tasks = panels * splits;
  context.parallel(tasks, worth < 2 ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / panels, from = task % panels * panel;
      add_active(sums + split * size + from, columns, channels, row(split), row(split + 1),
                 matrix + from, columns, std::min(panel, columns - from));
    }
  });
  add_parts(sums, splits, size);
  return sums;
}

template <class S>
void times_products(const Context& context, const Active<Wide<S>>& channels, const S* matrix,
                    const Wide<S>* x, int64_t width) {
  const int64_t row = std::max<int64_t>(1, width * int64_t{sizeof(S)});
  context.parallel(channels.count, channels.count / parts_of(channels.count * row),
                   [&](int64_t begin, int64_t end) {
                     dispatch([&](auto isa) THRESHER_INLINED {
                       times_active<decltype(isa)>(channels, begin, end, matrix, x, width);
                     });
                   });
}

#define THRESHER_INSTANTIATE(S)                                                                  \
  template Wide<S>* sum_of_rows<S>(const Context&, Arena&, const Active<Wide<S>>&, const S*,     \
                                   int64_t);                                                     \
  template void times_products<S>(const Context&, const Active<Wide<S>>&, const S*,              \
                                  const Wide<S>*, int64_t)
THRESHER_INSTANTIATE(float);
THRESHER_INSTANTIATE(Half);
THRESHER_INSTANTIATE(BFloat16);
THRESHER_INSTANTIATE(double);

}  // namespace thresher
