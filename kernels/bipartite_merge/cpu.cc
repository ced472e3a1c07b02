// BipartiteMerge and RankedBipartiteMerge on the CPU; see reference.py for what they compute.
//
// Four steps, each parallel over the batch and where it is long over the tokens: unit keys, nearest
// targets, choice of those that merge, outgoing rows.
#include "cpu/arena.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr int64_t KEY_GRAIN = 64;    // tokens whose keys are worth a thread
constexpr int64_t MATCH_GRAIN = 48;  // sources that are worth a thread

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
struct Keys {
  explicit Keys(const Tensor<T>& metric, const Stream<T>& x)
      : data(metric.data), tokens(x.tokens) {
    demand(metric.shape.size() == 4 && metric.shape[0] == x.batch && metric.shape[2] == x.tokens,
           "metric is [B, H, N, d] of the same batch and tokens as x", metric.shape);
    heads = metric.shape[1], depth = metric.shape[3];
    demand(heads > 0, "metric has heads", metric.shape);
  }
  const T* const data;
  const int64_t tokens;
  int64_t heads, depth;
};

// The mean over the heads as a unit vector; the sum has the same direction.
template <class T>
THRESHER_VECTORISED void unit_key(const Keys<T>& keys, int64_t item, int64_t token, Wide<T>* to) {
  const T* from = keys.data + (item * keys.heads * keys.tokens + token) * keys.depth;
  begin_sum<T>(to, 1, from, keys.depth);
  for (int64_t head = 1; head < keys.heads; ++head)
    add_to_sum<T>(to, 1, from + head * keys.tokens * keys.depth, keys.depth);
  normalise(to, keys.depth, static_cast<Wide<T>>(EPSILON * static_cast<double>(keys.heads)));
}

// What merges into what, for one item of the batch.
struct Plan {
  int64_t* staying;  // sources that do not merge, in the order in which they leave
  int64_t* into;     // target of each source
  int64_t* head;     // first merging source of each target, or -1
  int64_t* next;     // the next one of the same target, by source
};

template <class T>
THRESHER_VECTORISED void merge_row(T* to, Wide<T>* sum, const Stream<T>& x, const float* size,
                                   const Places& places, const Plan& plan, int64_t item,
                                   int64_t target, Wide<T> total) {
  const Wide<T> own = total == 0 ? Wide<T>(1) : size[places.target(target)] / total;
  begin_sum<T>(sum, own, x.row(item, places.target(target)), x.width);
  for (int64_t source = plan.head[target]; source >= 0; source = plan.next[source]) {
    const float part = size[places.source(source)];
    if (part != 0) add_to_sum<T>(sum, part / total, x.row(item, places.source(source)), x.width);
  }
  end_sum<T>(to, sum, x.width);
}

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
        const bool padding = size[item * x.tokens + token] == 0;
        targets[item].set(target, row,
                          padding ? W(-PADDING) : std::numeric_limits<W>::infinity());
      }
    }
  });
  for (Targets<W>& one : targets) one.close();
  const auto first = [&](int64_t item) { return rows + item * places.sources * keys.depth; };
  nearest_by_item(context, places.sources, MATCH_GRAIN, first, targets, best, into);
}

// Chooses the r sources of largest rank; padding (size 0) comes before all others.
template <class W>
void choose(const Plan& plan, Ranked* ranked, const float* size, const W* best,
            const Places& places, int64_t r, bool in_order) {
  for (int64_t source = 0; source < places.sources; ++source) {
    const bool padding = size[places.source(source)] == 0;
    ranked[source] = {order_key(padding ? PADDING : best[source]), source};
  }
  std::nth_element(ranked, ranked + r, ranked + places.sources);
  if (in_order)
    std::sort(ranked + r, ranked + places.sources, by_index);
  else
    std::sort(ranked + r, ranked + places.sources);
  std::fill(plan.head, plan.head + places.targets, -1);
  for (int64_t i = r - 1; i >= 0; --i) {
    const int64_t source = ranked[i].index, target = plan.into[source];
    plan.next[source] = plan.head[target];
    plan.head[target] = source;
  }
  for (int64_t i = r; i < places.sources; ++i) plan.staying[i - r] = ranked[i].index;
}

// Which rows leave where, and what they become.
template <class T>
struct Outgoing {
  const Stream<T>& x;
  const float* sizes;
  const Places& places;
  int64_t protect, keep, r;
  T* y;
  float* out_size;
  int64_t* kept;  // like the next one null where nobody reads it
  int64_t* slot;

  int64_t before() const { return protect + places.sources - r; }  // rows before the targets

  void write(const Plan& plan, int64_t item, int64_t row, Wide<T>* sum) const {
    const float* size = sizes + item * x.tokens;
    const int64_t target = row - before();
    const int64_t from = row < protect ? row
                         : target < 0  ? places.source(plan.staying[row - protect])
                                       : places.target(target);
    const int64_t first = target < 0 ? -1 : plan.head[target];
    float total = size[from];
    for (int64_t s = first; s >= 0; s = plan.next[s]) {
      total += size[places.source(s)];
      if (slot) slot[item * x.tokens + places.source(s)] = row;
    }
    T* to = y + (item * keep + row) * x.width;
    if (first < 0)
      copy_row(to, x.row(item, from), x.width);
    else
      merge_row<T>(to, sum, x, size, places, plan, item, target, Wide<T>(total));
    if (out_size) out_size[item * keep + row] = total;
    if (kept) kept[item * keep + row] = from;
    if (slot) slot[item * x.tokens + from] = row;
  }
};

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
  const Outgoing<T> out{
      x, sizes.data, places, protect, keep, r,
      context.output<T>(0, {x.batch, keep, x.width}), context.output<float>(1, {x.batch, keep}),
      context.output<int64_t>(2, {x.batch, keep}), context.output<int64_t>(3, {x.batch, x.tokens})};

  Arena arena;
  const int64_t sources = x.batch * places.sources;
  W* best = arena.take<W>(sources);
  int64_t* into = arena.take<int64_t>(sources);
  std::fill(best, best + sources, W(0));
  std::fill(into, into + sources, 0);
  match<T>(context, arena, x, sizes.data, keys, places, best, into);

  Ranked* ranked = arena.take<Ranked>(sources);
  std::vector<Plan> plans;
  for (int64_t item = 0; item < x.batch; ++item)
    plans.push_back({arena.take<int64_t>(places.sources - r), into + item * places.sources,
                     arena.take<int64_t>(places.targets), arena.take<int64_t>(places.sources)});
  context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      choose(plans[item], ranked + item * places.sources, sizes.data + item * x.tokens,
             best + item * places.sources, places, r, in_order);
  });

  const int64_t parts = std::max<int64_t>(1, keep / row_grain<T>(x.width));
  W* sums = arena.take<W>(x.batch * parts * x.width);
  context.parallel(x.batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t item = part / parts, at = part % parts;
      for (int64_t row = keep * at / parts; row < keep * (at + 1) / parts; ++row)
        out.write(plans[item], item, row, sums + part * x.width);
    }
  });
}

template <bool IN_ORDER>
struct Merge {
  template <class T>
  struct Kernel {
    static constexpr Signature signature{IN_ORDER ? "BipartiteMerge" : "RankedBipartiteMerge",
                                         {TOKENS, ort::FLOAT, TOKENS, ort::INT64},
                                         {TOKENS, ort::FLOAT, ort::INT64, ort::INT64}};
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
