// Tokens that join others: what they are matched by, who joins whom, and the rows that become of it.
#pragma once

#include "cpu/arena.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"

namespace thresher {

constexpr int64_t KEY_GRAIN = 64;    // tokens whose keys are worth a thread
constexpr int64_t MATCH_GRAIN = 48;  // sources that are worth a thread

template <class T>
struct Keys {
  Keys(const Tensor<T>& metric, const Stream<T>& x) : data(metric.data), tokens(x.tokens) {
    demand(metric.shape.size() == 4 && metric.shape[0] == x.batch && metric.shape[2] == x.tokens,
           "metric is [B, H, N, d] of the same batch and tokens as x", metric.shape);
    heads = metric.shape[1], depth = metric.shape[3];
    demand(heads > 0, "metric has heads", metric.shape);
  }
  const T* const data;
  const int64_t tokens;
  int64_t heads, depth;
};

// What operators that merge by a score are given: x, size, metric, score and keep, and a prefix that passes.
template <class T>
struct Scored {
  Scored(const Context& context, int64_t protect)
      : x(context.input<T>(0)), sizes(context.input<float>(1)), scores(context.input<float>(3)),
        keys(context.input<T>(2), x), keep(context.scalar(4)), behind(x.tokens - protect),
        half(behind / 2), r(x.tokens - keep) {
    demand(sizes.shape == Shape{x.batch, x.tokens}, "size is [B, N]", sizes.shape);
    demand(scores.shape == Shape{x.batch, x.tokens}, "score is [B, N]", scores.shape);
    demand(protect >= 0 && protect < x.tokens, "protected is less than the tokens", {protect});
    demand(x.tokens - half <= keep && keep <= x.tokens, "keep can be reached", {keep});
  }
  const Stream<T> x;
  const Tensor<float> sizes, scores;
  const Keys<T> keys;
  const int64_t keep, behind, half, r;  // behind the prefix; half of those; that merge
};

// The mean over the heads as a unit vector; the sum has the same direction.
template <class T>
void unit_key(const Keys<T>& keys, int64_t item, int64_t token, Wide<T>* to) {
  const int64_t stride = keys.tokens * keys.depth;
  const T* first = keys.data + item * keys.heads * stride + token * keys.depth;
  const auto least = static_cast<Wide<T>>(EPSILON * static_cast<double>(keys.heads));
  unit_sum(to, first, keys.heads, stride, keys.depth, least);
}

// Who joins whom, for one item of the batch; -1 is nobody.
struct Groups {
  Groups(Arena& arena, int64_t tokens)
      : first(arena.take<int64_t>(tokens)), next(arena.take<int64_t>(tokens)) {
    std::fill(first, first + tokens, -1);
  }
  void join(int64_t source, int64_t target) const {  // before those that joined earlier
    next[source] = first[target];
    first[target] = source;
  }
  // Sources that joined leave no row of their own: writes the other tokens to `leaving`, in index order.
  void leave(const int64_t* sources, int64_t count, int64_t tokens, int64_t* leaving) const {
    for (int64_t i = 0; i < count; ++i) first[sources[i]] = GOES;
    for (int64_t token = 0; token < tokens; ++token)
      if (first[token] != GOES) *leaving++ = token;
  }
  int64_t* first;  // that joins a token
  int64_t* next;   // that joins the same token

 private:
  static constexpr int64_t GOES = -2;
};

// The mean by size of a token and those that join it; all of them are padding where `total` is 0.
template <class T>
void merge_row(T* to, Wide<T>* sum, const Stream<T>& x, const float* size, const Groups& groups, int64_t item,
               int64_t token, Wide<T> total) {
  const Wide<T> own = total == 0 ? Wide<T>(1) : size[token] / total;
  dispatch([&](auto) THRESHER_INLINED {
    begin_sum<T>(sum, own, x.row(item, token), x.width);
    for (int64_t source = groups.first[token]; source >= 0; source = groups.next[source])
      if (size[source] != 0) add_to_sum<T>(sum, size[source] / total, x.row(item, source), x.width);
    end_sum<T>(to, sum, x.width);
  });
}

// Outputs of a merging operator; all but `y` are null where nobody reads them.
template <class T>
struct Outgoing {
  const Stream<T>& x;
  const float* sizes;
  int64_t keep;
  T* y;
  float* out_size;
  int64_t* kept;
  int64_t* slot;

  Outgoing(const Context& context, const Stream<T>& x, const float* sizes, int64_t keep)
      : x(x), sizes(sizes), keep(keep), y(context.output<T>(0, {x.batch, keep, x.width})),
        out_size(context.output<float>(1, {x.batch, keep})),
        kept(context.output<int64_t>(2, {x.batch, keep})),
        slot(context.output<int64_t>(3, {x.batch, x.tokens})) {}

  // Writes a token and those that join it to a row.
  void write(const Groups& groups, int64_t item, int64_t token, int64_t row, Wide<T>* sum) const {
    const float* size = sizes + item * x.tokens;
    float total = size[token];
    for (int64_t source = groups.first[token]; source >= 0; source = groups.next[source]) {
      total += size[source];
      if (slot) slot[item * x.tokens + source] = row;
    }
    T* to = y + (item * keep + row) * x.width;
    if (groups.first[token] < 0)
      copy_row(to, x.row(item, token), x.width);
    else
      merge_row<T>(to, sum, x, size, groups, item, token, Wide<T>(total));
    if (out_size) out_size[item * keep + row] = total;
    if (kept) kept[item * keep + row] = token;
    if (slot) slot[item * x.tokens + token] = row;
  }
};

// Writes all rows, in parts that are worth a thread; token_of(item, row) tells which token leaves there.
template <class T, class TokenOf>
void write_rows(const Context& context, Arena& arena, const Outgoing<T>& out,
                const std::vector<Groups>& groups, const TokenOf& token_of) {
  const Stream<T>& x = out.x;
  const int64_t rows = out.keep, parts = std::max<int64_t>(1, rows / row_grain<T>(x.width));
  Wide<T>* sums = arena.take<Wide<T>>(x.batch * parts * x.width);
  context.parallel(x.batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t item = part / parts, at = part % parts;
      for (int64_t row = rows * at / parts; row < rows * (at + 1) / parts; ++row)
        out.write(groups[item], item, token_of(item, row), row, sums + part * x.width);
    }
  });
}

}  // namespace thresher
