// Element types of tokens, and numbers as integers of the same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace thresher {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline Half narrow<Half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) { return __float2bfloat16_rn(x); }

constexpr uint32_t SIGN = 0x80000000u;
constexpr uint32_t FIRST_KEY = 0xffffffffu;  // before every number

// Of the same order as the numbers; NaN goes below everything, -0 equals 0.
__device__ inline uint32_t order_key(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & SIGN ? ~bits : bits | SIGN;
}
__device__ inline float number_of(uint32_t key) {
  return __uint_as_float(key & SIGN ? key ^ SIGN : ~key);
}

// A number and an index in one integer: the largest has the largest number, of these the lowest index.
using Found = unsigned long long;  // the type that atomicMax takes

__device__ inline Found found(float number, int index) {
  return static_cast<Found>(order_key(number)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ inline int index_of(Found one) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(one));
}
__device__ inline float number_of(Found one) { return number_of(static_cast<uint32_t>(one >> 32)); }

}  // namespace thresher
