// SparseSwiGLU, SparseGeGLU and SparseReGLU on the CPU; see reference.py for what they compute.
#include "cpu/activation.h"
#include "cpu/active.h"
#include "cpu/dense.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // activations that are worth a thread of their own

template <Activation KIND, class W>
THRESHER_VECTORISED void activate(W* values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) values[i] = activated<KIND>(values[i]);
}

template <Activation KIND>
struct Gated {
  template <class T>
  struct Kernel {
    using W = Wide<T>;
    static constexpr Signature signature{KIND == Activation::SILU   ? "SparseSwiGLU"
                                         : KIND == Activation::GELU ? "SparseGeGLU"
                                                                    : "SparseReGLU",
                                         {TOKENS, TOKENS, TOKENS, TOKENS, ort::FLOAT}, {TOKENS}};

    explicit Kernel(const Attributes& given) : most_tokens(given.integer("most_tokens")) {
      if constexpr (MULTIPLIED<T>) {
        product = std::make_unique<Product>(given, ELEMENT<T>, false);
        by_rows = std::make_unique<Product>(given, ELEMENT<T>, true);
      }
    }

    struct Layer {
      const T *gate, *up, *down;
      int64_t width, neurons, columns;
    };

    void compute(const Context& context) const {
      const Tensor<T> x = context.input<T>(0), gate = context.input<T>(1);
      const Tensor<T> up = context.input<T>(2), down = context.input<T>(3);
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
      const int64_t step = MULTIPLIED<T> ? tokens : MOST_TOKENS;
      for (int64_t at = 0; at < tokens; at += step)
        few(context, layer, y + at * layer.columns, x.data + at * width, threshold,
            std::min(step, tokens - at));
    }

    void few(const Context& context, const Layer& layer, T* y, const T* x, const float* threshold,
             int64_t tokens) const {
      Arena arena;
      W* h = opened(context, arena, layer, x, tokens);
      if (MULTIPLIED<T> && (!threshold || tokens > MOST_TOKENS))
        return dense(context, arena, layer, y, x, h, threshold, tokens);
      const auto neurons = active(arena, h, threshold, tokens, layer.neurons);
      if (MULTIPLIED<T> && neurons.count > break_even(tokens) * layer.neurons)
        return dense(context, arena, layer, y, x, h, threshold, tokens);
      W* wide = arena.take<W>(tokens * layer.width);
      for (int64_t i = 0; i < tokens * layer.width; ++i) wide[i] = widen(x[i]);
      times_products(context, neurons, layer.up, wide, layer.width);
      end_sum<T>(y, sum_of_rows(context, arena, neurons, layer.down, layer.columns),
                 tokens * layer.columns);
    }

    // [tokens, F]: the activated gate.
    W* opened(const Context& context, Arena& arena, const Layer& layer, const T* x,
              int64_t tokens) const {
      W* h;
      if constexpr (MULTIPLIED<T>) {
        h = arena.take<W>(tokens * layer.neurons);
        (*product)(context, h, x, layer.gate, tokens, layer.width, layer.neurons);
      } else {
        const auto all = active(arena, x, nullptr, tokens, layer.width);
        h = sum_of_rows(context, arena, all, layer.gate, layer.neurons);
      }
      context.parallel(tokens * layer.neurons, GRAIN, [&](int64_t begin, int64_t end) {
        activate<KIND>(h, begin, end);
      });
      return h;
    }

    // Everything is multiplied, by zeros too.
    void dense(const Context& context, Arena& arena, const Layer& layer, T* y, const T* x,
               const W* h, const float* threshold, int64_t tokens) const {
      if constexpr (MULTIPLIED<T>) {
        T* hidden = arena.take<T>(tokens * layer.neurons);
        (*by_rows)(context, hidden, x, layer.up, tokens, layer.width, layer.neurons);
        for (int64_t token = 0; token < tokens; ++token)
          for (int64_t n = 0; n < layer.neurons; ++n) {
            const int64_t at = token * layer.neurons + n;
            hidden[at] = threshold && small(h[at], threshold[n]) ? 0 : hidden[at] * h[at];
          }
        (*product)(context, y, hidden, layer.down, tokens, layer.neurons, layer.columns);
      }
    }

    const int64_t most_tokens;
    std::unique_ptr<Product> product, by_rows;
  };
};

}  // namespace

void add_sparse_gated_ffn(const Library& library) {
  add<Gated<Activation::SILU>::Kernel, float, Half, BFloat16, double>(library);
  add<Gated<Activation::GELU>::Kernel, float, Half, BFloat16, double>(library);
  add<Gated<Activation::RELU>::Kernel, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
