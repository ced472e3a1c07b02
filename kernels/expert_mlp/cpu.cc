// ExpertMLP on the CPU; see reference.py for what it computes.
#include "cpu/learners.h"

namespace thresher {
namespace {

template <class T>
struct Experts {
  static constexpr Signature signature{
      "ExpertMLP", {TOKENS, ort::BOOL, TOKENS, TOKENS, TOKENS}, {TOKENS}};

  explicit Experts(const Attributes& given)
      : experts(given.integer("experts")), activation(activation_called(given.text("activation"))) {}

  void compute(const Context& context) const {
    const Tensor<T> given = context.input<T>(0);
    const Stream<T> x(given);
    const Tensor<Bool> run = context.input<Bool>(1);
    demand(run.shape == Shape{x.batch, x.tokens, experts}, "run is [B, N, E]", run.shape);
    const Learners<T> weights(context, false, experts, x.width);
    weights.in_large_pages(pages);
    T* y = context.output<T>(0, given.shape);
    run_learners(context, weights, activation,
                 Choice::by_mask(run.data, x.batch * x.tokens, experts), x.data, y);
  }

  const int64_t experts;
  const Activation activation;
  std::array<LargePages, 3> pages;
};

}  // namespace

void add_expert_mlp(const Library& library) {
  add<Experts, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
