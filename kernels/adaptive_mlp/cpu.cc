// AdaptiveMLP and AdaptiveGatedMLP on the CPU; see their reference.py for what they compute.
#include "cpu/learners.h"

namespace thresher {
namespace {

template <bool GATED>
struct Adaptive {
  template <class T>
  struct Kernel {
    static constexpr Signature signature =
        GATED ? Signature{"AdaptiveGatedMLP",
                          {TOKENS, ort::INT64, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS}, {TOKENS}}
              : Signature{"AdaptiveMLP", {TOKENS, ort::INT64, TOKENS, TOKENS, TOKENS}, {TOKENS}};

    explicit Kernel(const Attributes& given)
        : learners(given.integer("learners")), activation(activation_called(given.text("activation"))) {}

    void compute(const Context& context) const {
      const Tensor<T> given = context.input<T>(0);
      const Stream<T> x(given);
      const Tensor<int64_t> k = context.input<int64_t>(1);
      demand(k.shape == Shape{x.batch, x.tokens}, "k is [B, N]", k.shape);
      const Learners<T> weights(context, GATED, learners, x.width);
      weights.in_large_pages(pages);
      T* y = context.output<T>(0, given.shape);
      run_learners(context, weights, activation,
                   Choice::by_count(k.data, x.batch * x.tokens, learners), x.data, y);
    }

    const int64_t learners;
    const Activation activation;
    std::array<LargePages, 3> pages;
  };
};

}  // namespace

void add_adaptive_mlp(const Library& library) {
  add<Adaptive<false>::Kernel, float, Half, BFloat16, double>(library);
  add<Adaptive<true>::Kernel, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
