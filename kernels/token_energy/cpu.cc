// TokenEnergy on the CPU; see reference.py for what it computes.
#include "cpu/activation.h"
#include "cpu/merging.h"
#include "cpu/pairs.h"

namespace thresher {
namespace {

constexpr int64_t ENERGY_GRAIN = 24;  // rows that are worth a thread

// f of a tile's cosines, summed up by row and lane.
template <class I, class W>
struct Feelings {
  const Targets<W>& targets;
  const W margin;
  Vector<I, W> sum[PAIR_ROWS];

  template <int ROWS, int COUNT>
  THRESHER_INLINE void tile(int64_t row, int64_t at, const Tile<I, W, ROWS, COUNT>& cosine) {
    for (int64_t v = 0; v < COUNT; ++v) {
      const Vector<I, W> limit = load<I>(targets.limit(at + v * LANES<I, W>));
      for (int64_t r = 0; r < ROWS; ++r) {
        const Vector<I, W> felt = feel(cosine[v][r]);
        sum[row + r] += limit > 0 ? felt : Vector<I, W>{};  // the lanes behind the last target are empty
      }
    }
  }

  THRESHER_INLINE Vector<I, W> feel(const Vector<I, W>& cosine) const {
    const Vector<I, W> shifted = cosine - margin;
    const Vector<I, W> power = exponential(shifted > 0 ? Vector<I, W>{} : shifted);
    return cosine >= margin ? cosine : power - 1;
  }
};

template <class W>
void energies(const W* rows, int64_t count, const Targets<W>& targets, W margin, float* energy) {
  dispatch([&](auto isa) THRESHER_INLINED {
    for (int64_t at = 0; at < count; at += PAIR_ROWS) {
      const int64_t size = std::min(PAIR_ROWS, count - at);
      Feelings<decltype(isa), W> felt{targets, margin, {}};
      use_products<decltype(isa)>(rows + at * targets.depth, size, targets, felt);
      for (int64_t row = 0; row < size; ++row)
        energy[at + row] = static_cast<float>(lane_sum(felt.sum[row]) / static_cast<W>(targets.count));
    }
  });
}

template <class T>
struct TokenEnergy {
  using W = Wide<T>;
  static constexpr Signature signature{"TokenEnergy", {TOKENS, Element::FLOAT}, {Element::FLOAT}};
  explicit TokenEnergy(const Attributes& given)
      : margin(given.number("margin")), protect(given.integer("protected")) {}

  void compute(const Context& context) const {
    const Tensor<T> metric = context.input<T>(0);
    const Tensor<float> sizes = context.input<float>(1);
    demand(metric.shape.size() == 4, "metric is [B, H, N, d]", metric.shape);
    const int64_t batch = metric.shape[0], tokens = metric.shape[2];
    demand(sizes.shape == Shape{batch, tokens}, "size is [B, N]", sizes.shape);
    demand(protect >= 0 && protect <= tokens, "protected is a number of the tokens, not", {protect});
    const Keys<T> keys(metric, Stream<T>({nullptr, {batch, tokens, 0}}));
    float* energy = context.output<float>(0, {batch, tokens});

    Arena arena;
    W* units = arena.take<W>(batch * tokens * keys.depth);
    context.parallel(batch * tokens, KEY_GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        unit_key(keys, at / tokens, at % tokens, units + at * keys.depth);
    });
    std::vector<Targets<W>> targets;
    for (int64_t item = 0; item < batch; ++item)
      targets.push_back(felt_by_all(arena, sizes.data + item * tokens,
                                    units + item * tokens * keys.depth, tokens, keys.depth));
    parallel_by_item(context, batch, tokens, ENERGY_GRAIN, [&](int64_t item, int64_t row, int64_t count) {
      const int64_t at = item * tokens + row;
      if (targets[item].count > 0)
        energies(units + at * keys.depth, count, targets[item], W(margin), energy + at);
      else
        std::fill_n(energy + at, count, 0.0f);
    });
  }

  // The tokens behind the prefix that are no padding.
  Targets<W> felt_by_all(Arena& arena, const float* size, const W* units, int64_t tokens,
                         int64_t depth) const {
    const auto real = [](float one) { return one > 0; };
    Targets<W> found(arena, std::count_if(size + protect, size + tokens, real), depth);
    int64_t at = 0;
    for (int64_t token = protect; token < tokens; ++token)
      if (real(size[token])) found.set(at++, units + token * depth, false);
    found.close();
    return found;
  }

  const float margin;
  const int64_t protect;
};

}  // namespace

void add_token_energy(const Library& library) {
  add<TokenEnergy, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
