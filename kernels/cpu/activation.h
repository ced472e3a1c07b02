// Functions of one number.
#pragma once

#include <cmath>

#include "cpu/numeric.h"

namespace thresher {

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest (Cephes' expf).
THRESHER_INLINE float exponential(float x) {
  const float bounded = x > -87.0f ? x : -87.0f;  // NaN too
  const float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = bits_as<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x != x ? x : x < -87.0f ? 0.0f : p * power;
}
THRESHER_INLINE double exponential(double x) { return std::exp(x); }

// The error function to 1e-7: one minus e to x times a polynomial, a least-maximum fit of -log(erfc x) / x on
// [0, 4].  Whoever needs a small result to its last place needs another.
THRESHER_INLINE float error_function(float x) {
  const float size = x < 0 ? -x : x, bounded = size < 4 ? size : 4;
  float p = 3.144015715e-5f;
  p = p * bounded - 3.088020757e-4f;
  p = p * bounded + 1.032401135e-3f;
  p = p * bounded + 5.369344563e-4f;
  p = p * bounded - 1.958396138e-2f;
  p = p * bounded + 1.029196138e-1f;
  p = p * bounded + 6.365977333e-1f;
  p = p * bounded + 1.128380252f;
  const float result = 1 - exponential(-bounded * p);
  return x != x ? x : x < 0 ? -result : result;
}
THRESHER_INLINE double error_function(double x) { return std::erf(x); }

template <class W>
THRESHER_INLINE W sigmoid(W x) {
  const W power = exponential(x < 0 ? x : -x);
  return (x < 0 ? power : W(1)) / (1 + power);
}

enum class Activation { SILU, GELU, RELU, GELU_TANH, QUICK_GELU, IDENTITY };

template <Activation KIND, class W>
THRESHER_INLINE W activated(W x) {
  if constexpr (KIND == Activation::IDENTITY) return x;
  if constexpr (KIND == Activation::RELU) return x < 0 ? 0 : x;  // NaN stays
  if constexpr (KIND == Activation::SILU) return x * sigmoid(x);
  if constexpr (KIND == Activation::QUICK_GELU) return x * sigmoid(W(1.702) * x);
  if constexpr (KIND == Activation::GELU)
    return W(0.5) * x * (1 + error_function(x * W(0.70710678118654752)));
  // (1 + tanh u) / 2 is the sigmoid of 2 u
  if constexpr (KIND == Activation::GELU_TANH)
    return x * sigmoid(W(1.5957691216057308) * (x + W(0.044715) * x * x * x));
}

}  // namespace thresher
