// RedundantMerge on the CPU; see reference.py for what it computes.
#include "cpu/merging.h"

namespace thresher {
namespace {

// The 2 r tokens of highest score, for one item: a source, a target, a source and so on.
struct Pairs {
  const Ranked* ranked;
  int64_t source(int64_t index) const { return ranked[2 * index].index; }
  int64_t target(int64_t index) const { return ranked[2 * index + 1].index; }
};

template <class T>
struct RedundantMerge {
  using W = Wide<T>;
  static constexpr Signature signature{"RedundantMerge",
                                       {TOKENS, Element::FLOAT, TOKENS, Element::FLOAT, Element::INT64},
                                       {TOKENS, Element::FLOAT, Element::INT64, Element::INT64}};
  explicit RedundantMerge(const Attributes& given) : protect(given.integer("protected")) {}

  void compute(const Context& context) const {
    const Scored<T> given(context, protect);
    const Stream<T>& x = given.x;
    const Tensor<float>&sizes = given.sizes, &scores = given.scores;
    const int64_t keep = given.keep, behind = given.behind, r = given.r;
    const Outgoing<T> out(context, x, sizes.data, keep);

    Arena arena;
    Ranked* ranked = arena.take<Ranked>(x.batch * behind);
    std::vector<Pairs> pairs;
    std::vector<Groups> groups;
    for (int64_t item = 0; item < x.batch; ++item) {
      pairs.push_back({ranked + item * behind});
      groups.emplace_back(arena, x.tokens);
    }
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        rank(sizes.data + item * x.tokens, scores.data + item * x.tokens, behind, r,
             ranked + item * behind);
    });
    int64_t* into = arena.take<int64_t>(x.batch * r);
    if (r > 0) match(context, arena, x, sizes.data, given.keys, pairs, r, into);

    int64_t* sources = arena.take<int64_t>(x.batch * r);
    int64_t* leaving = arena.take<int64_t>(x.batch * keep);  // the token of each row
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        for (int64_t i = r - 1; i >= 0; --i) {
          sources[item * r + i] = pairs[item].source(i);
          groups[item].join(pairs[item].source(i), pairs[item].target(into[item * r + i]));
        }
        groups[item].leave(sources + item * r, r, x.tokens, leaving + item * keep);
      }
    });
    write_rows(context, arena, out, groups,
               [&](int64_t item, int64_t row) { return leaving[item * keep + row]; });
  }

  // The first 2 r of all, in the order of their scores; padding (size 0) comes before all others.
  void rank(const float* size, const float* score, int64_t behind, int64_t r,
            Ranked* ranked) const {
    for (int64_t i = 0; i < behind; ++i) {
      const int64_t token = protect + i;
      ranked[i] = {order_key(size[token] == 0 ? PADDING : score[token]), token};
    }
    std::partial_sort(ranked, ranked + 2 * r, ranked + behind);
  }

  // The most similar target of each source.
  void match(const Context& context, Arena& arena, const Stream<T>& x, const float* sizes,
             const Keys<T>& keys, const std::vector<Pairs>& pairs, int64_t r,
             int64_t* into) const {
    W* best = arena.take<W>(x.batch * r);
    W* units = arena.take<W>(x.batch * 2 * r * keys.depth);  // of an item sources, then targets
    std::vector<Targets<W>> targets;
    for (int64_t item = 0; item < x.batch; ++item) targets.emplace_back(arena, r, keys.depth);
    context.parallel(x.batch * 2 * r, KEY_GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / (2 * r), i = at % (2 * r) - r;
        const int64_t token = i < 0 ? pairs[item].source(i + r) : pairs[item].target(i);
        unit_key(keys, item, token, units + at * keys.depth);
        if (i >= 0)
          targets[item].set(i, units + at * keys.depth, sizes[item * x.tokens + token] == 0);
      }
    });
    for (Targets<W>& one : targets) one.close();
    const auto first = [&](int64_t item) { return units + item * 2 * r * keys.depth; };
    nearest_by_item(context, r, MATCH_GRAIN, first, targets, best, into);
  }

  const int64_t protect;
};

}  // namespace

void add_redundant_merge(const Library& library) {
  add<RedundantMerge, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
