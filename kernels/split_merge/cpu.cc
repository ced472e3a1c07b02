// SplitMerge on the CPU; see reference.py for what it computes.
#include "cpu/merging.h"

namespace thresher {
namespace {

constexpr float LOWEST = -1e30f;  // the score of padding

template <class T>
struct SplitMerge {
  using W = Wide<T>;
  static constexpr Signature signature{"SplitMerge",
                                       {TOKENS, Element::FLOAT, TOKENS, Element::FLOAT, Element::INT64},
                                       {TOKENS, Element::FLOAT, Element::INT64, Element::INT64}};
  explicit SplitMerge(const Attributes& given) : protect(given.integer("protected")) {}

  void compute(const Context& context) const {
    const Scored<T> given(context, protect);
    const Stream<T>& x = given.x;
    const Tensor<float>&sizes = given.sizes, &scores = given.scores;
    const int64_t keep = given.keep, behind = given.behind, half = given.half, r = given.r;
    const Outgoing<T> out(context, x, sizes.data, keep);

    Arena arena;
    Ranked* ranked = arena.take<Ranked>(x.batch * behind);  // sources and then targets
    std::vector<Groups> groups;
    for (int64_t item = 0; item < x.batch; ++item) groups.emplace_back(arena, x.tokens);
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        rank(sizes.data + item * x.tokens, scores.data + item * x.tokens, behind,
             ranked + item * behind);
    });
    W* best = arena.take<W>(x.batch * half);
    int64_t* into = arena.take<int64_t>(x.batch * half);
    if (half > 0) match(context, arena, x, sizes.data, given.keys, ranked, behind, best, into);

    Ranked* merging = arena.take<Ranked>(x.batch * half);
    int64_t* sources = arena.take<int64_t>(x.batch * r);
    int64_t* leaving = arena.take<int64_t>(x.batch * keep);  // the token of each row
    context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Ranked* from = ranked + item * behind;
        choose(sizes.data + item * x.tokens, from, best + item * half, half, r, merging + item * half);
        for (int64_t i = r - 1; i >= 0; --i) {
          const int64_t source = merging[item * half + i].index;
          sources[item * r + i] = from[source].index;
          groups[item].join(from[source].index, from[half + into[item * half + source]].index);
        }
        groups[item].leave(sources + item * r, r, x.tokens, leaving + item * keep);
      }
    });
    write_rows(context, arena, out, groups,
               [&](int64_t item, int64_t row) { return leaving[item * keep + row]; });
  }

  // Tokens behind the prefix by rising score; padding (size 0) comes before all others.
  void rank(const float* size, const float* score, int64_t behind, Ranked* ranked) const {
    for (int64_t i = 0; i < behind; ++i) {
      const int64_t token = protect + i;
      ranked[i] = {~order_key(size[token] == 0 ? LOWEST : score[token]), token};
    }
    std::sort(ranked, ranked + behind);
  }

  // The most similar target of each source.
  void match(const Context& context, Arena& arena, const Stream<T>& x, const float* sizes,
             const Keys<T>& keys, const Ranked* ranked, int64_t behind, W* best,
             int64_t* into) const {
    const int64_t half = behind / 2;
    W* units = arena.take<W>(x.batch * behind * keys.depth);  // of an item sources, then targets
    std::vector<Targets<W>> targets;
    for (int64_t item = 0; item < x.batch; ++item)
      targets.emplace_back(arena, behind - half, keys.depth);
    context.parallel(x.batch * behind, KEY_GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t item = at / behind, i = at % behind - half, token = ranked[at].index;
        unit_key(keys, item, token, units + at * keys.depth);
        if (i >= 0)
          targets[item].set(i, units + at * keys.depth, sizes[item * x.tokens + token] == 0);
      }
    });
    for (Targets<W>& one : targets) one.close();
    const auto first = [&](int64_t item) { return units + item * behind * keys.depth; };
    nearest_by_item(context, half, MATCH_GRAIN, first, targets, best, into);
  }

  // The r sources that are most like a target come first; padding before all others.
  void choose(const float* size, const Ranked* sources, const W* best, int64_t half, int64_t r,
              Ranked* merging) const {
    for (int64_t i = 0; i < half; ++i)
      merging[i] = {order_key(size[sources[i].index] == 0 ? PADDING : best[i]), i};
    std::partial_sort(merging, merging + r, merging + half);
  }

  const int64_t protect;
};

}  // namespace

void add_split_merge(const Library& library) {
  add<SplitMerge, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
