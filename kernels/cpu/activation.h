// Functions of one number, for LANES numbers at once.
#pragma once

#include <cmath>
#include <string>

#include "cpu/numeric.h"

namespace thresher {

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest (Cephes' expf).
THRESHER_INLINE Vector<float> exponential(const Vector<float>& x) {
  const Vector<float> bounded = x > -87.0f ? x : Vector<float>{} - 87.0f;  // NaN too
  const Vector<float> n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
  const Vector<float> r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = __builtin_convertvector(n, Vector<int32_t>) + 127;
  const Vector<float> power = bits_as<Vector<float>>(exponent << 23);
  return x != x ? x : x < -87.0f ? Vector<float>{} : p * power;
}

// The error function to 1e-7: one minus e to x times a polynomial, a least-maximum fit of -log(erfc x) / x on
// [0, 4].  Whoever needs a small result to its last place needs another.
THRESHER_INLINE Vector<float> error_function(const Vector<float>& x) {
  const Vector<float> size = x < 0.0f ? -x : x, most = Vector<float>{} + 4.0f;
  const Vector<float> bounded = size < most ? size : most;
  Vector<float> p = bounded * 3.144015715e-5f - 3.088020757e-4f;
  p = p * bounded + 1.032401135e-3f;
  p = p * bounded + 5.369344563e-4f;
  p = p * bounded - 1.958396138e-2f;
  p = p * bounded + 1.029196138e-1f;
  p = p * bounded + 6.365977333e-1f;
  p = p * bounded + 1.128380252f;
  const Vector<float> result = 1.0f - exponential(-bounded * p);
  return x != x ? x : x < 0.0f ? -result : result;
}

THRESHER_INLINE Vector<double> exponential(const Vector<double>& x) {
  Vector<double> y;
  for (int lane = 0; lane < LANES; ++lane) y[lane] = std::exp(x[lane]);
  return y;
}
THRESHER_INLINE Vector<double> error_function(const Vector<double>& x) {
  Vector<double> y;
  for (int lane = 0; lane < LANES; ++lane) y[lane] = std::erf(x[lane]);
  return y;
}

template <class V>
THRESHER_INLINE V sigmoid(const V& x) {
  const V power = exponential(x < 0 ? x : -x);
  return (x < 0 ? power : V{} + 1) / (1 + power);
}

enum class Activation { SILU, GELU, RELU, GELU_TANH, QUICK_GELU, IDENTITY };

template <Activation KIND, class W>
THRESHER_INLINE Vector<W> activated(const Vector<W>& x) {
  if constexpr (KIND == Activation::IDENTITY) return x;
  if constexpr (KIND == Activation::RELU) return x < 0 ? Vector<W>{} : x;  // NaN stays
  if constexpr (KIND == Activation::SILU) return x * sigmoid(x);
  if constexpr (KIND == Activation::QUICK_GELU) return x * sigmoid(W(1.702) * x);
  if constexpr (KIND == Activation::GELU)
    return W(0.5) * x * (1 + error_function(x * W(0.70710678118654752)));
  // (1 + tanh u) / 2 is the sigmoid of 2 u
  if constexpr (KIND == Activation::GELU_TANH)
    return x * sigmoid(W(1.5957691216057308) * (x + W(0.044715) * x * x * x));
}

// values[i] = function(values[i]), a vector of them at a time.
template <class W, class Function>
THRESHER_INLINE void change_all(W* values, int64_t count, const Function& function) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store<W>(values + i, function(load(values + i)));
  if (i == count) return;
  W rest[LANES] = {};
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(W);
  std::memcpy(rest, values + i, bytes);
  store<W>(rest, function(load(rest)));
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
