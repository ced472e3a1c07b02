// RestoreTokens on the CPU; see reference.py for what it computes.
#include "cpu/rows.h"

namespace thresher {
namespace {

template <class T>
struct RestoreTokens {
  static constexpr Signature signature{"RestoreTokens", {TOKENS, Element::INT64, TOKENS}, {TOKENS}};
  explicit RestoreTokens(const Attributes&) {}

  void compute(const Context& context) const {
    const Stream<T> x(context.input<T>(0)), aside(context.input<T>(2));
    const Tensor<int64_t> slot = context.input<int64_t>(1);
    demand(slot.shape == Shape{x.batch, aside.tokens} && aside.batch == x.batch,
           "slot is [B, N] of the batch of x and the tokens of aside", slot.shape);
    demand(aside.width == x.width, "aside has the width of x", {aside.width});
    T* y = context.output<T>(0, {aside.batch, aside.tokens, aside.width});
    for (int64_t i = 0; i < slot.count(); ++i)
      demand(slot.data[i] < x.tokens, "slot has positions in x", {slot.data[i]});
    context.parallel(slot.count(), row_grain<T>(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = slot.data[row];
        const T* from =
            at < 0 ? aside.data + row * x.width : x.row(row / aside.tokens, at);
        copy_row(y + row * x.width, from, x.width);
      }
    });
  }
};

}  // namespace

void add_restore_tokens(const Library& library) {
  add<RestoreTokens, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
