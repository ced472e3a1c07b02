// SelectDiverse on the CPU; see reference.py for what it computes.
//
// Three steps: unit rows, similarities of all pairs, and one round of the choice after the other.
#include "cpu/arena.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr double CHOSEN = 2 * PADDING;  // beyond padding: never picked again
constexpr int64_t GRAIN = 16;           // tokens whose similarities are worth a thread

// Products with all targets, `stride` apart.
template <class I, class W>
struct Products {
  W* const to;
  const int64_t stride;

  template <int ROWS, int COUNT>
  THRESHER_INLINE void tile(int64_t row, int64_t at, const Tile<I, W, ROWS, COUNT>& product) {
    for (int64_t v = 0; v < COUNT; ++v)
      for (int64_t r = 0; r < ROWS; ++r) store(to + (row + r) * stride + at + v * LANES<I, W>, product[v][r]);
  }
};

template <class W>
void products(const W* rows, int64_t count, const Targets<W>& targets, W* to) {
  const int64_t stride = targets.padded();
  dispatch([&](auto isa) THRESHER_INLINED {
    for (int64_t at = 0; at < count; at += PAIR_ROWS) {
      Products<decltype(isa), W> found{to + at * stride, stride};
      use_products<decltype(isa)>(rows + at * targets.depth, std::min(PAIR_ROWS, count - at), targets, found);
    }
  });
}

// From the cosines of token `self` with all, of a padded number: what the others are no nearer to once it is
// picked.  `least` is PADDING for padding, below every cosine for other tokens.  Returns how near its own nearest is.
template <class W>
W close_row(W* cosine, const W* least, int64_t count, int64_t self) {
  W most = static_cast<W>(-PADDING);
  cosine[self] = static_cast<W>(-PADDING);
  dispatch([&](auto isa) THRESHER_INLINED {
    using I = decltype(isa);
    const Vector<I, W> far = Vector<I, W>{} - static_cast<W>(PADDING);
    Vector<I, W> nearest = far;
    for (int64_t i = 0; i < count; i += LANES<I, W>) {
      const Vector<I, W> bound = load<I>(least + i), found = load<I>(cosine + i);
      const Vector<I, W> known = found == found ? found : far;  // NaN has no order
      const Vector<I, W> near = known > bound ? known : bound;
      const Vector<I, W> real = bound > 0 ? far : near;
      nearest = real > nearest ? real : nearest;
      store(cosine + i, near);
    }
    for (int lane = 0; lane < LANES<I, W>; ++lane) most = std::max(most, nearest[lane]);
  });
  cosine[self] = static_cast<W>(CHOSEN);
  return least[self] > 0 ? static_cast<W>(PADDING) : most;
}

// `rank` is how near the nearest is to start with, and is overwritten.
template <class W>
void choose(const W* closeness, int64_t stride, int64_t count, int64_t wanted, W* rank, int64_t* picks) {
  for (int64_t round = 0; round < wanted; ++round) {
    const int64_t pick = std::min_element(rank, rank + count) - rank;
    const W* seen = closeness + pick * stride;
    if (round == 0)
      std::copy(seen, seen + count, rank);
    else
      dispatch([&](auto) THRESHER_INLINED {
        for (int64_t i = 0; i < count; ++i) rank[i] = rank[i] < seen[i] ? seen[i] : rank[i];
      });
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
    const int64_t pool = x.tokens - protect, wanted = keep - protect, stride = padded_to_panels(pool);
    W* units = arena.take<W>(x.batch * pool * x.width);
    W* closeness = arena.take<W>(x.batch * pool * stride);
    W* least = arena.take<W>(x.batch * stride);
    std::fill_n(least, x.batch * stride, static_cast<W>(PADDING));
    for (int64_t item = 0; item < x.batch; ++item)
      for (int64_t i = 0; i < pool; ++i)
        if (sizes.data[item * x.tokens + protect + i] != 0)
          least[item * stride + i] = static_cast<W>(-PADDING);
    W* ranks = arena.take<W>(x.batch * pool);
    int64_t* picks = arena.take<int64_t>(x.batch * wanted);
    std::vector<Targets<W>> targets;
    for (int64_t item = 0; item < x.batch; ++item) targets.emplace_back(arena, pool, x.width);

    context.parallel(x.batch * pool, row_grain<T>(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        W* unit = units + at * x.width;
        unit_row(unit, x.row(at / pool, protect + at % pool), x.width);
        targets[at / pool].set(at % pool, unit, false);
      }
    });
    for (Targets<W>& one : targets) one.close();
    parallel_by_item(context, x.batch, pool, GRAIN, [&](int64_t item, int64_t first, int64_t count) {
      const int64_t begin = item * pool + first;
      products(units + begin * x.width, count, targets[item], closeness + begin * stride);
      for (int64_t at = begin; at < begin + count; ++at)
        ranks[at] = close_row(closeness + at * stride, least + item * stride, stride, at % pool);
    });
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        choose<W>(closeness + item * pool * stride, stride, pool, wanted, ranks + item * pool,
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
