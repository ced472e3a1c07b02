// PruneMerge on the CPU; see reference.py for what it computes.
#include "cpu/arena.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr int64_t UNIT_GRAIN = 16;   // rows that are worth a thread

// The plain mean of a staying token and the real ones that join it.
template <class T>
void mean_row(T* to, Wide<T>* sum, const Stream<T>& x, const float* size, int64_t item, int64_t from,
              const Ranked* joining, int64_t first, const int64_t* next) {
  int64_t count = 1;
  for (int64_t i = first; i >= 0; i = next[i]) count += size[joining[i].index] != 0;
  const Wide<T> weight = Wide<T>(1) / static_cast<Wide<T>>(count);
  dispatch([&](auto) THRESHER_INLINED {
    begin_sum<T>(sum, weight, x.row(item, from), x.width);
    for (int64_t i = first; i >= 0; i = next[i])
      if (size[joining[i].index] != 0)
        add_to_sum<T>(sum, weight, x.row(item, joining[i].index), x.width);
    end_sum<T>(to, sum, x.width);
  });
}

template <class T>
struct PruneMerge {
  using W = Wide<T>;
  static constexpr Signature signature{
      "PruneMerge",
      {TOKENS, Element::FLOAT, Element::FLOAT, Element::INT64, Element::INT64},
      {TOKENS, Element::FLOAT, Element::INT64, Element::INT64}};
  explicit PruneMerge(const Attributes& given) : protect(given.integer("protected")) {}

  void compute(const Context& context) const {
    const Stream<T> x(context.input<T>(0));
    const Tensor<float> sizes = context.input<float>(1), scores = context.input<float>(2);
    const int64_t cut = context.scalar(3), keep = context.scalar(4);
    demand(sizes.shape == Shape{x.batch, x.tokens}, "size is [B, N]", sizes.shape);
    demand(scores.shape == Shape{x.batch, x.tokens}, "score is [B, N]", scores.shape);
    demand(protect >= 0 && protect <= x.tokens, "protected is a number of the tokens", {protect});
    demand(keep <= cut && cut <= x.tokens, "pruned can be reached", {cut});
    demand(keep >= protect + (cut > keep), "keep can be reached", {keep});

    T* y = context.output<T>(0, {x.batch, keep, x.width});
    float* out_size = context.output<float>(1, {x.batch, keep});
    int64_t* kept = context.output<int64_t>(2, {x.batch, keep});
    int64_t* slot = context.output<int64_t>(3, {x.batch, x.tokens});

    Arena arena;
    const int64_t behind = x.tokens - protect, stay = keep - protect, join = cut - keep;
    Ranked* ranked = arena.take<Ranked>(x.batch * behind);
    rank(context, x, sizes.data, scores.data, stay, join, ranked);
    W* best = arena.take<W>(x.batch * join);
    int64_t* into = arena.take<int64_t>(x.batch * join);
    if (join > 0) match(context, arena, x, sizes.data, ranked, stay, join, best, into);

    int64_t* head = arena.take<int64_t>(x.batch * keep);
    int64_t* next = arena.take<int64_t>(x.batch * join);
    std::fill(head, head + x.batch * keep, -1);
    for (int64_t at = x.batch * join - 1; at >= 0; --at) {
      int64_t& first = head[at / join * keep + protect + into[at]];
      next[at] = first;
      first = at % join;
    }
    if (slot) std::fill(slot, slot + x.batch * x.tokens, -1);
    const int64_t parts = std::max<int64_t>(1, keep / row_grain<T>(x.width));
    W* sums = arena.take<W>(x.batch * parts * x.width);
    context.parallel(x.batch * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t item = part / parts, at = part % parts;
        const float* size = sizes.data + item * x.tokens;
        const Ranked* tokens = ranked + item * behind;
        for (int64_t row = keep * at / parts; row < keep * (at + 1) / parts; ++row) {
          const int64_t from = row < protect ? row : tokens[row - protect].index;
          const int64_t first = head[item * keep + row];
          T* to = y + (item * keep + row) * x.width;
          if (first < 0)
            copy_row(to, x.row(item, from), x.width);
          else
            mean_row<T>(to, sums + part * x.width, x, size, item, from, tokens + stay, first,
                        next + item * join);
          W total = size[from];
          for (int64_t i = first; i >= 0; i = next[item * join + i])
            total += best[item * join + i] * size[tokens[stay + i].index];
          if (first >= 0) total = std::max(total, W(std::min(size[from], 1.0f)));
          if (out_size) out_size[item * keep + row] = static_cast<float>(total);
          if (kept) kept[item * keep + row] = from;
          if (slot) slot[item * x.tokens + from] = row;
          if (slot)
            for (int64_t i = first; i >= 0; i = next[item * join + i])
              slot[item * x.tokens + tokens[stay + i].index] = row;
        }
      }
    });
  }

  // By score, padding (size 0) last: first those that stay, in index order, then those that join.
  void rank(const Context& context, const Stream<T>& x, const float* sizes, const float* scores,
            int64_t stay, int64_t join, Ranked* all) const {
    const int64_t behind = x.tokens - protect;
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        Ranked* ranked = all + item * behind;
        for (int64_t i = 0; i < behind; ++i) {
          const int64_t at = item * x.tokens + protect + i;
          const float worth = sizes[at] == 0 ? std::numeric_limits<float>::lowest() : scores[at];
          ranked[i] = {order_key(worth), protect + i};
        }
        std::nth_element(ranked, ranked + stay, ranked + behind);
        std::nth_element(ranked + stay, ranked + stay + join, ranked + behind);
        std::sort(ranked, ranked + stay, by_index);
        std::sort(ranked + stay, ranked + stay + join);
      }
    });
  }

  // The most similar of the staying tokens for each joining one, by the cosine of x itself.  Those that join are few
  // and stand in panels; those that stay pass by them as they lie.
  void match(const Context& context, Arena& arena, const Stream<T>& x, const float* sizes,
             const Ranked* ranked, int64_t stay, int64_t join, W* best, int64_t* into) const {
    const int64_t behind = x.tokens - protect, parts = std::max<int64_t>(1, 2 * stay / PAIR_ROWS);
    const auto token = [&](int64_t item, int64_t i) { return ranked[item * behind + i].index; };
    const auto unit = [&](W* to, int64_t item, int64_t i) { unit_row(to, x.row(item, token(item, i)), x.width); };
    W* joining = arena.take<W>(x.batch * join * x.width);
    std::vector<Targets<W>> targets;
    for (int64_t item = 0; item < x.batch; ++item) targets.emplace_back(arena, join, x.width);
    context.parallel(x.batch * join, UNIT_GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        unit(joining + at * x.width, at / join, stay + at % join);
        targets[at / join].set(at % join, joining + at * x.width, false);
      }
    });
    for (Targets<W>& one : targets) one.close();

    const int64_t places = padded_to_panels(join), all = x.batch * parts * places;
    W* value = arena.take<W>(all);  // [B, parts, places]
    Number<W>* number = arena.take<Number<W>>(all);
    std::fill_n(value, all, -std::numeric_limits<W>::infinity());
    std::fill_n(number, all, 0);
    W* staying = arena.take<W>(x.batch * stay * x.width);
    W* limit = arena.take<W>(x.batch * stay);
    context.parallel(x.batch * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / parts, part = at % parts, from = stay * part / parts, to = stay * (part + 1) / parts;
        for (int64_t i = from; i < to; ++i) {
          unit(staying + (item * stay + i) * x.width, item, i);
          const bool padding = sizes[item * x.tokens + token(item, i)] == 0;
          limit[item * stay + i] = padding ? W(-PADDING) : std::numeric_limits<W>::infinity();
        }
        const int64_t row = item * stay + from;
        nearest_rows(staying + row * x.width, limit + row, from, to - from, targets[item], value + at * places,
                     number + at * places);
      }
    });
    for (int64_t at = 0; at < x.batch * join; ++at) {
      const int64_t first = at / join * parts * places + at % join;
      int64_t most = first;
      for (int64_t part = 1; part < parts; ++part)
        if (value[first + part * places] > value[most]) most = first + part * places;
      best[at] = value[most];
      into[at] = number[most];
    }
  }

  const int64_t protect;
};

}  // namespace

void add_prune_merge(const Library& library) {
  add<PruneMerge, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
