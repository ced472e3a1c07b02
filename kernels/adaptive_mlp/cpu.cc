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
                          {TOKENS, Element::INT64, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS}, {TOKENS}}
              : Signature{"AdaptiveMLP", {TOKENS, Element::INT64, TOKENS, TOKENS, TOKENS, TOKENS}, {TOKENS}};

    explicit Kernel(const Attributes& given) : node(given, "learners", GATED) {}

    void compute(const Context& context) const {
      const Stream<T> x(context.input<T>(0));
      const Tensor<int64_t> k = context.input<int64_t>(1);
      demand(k.shape == Shape{x.batch, x.tokens}, "k is [B, N]", k.shape);
      node.run(context, Choice::by_count(k.data, x.batch * x.tokens, node.count));
    }

    const LearnersNode<T> node;
  };
};

}  // namespace

void add_adaptive_mlp(const Library& library) {
  add<Adaptive<false>::Kernel, float, Half, BFloat16, double>(library);
  add<Adaptive<true>::Kernel, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
