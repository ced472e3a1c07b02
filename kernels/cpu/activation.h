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

enum class Activation { SILU, GELU, RELU };

template <Activation KIND, class W>
THRESHER_INLINE W activated(W x) {
  if constexpr (KIND == Activation::RELU) {
    return x < 0 ? 0 : x;  // NaN stays
  } else if constexpr (KIND == Activation::SILU) {
    const W power = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? power : W(1)) / (1 + power);
  } else {
    return W(0.5) * x * (1 + std::erf(x * W(0.70710678118654752)));
  }
}

}  // namespace thresher
