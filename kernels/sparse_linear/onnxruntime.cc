// SparseLinear for ONNX Runtime on the CPU; see reference.py for what it computes.
#include "cpu/active.h"
#include "onnxruntime/dense.h"
#include "cpu/pages.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr const char* const NAMES[] = {"SparseLinear", "CompactSparseLinear", "SparseLinearBf16"};

// Tokens of type T, weights of type S.
template <int NAME, class T, class S>
struct Linear {
  static constexpr bool MULTIPLIES = MULTIPLIED<T> && std::is_same_v<T, S>;
  static constexpr Signature signature{
      NAMES[NAME], {TOKENS, std::is_same_v<T, S> ? TOKENS : ELEMENT<S>, Element::FLOAT}, {TOKENS}};

  explicit Linear(const Attributes& given) : most_tokens(given.integer("most_tokens")) {
    if constexpr (MULTIPLIES) product = std::make_unique<Product>(given, ELEMENT<T>, false);
  }

  void compute(const Context& context) const {
    const Tensor<T> x = context.input<T>(0);
    const Tensor<S> weight = context.input<S>(1);
    const Tensor<float> limits = context.input<float>(2);
    demand(!x.shape.empty(), "x is [..., I]", x.shape);
    const int64_t width = x.shape.back();
    demand(weight.shape.size() == 2 && weight.shape[0] == width, "weight is [I, O] for x [..., I]",
           weight.shape);
    demand(limits.shape == Shape{width}, "threshold is [I] for x [..., I]", limits.shape);
    const int64_t columns = weight.shape[1];
    Shape shape = x.shape;
    shape.back() = columns;
    T* y = context.output<T>(0, shape);
    int64_t tokens = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) tokens *= shape[axis];
    const float* threshold = tokens > most_tokens ? nullptr : limits.data;
    if (MULTIPLIES && tokens >= MANY_TOKENS)
      return many(context, y, x, weight, threshold, tokens, columns);
    pages.hold(weight.data, sizeof(S) * static_cast<size_t>(weight.count()));
    for (int64_t at = 0; at < tokens; at += MOST_TOKENS) {
      const int64_t count = std::min(MOST_TOKENS, tokens - at);
      Arena arena;
      const auto channels = active(arena, x.data + at * width, threshold, count, width);
      end_sum<T>(y + at * columns, sum_of_rows(context, arena, channels, weight.data, columns),
                 count * columns);
    }
  }

  // Everything is multiplied, by zeros too.
  void many(const Context& context, T* y, const Tensor<T>& x, const Tensor<S>& weight,
            const float* threshold, int64_t tokens, int64_t columns) const {
    if constexpr (MULTIPLIES) {
      const int64_t width = x.shape.back(), size = tokens * width;
      if (!threshold) return (*product)(context, y, x.data, weight.data, tokens, width, columns);
      Arena arena;
      T* kept = arena.take<T>(size);
      for (int64_t i = 0; i < size; ++i)
        kept[i] = small(x.data[i], threshold[i % width]) ? 0 : x.data[i];
      (*product)(context, y, kept, weight.data, tokens, width, columns);
    }
  }

  const int64_t most_tokens;
  std::unique_ptr<Product> product;
  LargePages pages;
};

template <int NAME>
struct Same {
  template <class T>
  using Kernel = Linear<NAME, T, T>;
};
template <class T>
using Narrow = Linear<2, T, BFloat16>;

}  // namespace

void add_sparse_linear(const Library& library) {
  add<Same<0>::Kernel, float, Half, BFloat16, double>(library);
  add<Same<1>::Kernel, float, Half, BFloat16, double>(library);
  add<Narrow, float>(library);
}

}  // namespace thresher
