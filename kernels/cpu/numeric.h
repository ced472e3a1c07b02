// Element types of tokens, the type that they are computed in, and vectors of that.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/element.h"

// Compiles a function for several instruction sets and picks one when the library is loaded.  On
// aarch64 NEON is always there.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(THRESHER_SANITIZED)
#define THRESHER_VECTORISED \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define THRESHER_VECTORISED
#endif
// Compiles a function for what many_registers() in tile.h asks for, and nothing else.
#if defined(__x86_64__)
#define THRESHER_MANY_REGISTERS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2")))
#else
#define THRESHER_MANY_REGISTERS
#endif
#define THRESHER_INLINE inline __attribute__((always_inline))

namespace thresher {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Bool {
  uint8_t value;
};

template <class T> inline constexpr Element ELEMENT = Element::FLOAT;
template <> inline constexpr Element ELEMENT<double> = Element::DOUBLE;
template <> inline constexpr Element ELEMENT<Half> = Element::FLOAT16;
template <> inline constexpr Element ELEMENT<BFloat16> = Element::BFLOAT16;
template <> inline constexpr Element ELEMENT<int64_t> = Element::INT64;
template <> inline constexpr Element ELEMENT<int32_t> = Element::INT32;
template <> inline constexpr Element ELEMENT<int8_t> = Element::INT8;
template <> inline constexpr Element ELEMENT<uint8_t> = Element::UINT8;
template <> inline constexpr Element ELEMENT<Bool> = Element::BOOL;

template <class To, class From>
THRESHER_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

THRESHER_INLINE float widen(float x) { return x; }
THRESHER_INLINE double widen(double x) { return x; }
THRESHER_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
THRESHER_INLINE float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and mantissa in place, then the bias of the exponent set right; exact, subnormals too.
  const float scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return bits_as<float>(bits_as<uint32_t>(scaled) | special | (uint32_t{x.bits} & 0x8000u) << 16);
}

// The type that arithmetic on T happens in: float32 or wider.
template <class T>
using Wide = decltype(widen(T{}));

template <class T>
THRESHER_INLINE T narrow(Wide<T> x) {
  return x;
}
// Both round to nearest, ties to even.
template <>
THRESHER_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
THRESHER_INLINE Half narrow<Half>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the sum rounds at the place of its last bit
    result = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(result | sign)};
}

constexpr int LANES = 16;
// GCC's and Clang's vectors: arithmetic by lane, comparisons give masks, `mask ? a : b` chooses.
template <class W, int COUNT>
struct VectorOf {
  typedef W type __attribute__((vector_size(COUNT * sizeof(W)), aligned(alignof(W)), may_alias));
};
template <class W, int COUNT = LANES>
using Vector = typename VectorOf<W, COUNT>::type;

template <int COUNT = LANES, class W>
THRESHER_INLINE Vector<W, COUNT> load(const W* from) {
  return *reinterpret_cast<const Vector<W, COUNT>*>(from);
}
template <class W>
THRESHER_INLINE void store(W* to, const Vector<W>& v) {
  *reinterpret_cast<Vector<W>*>(to) = v;
}
// So many elements of any type, widened.
template <int COUNT = LANES, class T>
THRESHER_INLINE Vector<Wide<T>, COUNT> load_wide(const T* from) {
  if constexpr (sizeof(T) == sizeof(Wide<T>)) {
    return load<COUNT>(from);
  } else {
    using Bits = Vector<uint32_t, COUNT>;
    using Floats = Vector<float, COUNT>;
    const Bits bits =
        __builtin_convertvector(load<COUNT>(reinterpret_cast<const uint16_t*>(from)), Bits);
    if constexpr (ELEMENT<T> == Element::BFLOAT16) return bits_as<Floats>(bits << 16);
    const Bits magnitude = bits & 0x7fffu;  // as in widen(Half)
    const Floats scaled = bits_as<Floats>(magnitude << 13) * 0x1p112f;
    const Bits special = magnitude >= 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
    return bits_as<Floats>(bits_as<Bits>(scaled) | special | (bits & 0x8000u) << 16);
  }
}
template <class W, int COUNT = LANES>
THRESHER_INLINE W lane_sum(const Vector<W, COUNT>& v) {
  W sum = 0;
  for (int lane = 0; lane < COUNT; ++lane) sum += v[lane];
  return sum;
}

// Maps a number to an integer of the same order; NaN goes below everything, -0 equals 0.
inline uint64_t order_key(double x) {
  if (x != x) return 0;
  const uint64_t bits = bits_as<uint64_t>(x + 0.0), sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}

}  // namespace thresher
