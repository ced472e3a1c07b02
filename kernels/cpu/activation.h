// Functions of one number, for all in a vector at once.
#pragma once

#include <cmath>
#include <string>

#include "cpu/numeric.h"

namespace thresher {

// function(x) lane by lane, for what has no formula here.
template <class V, class Function>
THRESHER_INLINE V by_lane(const V& x, const Function& function) {
  V y;
  for (int lane = 0; lane < LANES_OF<V>; ++lane) y[lane] = function(x[lane]);
  return y;
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest (Cephes' expf).
template <class V>
THRESHER_INLINE V exponential(const V& x) {
  if constexpr (std::is_same_v<LaneOf<V>, double>) {
    return by_lane(x, [](double one) { return std::exp(one); });
  } else {
    const V bounded = x > -87.0f ? x : V{} - 87.0f;  // NaN too
    const V n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    const V r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const auto exponent = __builtin_convertvector(n, typename VectorOf<int32_t, LANES_OF<V>>::type) + 127;
    const V power = bits_as<V>(exponent << 23);
    return x != x ? x : x < -87.0f ? V{} : p * power;
  }
}

// The error function to 1e-7: one minus e to x times a polynomial, a least-maximum fit of -log(erfc x) / x on
// [0, 4].  Whoever needs a small result to its last place needs another.
template <class V>
THRESHER_INLINE V error_function(const V& x) {
  if constexpr (std::is_same_v<LaneOf<V>, double>) {
    return by_lane(x, [](double one) { return std::erf(one); });
  } else {
    const V size = x < 0.0f ? -x : x, most = V{} + 4.0f;
    const V bounded = size < most ? size : most;
    V p = bounded * 3.144015715e-5f - 3.088020757e-4f;
    p = p * bounded + 1.032401135e-3f;
    p = p * bounded + 5.369344563e-4f;
    p = p * bounded - 1.958396138e-2f;
    p = p * bounded + 1.029196138e-1f;
    p = p * bounded + 6.365977333e-1f;
    p = p * bounded + 1.128380252f;
    const V result = 1.0f - exponential(-bounded * p);
    return x != x ? x : x < 0.0f ? -result : result;
  }
}

template <class V>
THRESHER_INLINE V sigmoid(const V& x) {
  const V power = exponential(x < 0 ? x : -x);
  return (x < 0 ? power : V{} + 1) / (1 + power);
}

enum class Activation { SILU, GELU, RELU, GELU_TANH, QUICK_GELU, IDENTITY };

template <Activation KIND, class V>
THRESHER_INLINE V activated(const V& x) {
  using W = LaneOf<V>;
  if constexpr (KIND == Activation::IDENTITY) return x;
  if constexpr (KIND == Activation::RELU) return x < 0 ? V{} : x;  // NaN stays
  if constexpr (KIND == Activation::SILU) return x * sigmoid(x);
  if constexpr (KIND == Activation::QUICK_GELU) return x * sigmoid(W(1.702) * x);
  if constexpr (KIND == Activation::GELU)
    return W(0.5) * x * (1 + error_function(x * W(0.70710678118654752)));
  // (1 + tanh u) / 2 is the sigmoid of 2 u
  if constexpr (KIND == Activation::GELU_TANH)
    return x * sigmoid(W(1.5957691216057308) * (x + W(0.044715) * x * x * x));
}

// values[i] = function(values[i]), a vector of them at a time.
template <class I, class W, class Function>
THRESHER_INLINE void change_all(W* values, int64_t count, const Function& function) {
  constexpr int64_t ONE = LANES<I, W>;
  int64_t i = 0;
  for (; i + ONE <= count; i += ONE) store(values + i, function(load<I>(values + i)));
  if (i == count) return;
  W rest[ONE] = {};
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(W);
  std::memcpy(rest, values + i, bytes);
  store(rest, function(load<I>(static_cast<const W*>(rest))));
  std::memcpy(values + i, rest, bytes);
}

// By the names in activations.py; throws an Error for another.
Activation activation_called(const std::string& name);

template <class W>
struct Rows {
  W* data;
  int64_t count, width, stride;
};
void activate(Activation kind, const Rows<float>& of);
void activate(Activation kind, const Rows<double>& of);

}  // namespace thresher
