// AdaptiveGate on the CPU; see reference.py for what it computes.
#include "cpu/rows.h"

namespace thresher {
namespace {

constexpr int GATE_CHOICES = 5;  // multiplied together: four learners or none
template <class I>
constexpr int GATE_ROWS = I::SUMS / GATE_CHOICES;  // whose sums stay in registers
constexpr int64_t GATE_GRAIN = int64_t{1} << 17;  // multiplications that are worth a thread

// Weights of a linear with one output for each choice.
struct Choices {
  const float *weights, *bias;  // [count, width], [count]
  int64_t count, width;
};

// Whether choices `first`, ... have larger logits than those before, for ROWS tokens.
template <class I, int ROWS, int CHOICES, class T>
THRESHER_INLINE void compare(const T* x, const Choices& of, int64_t first, Wide<T>* most, int64_t* k) {
  using W = Wide<T>;
  constexpr int64_t ONE = LANES<I, W>;
  const float* weights = of.weights + first * of.width;
  Vector<I, W> sums[ROWS][CHOICES] = {};
  int64_t i = 0;
  for (; i + ONE <= of.width; i += ONE) {
    Vector<I, W> rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = load_wide<I>(x + r * of.width + i);
    for (int c = 0; c < CHOICES; ++c) {
      const Vector<I, W> weight = load_as<I, W>(weights + c * of.width + i);
      for (int r = 0; r < ROWS; ++r) sums[r][c] += rows[r] * weight;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHOICES; ++c) {
      W logit = lane_sum(sums[r][c]) + W(of.bias[first + c]);
      for (int64_t rest = i; rest < of.width; ++rest)
        logit += widen(x[r * of.width + rest]) * W(weights[c * of.width + rest]);
      if (logit > most[r]) most[r] = logit, k[r] = first + c;
    }
}

template <class I, int ROWS, class T>
THRESHER_INLINE void choose_rows(const T* x, const Choices& of, int64_t* k) {
  Wide<T> most[ROWS];
  std::fill_n(most, ROWS, -std::numeric_limits<Wide<T>>::infinity());
  std::fill_n(k, ROWS, 0);
  int64_t first = 0;
  for (; first + GATE_CHOICES <= of.count; first += GATE_CHOICES)
    compare<I, ROWS, GATE_CHOICES>(x, of, first, most, k);
  for (; first < of.count; ++first) compare<I, ROWS, 1>(x, of, first, most, k);
}

template <class T>
void choose(const T* x, int64_t rows, const Choices& of, int64_t* k) {
  dispatch([&](auto isa) THRESHER_INLINED {
    using I = decltype(isa);
    int64_t row = 0;
    for (; row + GATE_ROWS<I> <= rows; row += GATE_ROWS<I>)
      choose_rows<I, GATE_ROWS<I>>(x + row * of.width, of, k + row);
    for (; row < rows; ++row) choose_rows<I, 1>(x + row * of.width, of, k + row);
  });
}

template <class T>
struct AdaptiveGate {
  static constexpr Signature signature{
      "AdaptiveGate", {TOKENS, Element::FLOAT, Element::FLOAT}, {Element::INT64}};
  explicit AdaptiveGate(const Attributes&) {}

  void compute(const Context& context) const {
    const Stream<T> x(context.input<T>(0));
    const Tensor<float> gate = context.input<float>(1), bias = context.input<float>(2);
    demand(gate.shape.size() == 2 && gate.shape[0] > 0 && gate.shape[1] == x.width,
           "gate is [M, D] of x [B, N, D]", gate.shape);
    const Choices of{gate.data, bias.data, gate.shape[0], x.width};
    demand(bias.shape == Shape{of.count}, "bias is [M] for gate [M, D]", bias.shape);
    int64_t* k = context.output<int64_t>(0, {x.batch, x.tokens});
    const int64_t grain = GATE_GRAIN / std::max<int64_t>(1, of.count * of.width);
    context.parallel(x.batch * x.tokens, grain, [&](int64_t begin, int64_t end) {
      choose(x.data + begin * of.width, end - begin, of, k + begin);
    });
  }
};

}  // namespace

void add_adaptive_gate(const Library& library) {
  add<AdaptiveGate, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
