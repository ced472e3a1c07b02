// BipartiteMerge and RankedBipartiteMerge on the CPU; see reference.py for what they compute.
//
// Four steps, each parallel over the batch and where it is long over the tokens: unit keys, nearest
// targets, choice of those that merge, outgoing rows.
#include "cpu/merging.h"

namespace thresher {
namespace {

struct Places {  // of sources and targets among the tokens
  Places(int64_t tokens, int64_t protect)
      : first_source(protect + protect % 2), first_target(protect + 1 - protect % 2),
        sources(std::max<int64_t>(0, (tokens - first_source + 1) / 2)),
        targets(std::max<int64_t>(0, (tokens - first_target + 1) / 2)) {}
  int64_t source(int64_t index) const { return first_source + 2 * index; }
  int64_t target(int64_t index) const { return first_target + 2 * index; }

  const int64_t first_source, first_target, sources, targets;
};

template <class T>
void match(const Context& context, Arena& arena, const Stream<T>& x, const float* size,
           const Keys<T>& keys, const Places& places, Wide<T>* best, int64_t* into) {
  using W = Wide<T>;
  if (places.targets == 0) return;
  W* rows = arena.take<W>(x.batch * places.sources * keys.depth);
  W* scratch = arena.take<W>(x.batch * places.targets * keys.depth);
  std::vector<Targets<W>> targets;
  for (int64_t item = 0; item < x.batch; ++item)
    targets.emplace_back(arena, places.targets, keys.depth);
  const int64_t behind = x.tokens - std::min(places.first_source, places.first_target);
  const int64_t start = x.tokens - behind;
  context.parallel(x.batch * behind, KEY_GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t item = at / behind, token = start + at % behind;
      if (token % 2 == 0) {
        const int64_t source = (token - places.first_source) / 2;
        unit_key(keys, item, token, rows + (item * places.sources + source) * keys.depth);
      } else {
        const int64_t target = (token - places.first_target) / 2;
        W* row = scratch + (item * places.targets + target) * keys.depth;
        unit_key(keys, item, token, row);
        targets[item].set(target, row, size[item * x.tokens + token] == 0);
      }
    }
  });
  for (Targets<W>& one : targets) one.close();
  const auto first = [&](int64_t item) { return rows + item * places.sources * keys.depth; };
  nearest_by_item(context, places.sources, MATCH_GRAIN, first, targets, best, into);
}

// Chooses the r sources of largest rank; padding (size 0) comes before all others.  Behind them
// stand those that stay, in the order in which they leave.
template <class W>
void choose(const Groups& groups, Ranked* ranked, const float* size, const W* best,
            const int64_t* into, const Places& places, int64_t r, bool in_order) {
  for (int64_t source = 0; source < places.sources; ++source) {
    const bool padding = size[places.source(source)] == 0;
    ranked[source] = {order_key(padding ? PADDING : best[source]), source};
  }
  std::nth_element(ranked, ranked + r, ranked + places.sources);
  if (in_order)
    std::sort(ranked + r, ranked + places.sources, by_index);
  else
    std::sort(ranked + r, ranked + places.sources);
  for (int64_t i = r - 1; i >= 0; --i)
    groups.join(places.source(ranked[i].index), places.target(into[ranked[i].index]));
}

template <class T>
void compute(const Context& context, int64_t protect, bool in_order) {
  using W = Wide<T>;
  const Stream<T> x(context.input<T>(0));
  const Tensor<float> sizes = context.input<float>(1);
  const Keys<T> keys(context.input<T>(2), x);
  const int64_t keep = context.scalar(3);
  demand(sizes.shape == Shape{x.batch, x.tokens}, "size is [B, N]", sizes.shape);
  demand(protect >= 0 && protect <= x.tokens, "protected is a number of the tokens", {protect});
  const Places places(x.tokens, protect);
  const int64_t least = x.tokens - (places.targets ? places.sources : 0);
  demand(least <= keep && keep <= x.tokens, "keep can be reached", {keep});
  const int64_t r = x.tokens - keep;
  const Outgoing<T> out(context, x, sizes.data, keep);

  Arena arena;
  const int64_t sources = x.batch * places.sources;
  W* best = arena.take<W>(sources);
  int64_t* into = arena.take<int64_t>(sources);
  std::fill(best, best + sources, W(0));
  std::fill(into, into + sources, 0);
  match<T>(context, arena, x, sizes.data, keys, places, best, into);

  Ranked* ranked = arena.take<Ranked>(sources);
  std::vector<Groups> groups;
  for (int64_t item = 0; item < x.batch; ++item) groups.emplace_back(arena, x.tokens);
  context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item * places.sources;
      choose(groups[item], ranked + at, sizes.data + item * x.tokens, best + at, into + at, places,
             r, in_order);
    }
  });

  const int64_t before = protect + places.sources - r;  // rows before the targets
  write_rows(context, arena, out, groups, [&](int64_t item, int64_t row) {
    if (row < protect) return row;
    if (row >= before) return places.target(row - before);
    return places.source(ranked[item * places.sources + r + row - protect].index);
  });
}

template <bool IN_ORDER>
struct Merge {
  template <class T>
  struct Kernel {
    static constexpr Signature signature{IN_ORDER ? "BipartiteMerge" : "RankedBipartiteMerge",
                                         {TOKENS, Element::FLOAT, TOKENS, Element::INT64},
                                         {TOKENS, Element::FLOAT, Element::INT64, Element::INT64}};
    explicit Kernel(const Attributes& given) : protect(given.integer("protected")) {}
    void compute(const Context& context) const {
      thresher::compute<T>(context, protect, IN_ORDER);
    }

    const int64_t protect;
  };
};

}  // namespace

void add_bipartite_merge(const Library& library) {
  add<Merge<true>::Kernel, float, Half, BFloat16, double>(library);
  add<Merge<false>::Kernel, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
