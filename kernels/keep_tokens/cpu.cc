// KeepTokens and FuseTokens on the CPU; see reference.py for what they compute.
#include "cpu/arena.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

// sum_i score_i x_i over the dropped tokens.
template <class T>
void fuse_row(T* to, Wide<T>* sum, const Stream<T>& x, const float* score, const Ranked* dropped, int64_t count,
              int64_t item) {
  std::fill(sum, sum + x.width, Wide<T>(0));
  dispatch([&](auto) THRESHER_INLINED {
    for (int64_t i = 0; i < count; ++i)
      add_to_sum<T>(sum, score[dropped[i].index], x.row(item, dropped[i].index), x.width);
    end_sum<T>(to, sum, x.width);
  });
}

template <bool FUSES>
struct Keep {
  template <class T>
  struct Kernel {
    static constexpr Signature signature{FUSES ? "FuseTokens" : "KeepTokens",
                                         {TOKENS, Element::FLOAT, Element::INT64},
                                         {TOKENS, Element::INT64, Element::INT64}};
    explicit Kernel(const Attributes& given) : protect(given.integer("protected")) {}

    void compute(const Context& context) const {
      const Stream<T> x(context.input<T>(0));
      const Tensor<float> scores = context.input<float>(1);
      const int64_t keep = context.scalar(2);
      demand(scores.shape == Shape{x.batch, x.tokens}, "score is [B, N]", scores.shape);
      demand(protect >= 0 && protect + FUSES <= x.tokens, "protected is a number of the tokens",
             {protect});
      demand(protect + FUSES <= keep && keep <= x.tokens, "keep can be reached", {keep});

      T* y = context.output<T>(0, {x.batch, keep, x.width});
      int64_t* kept = context.output<int64_t>(1, {x.batch, keep});
      int64_t* slot = context.output<int64_t>(2, {x.batch, x.tokens});
      Arena arena;
      const int64_t behind = x.tokens - protect, chosen = keep - protect - FUSES;
      Ranked* all = arena.take<Ranked>(x.batch * behind);
      Wide<T>* sums = arena.take<Wide<T>>(FUSES ? x.batch * x.width : 0);

      context.parallel(x.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          Ranked* ranked = all + item * behind;
          const float* score = scores.data + item * x.tokens;
          for (int64_t i = 0; i < behind; ++i)
            ranked[i] = {order_key(score[protect + i]), protect + i};
          std::nth_element(ranked, ranked + chosen, ranked + behind);  // [chosen]: best dropped
          std::sort(ranked, ranked + chosen, by_index);
          if (slot) std::fill(slot + item * x.tokens, slot + (item + 1) * x.tokens, -1);
          for (int64_t row = 0; row < keep; ++row) {
            const bool fused = FUSES && row == keep - 1;
            const int64_t from = row < protect ? row : ranked[row - protect].index;
            if (kept) kept[item * keep + row] = from;
            if (slot && !fused) slot[item * x.tokens + from] = row;
          }
          if (FUSES)
            fuse_row<T>(y + (item * keep + keep - 1) * x.width, sums + item * x.width, x, score,
                        ranked + chosen, behind - chosen, item);
        }
      });
      const int64_t copied = keep - FUSES;
      context.parallel(x.batch * copied, row_grain<T>(x.width), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
          const int64_t item = at / copied, row = at % copied;
          const int64_t from = row < protect ? row : all[item * behind + row - protect].index;
          copy_row(y + (item * keep + row) * x.width, x.row(item, from), x.width);
        }
      });
    }

    const int64_t protect;
  };
};

}  // namespace

void add_keep_tokens(const Library& library) {
  add<Keep<false>::Kernel, float, Half, BFloat16, double>(library);
  add<Keep<true>::Kernel, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
