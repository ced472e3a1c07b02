// SelectDiverse on the CPU; see reference.py for what it computes.
//
// Three steps: unit rows, similarities of all pairs, and one round of the choice after the other.
#include "cpu/arena.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr double CHOSEN = 2 * PADDING;  // beyond padding: never picked again
constexpr int64_t GRAIN = 16;           // tokens whose similarities are worth a thread
constexpr int ABREAST = 4;              // rows that are multiplied at once

int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

template <class T>
THRESHER_VECTORISED void unit_row(const T* from, int64_t width, Wide<T>* to) {
  unit_sum(to, from, 1, 0, width, static_cast<Wide<T>>(EPSILON));
  std::fill(to + width, to + padded(width), Wide<T>(0));
}

// Products of one row with `count` others, all of a padded width.
template <class W>
THRESHER_VECTORISED void products(const W* row, const W* others, int64_t count, int64_t width,
                                  W* to) {
  for (int64_t first = 0; first < count; first += ABREAST) {
    const W* other[ABREAST];  // the last one again where there are fewer
    for (int i = 0; i < ABREAST; ++i)
      other[i] = others + std::min(first + i, count - 1) * width;
    Vector<W> sum[ABREAST] = {};
    for (int64_t c = 0; c < width; c += LANES) {
      const Vector<W> here = load(row + c);
      for (int i = 0; i < ABREAST; ++i) sum[i] += here * load(other[i] + c);
    }
    for (int i = 0; i < ABREAST && first + i < count; ++i) to[first + i] = lane_sum<W>(sum[i]);
  }
}

// From the cosines of token `self` with all: what the others are no nearer to once it is picked.
// Returns how near its own nearest is.
template <class W>
W close_row(W* cosine, const float* size, int64_t count, int64_t self) {
  W nearest = static_cast<W>(-PADDING);
  for (int64_t i = 0; i < count; ++i) {
    if (cosine[i] != cosine[i]) cosine[i] = static_cast<W>(-PADDING);  // NaN has no order
    if (size[i] == 0)
      cosine[i] = static_cast<W>(PADDING);
    else if (i != self)
      nearest = std::max(nearest, cosine[i]);
  }
  cosine[self] = static_cast<W>(CHOSEN);
  return size[self] == 0 ? static_cast<W>(PADDING) : nearest;
}

// `rank` is how near the nearest is to start with, and is overwritten.
template <class W>
THRESHER_VECTORISED void choose(const W* closeness, int64_t count, int64_t wanted, W* rank,
                                int64_t* picks) {
  for (int64_t round = 0; round < wanted; ++round) {
    const int64_t pick = std::min_element(rank, rank + count) - rank;
    const W* seen = closeness + pick * count;
    if (round == 0)
      std::copy(seen, seen + count, rank);
    else
      for (int64_t i = 0; i < count; ++i) rank[i] = std::max(rank[i], seen[i]);
    picks[round] = pick;
  }
  std::sort(picks, picks + wanted);
}

template <class T>
struct SelectDiverse {
  static constexpr Signature signature{"SelectDiverse",
                                       {TOKENS, Element::FLOAT, Element::INT64},
                                       {TOKENS, Element::INT64, Element::INT64}};
  explicit SelectDiverse(const Attributes& given) : protect(given.integer("protected")) {}

  void compute(const Context& context) const {
    using W = Wide<T>;
    const Stream<T> x(context.input<T>(0));
    const Tensor<float> sizes = context.input<float>(1);
    const int64_t keep = context.scalar(2);
    demand(sizes.shape == Shape{x.batch, x.tokens}, "size is [B, N]", sizes.shape);
    demand(protect >= 0 && protect < x.tokens, "protected is a number of the tokens", {protect});
    demand(protect < keep && keep <= x.tokens, "keep can be reached", {keep});

    T* y = context.output<T>(0, {x.batch, keep, x.width});
    int64_t* kept = context.output<int64_t>(1, {x.batch, keep});
    int64_t* slot = context.output<int64_t>(2, {x.batch, x.tokens});
    Arena arena;
    const int64_t pool = x.tokens - protect, wanted = keep - protect, wide = padded(x.width);
    W* units = arena.take<W>(x.batch * pool * wide);
    W* closeness = arena.take<W>(x.batch * pool * pool);
    W* ranks = arena.take<W>(x.batch * pool);
    int64_t* picks = arena.take<int64_t>(x.batch * wanted);

    context.parallel(x.batch * pool, row_grain<T>(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        unit_row<T>(x.row(at / pool, protect + at % pool), x.width, units + at * wide);
    });
    context.parallel(x.batch * pool, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / pool;
        W* row = closeness + at * pool;
        products<W>(units + at * wide, units + item * pool * wide, pool, wide, row);
        ranks[at] = close_row(row, sizes.data + item * x.tokens + protect, pool, at % pool);
      }
    });
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        choose<W>(closeness + item * pool * pool, pool, wanted, ranks + item * pool,
                  picks + item * wanted);
    });
    if (slot) std::fill(slot, slot + x.batch * x.tokens, -1);
    context.parallel(x.batch * keep, row_grain<T>(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / keep, row = at % keep;
        const int64_t from =
            row < protect ? row : protect + picks[item * wanted + row - protect];
        if (kept) kept[at] = from;
        if (slot) slot[item * x.tokens + from] = row;
        copy_row(y + at * x.width, x.row(item, from), x.width);
      }
    });
  }

  const int64_t protect;
};

}  // namespace

void add_select_diverse(const Library& library) {
  add<SelectDiverse, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
