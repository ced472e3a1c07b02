// SparseSwiGLU, SparseGeGLU and SparseReGLU for ONNX Runtime on the CPU, also with weights in bfloat16; see
// reference.py for what they compute.
#include "cpu/activation.h"
#include "cpu/active.h"
#include "onnxruntime/dense.h"
#include "cpu/pages.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr const char* const NAMES[][2] = {{"SparseSwiGLU", "SparseSwiGLUBf16"},
                                          {"SparseGeGLU", "SparseGeGLUBf16"},
                                          {"SparseReGLU", "SparseReGLUBf16"}};
constexpr int64_t GRAIN = 1 << 13;  // activations that are worth a thread of their own

// Weights of type S, or of the type T of the tokens.
template <Activation KIND, class S = void>
struct Gated {
  template <class T>
  struct Kernel {
    static constexpr bool NARROW = !std::is_void_v<S>;
    using W = Wide<T>;
    using M = std::conditional_t<NARROW, S, T>;
    static constexpr bool MULTIPLIES = MULTIPLIED<T> && !NARROW;
    static constexpr Element WEIGHT = NARROW ? ELEMENT<M> : TOKENS;
    static constexpr Signature signature{NAMES[static_cast<int>(KIND)][NARROW],
                                         {TOKENS, WEIGHT, WEIGHT, WEIGHT, Element::FLOAT}, {TOKENS}};

    explicit Kernel(const Attributes& given) : most_tokens(given.integer("most_tokens")) {
      if constexpr (MULTIPLIES) {
        product = std::make_unique<Product>(given, ELEMENT<T>, false);
        by_rows = std::make_unique<Product>(given, ELEMENT<T>, true);
      }
    }

    struct Layer {
      const M *gate, *up, *down;
      int64_t width, neurons, columns;
    };

    void compute(const Context& context) const {
      const Tensor<T> x = context.input<T>(0);
      const Tensor<M> gate = context.input<M>(1), up = context.input<M>(2),
                      down = context.input<M>(3);
      const Tensor<float> limits = context.input<float>(4);
      demand(!x.shape.empty(), "x is [..., I]", x.shape);
      const int64_t width = x.shape.back();
      demand(limits.shape.size() == 1, "threshold is [F]", limits.shape);
      const int64_t neurons = limits.shape[0];
      demand(gate.shape == Shape{width, neurons}, "gate is [I, F] for x [..., I] and threshold [F]",
             gate.shape);
      demand(up.shape == Shape{neurons, width}, "up is [F, I] for x [..., I] and threshold [F]",
             up.shape);
      demand(down.shape.size() == 2 && down.shape[0] == neurons, "down is [F, O] for threshold [F]",
             down.shape);
      const Layer layer{gate.data, up.data, down.data, width, neurons, down.shape[1]};
      Shape shape = x.shape;
      shape.back() = layer.columns;
      T* y = context.output<T>(0, shape);
      int64_t tokens = 1;
      for (size_t axis = 0; axis + 1 < shape.size(); ++axis) tokens *= shape[axis];
      const float* threshold = tokens > most_tokens ? nullptr : limits.data;
      if (MULTIPLIES && tokens >= MANY_TOKENS)
        return many(context, layer, y, x.data, threshold, tokens);
      const Tensor<M>* matrices[] = {&gate, &up, &down};
      for (int i = 0; i < 3; ++i)
        pages[i].hold(matrices[i]->data, sizeof(M) * static_cast<size_t>(matrices[i]->count()));
      for (int64_t at = 0; at < tokens; at += MOST_TOKENS)
        few(context, layer, y + at * layer.columns, x.data + at * width, threshold,
            std::min(MOST_TOKENS, tokens - at));
    }

    void few(const Context& context, const Layer& layer, T* y, const T* x, const float* threshold,
             int64_t tokens) const {
      Arena arena;
      const auto all = active(arena, x, nullptr, tokens, layer.width);
      W* h = sum_of_rows(context, arena, all, layer.gate, layer.neurons);
      activate_all(context, h, tokens * layer.neurons);
      const auto neurons = active(arena, h, threshold, tokens, layer.neurons);
      W* wide = arena.take<W>(tokens * layer.width);
      for (int64_t i = 0; i < tokens * layer.width; ++i) wide[i] = widen(x[i]);
      times_products(context, neurons, layer.up, wide, layer.width);
      end_sum<T>(y, sum_of_rows(context, arena, neurons, layer.down, layer.columns),
                 tokens * layer.columns);
    }

    // Everything is multiplied, by zeros too.
    void many(const Context& context, const Layer& layer, T* y, const T* x, const float* threshold,
              int64_t tokens) const {
      if constexpr (MULTIPLIES) {
        Arena arena;
        const int64_t size = tokens * layer.neurons;
        T *h = arena.take<T>(size), *hidden = arena.take<T>(size);
        (*product)(context, h, x, layer.gate, tokens, layer.width, layer.neurons);
        activate_all(context, h, size);
        (*by_rows)(context, hidden, x, layer.up, tokens, layer.width, layer.neurons);
        for (int64_t i = 0; i < size; ++i)
          hidden[i] = threshold && small(h[i], threshold[i % layer.neurons]) ? 0 : hidden[i] * h[i];
        (*product)(context, y, hidden, layer.down, tokens, layer.neurons, layer.columns);
      }
    }

    static void activate_all(const Context& context, W* values, int64_t count) {
      context.parallel(count, GRAIN, [&](int64_t begin, int64_t end) {
        activate(KIND, Rows<W>{values + begin, 1, end - begin, 0});
      });
    }

    const int64_t most_tokens;
    std::unique_ptr<Product> product, by_rows;
    LargePages pages[3];
  };
};

}  // namespace

void add_sparse_gated_ffn(const Library& library) {
  add<Gated<Activation::SILU>::Kernel, float, Half, BFloat16, double>(library);
  add<Gated<Activation::GELU>::Kernel, float, Half, BFloat16, double>(library);
  add<Gated<Activation::RELU>::Kernel, float, Half, BFloat16, double>(library);
  add<Gated<Activation::SILU, BFloat16>::Kernel, float>(library);
  add<Gated<Activation::GELU, BFloat16>::Kernel, float>(library);
  add<Gated<Activation::RELU, BFloat16>::Kernel, float>(library);
}

}  // namespace thresher
