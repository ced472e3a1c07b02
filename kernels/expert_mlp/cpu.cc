// ExpertMLP on the CPU; see reference.py for what it computes.
#include "cpu/learners.h"

namespace thresher {
namespace {

template <class T>
struct Experts {
  static constexpr Signature signature{
      "ExpertMLP", {TOKENS, Element::BOOL, TOKENS, TOKENS, TOKENS, TOKENS}, {TOKENS}};

  explicit Experts(const Attributes& given) : node(given, "experts", false) {}

  void compute(const Context& context) const {
    const Stream<T> x(context.input<T>(0));
    const Tensor<Bool> run = context.input<Bool>(1);
    demand(run.shape == Shape{x.batch, x.tokens, node.count}, "run is [B, N, L]", run.shape);
    node.run(context, Choice::by_mask(run.data, x.batch * x.tokens, node.count));
  }

  const LearnersNode<T> node;
};

}  // namespace

void add_expert_mlp(const Library& library) {
  add<Experts, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
