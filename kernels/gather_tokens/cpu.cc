// GatherTokens on the CPU; see reference.py for what it computes.
#include "cpu/rows.h"

namespace thresher {
namespace {

template <class T>
struct GatherTokens {
  static constexpr Signature signature{"GatherTokens", {TOKENS, Element::INT64}, {TOKENS}};
  explicit GatherTokens(const Attributes&) {}

  void compute(const Context& context) const {
    const Tensor<T> x = context.input<T>(0);
    const Tensor<int64_t> index = context.input<int64_t>(1);
    demand(x.shape.size() >= 2, "x has rank 2 or more", x.shape);
    demand(index.shape.size() == 2 && index.shape[0] == x.shape[0],
           "index is [B, K] of the same batch as x", index.shape);
    const int64_t tokens = x.shape[1], count = index.shape[1];
    Shape shape = x.shape;
    shape[1] = count;
    T* y = context.output<T>(0, shape);
    int64_t width = 1;
    for (size_t axis = 2; axis < shape.size(); ++axis) width *= shape[axis];
    for (int64_t i = 0; i < index.count(); ++i)
      demand(-tokens <= index.data[i] && index.data[i] < tokens,
             "index has positions of tokens", {index.data[i]});
    context.parallel(index.count(), row_grain<T>(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = index.data[row], token = at < 0 ? at + tokens : at;
        copy_row(y + row * width, x.data + (row / count * tokens + token) * width, width);
      }
    });
  }
};

}  // namespace

void add_gather_tokens(const Library& library) {
  add<GatherTokens, float, Half, BFloat16, double, int64_t, int32_t, int8_t, uint8_t, Bool>(
      library);
}

}  // namespace thresher
