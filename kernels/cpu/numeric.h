// Element types of tokens, the type that they are computed in, and vectors of that.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/element.h"
#include "cpu/isa.h"

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

// GCC's and Clang's vectors: arithmetic by lane, comparisons give masks, `mask ? a : b` chooses.
template <class W, int COUNT>
struct VectorOf {
  typedef W type __attribute__((vector_size(COUNT * sizeof(W))));
};
template <class I, class W>
inline constexpr int LANES = I::BYTES / int{sizeof(W)};
// As long as the registers are: the compiler keeps a longer one in memory.
template <class I, class W>
using Vector = typename VectorOf<W, LANES<I, W>>::type;
template <class V>
using LaneOf = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
inline constexpr int LANES_OF = int{sizeof(V) / sizeof(LaneOf<V>)};

// Numbers in memory need not be aligned to vectors.
template <class V>
THRESHER_INLINE V load_vector(const LaneOf<V>* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class I, class W>
THRESHER_INLINE Vector<I, W> load(const W* from) {
  return load_vector<Vector<I, W>>(from);
}
template <class V>
THRESHER_INLINE void store(LaneOf<V>* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}
// As many elements of any type as a vector of W has.
template <class I, class W, class T>
THRESHER_INLINE Vector<I, W> load_as(const T* from) {
  constexpr int COUNT = LANES<I, W>;
  if constexpr (sizeof(T) == sizeof(W)) {
    return load<I>(from);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_convertvector(load_vector<typename VectorOf<T, COUNT>::type>(from), Vector<I, W>);
  } else {
    using Bits = Vector<I, uint32_t>;
    using Floats = Vector<I, float>;
    using Given = typename VectorOf<uint16_t, COUNT>::type;
    const Bits bits = __builtin_convertvector(load_vector<Given>(reinterpret_cast<const uint16_t*>(from)), Bits);
    if constexpr (ELEMENT<T> == Element::BFLOAT16) return bits_as<Floats>(bits << 16);
    const Bits magnitude = bits & 0x7fffu;  // as in widen(Half)
    const Floats scaled = bits_as<Floats>(magnitude << 13) * 0x1p112f;
    const Bits special = magnitude >= 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
    return bits_as<Floats>(bits_as<Bits>(scaled) | special | (bits & 0x8000u) << 16);
  }
}
template <class I, class T>
THRESHER_INLINE Vector<I, Wide<T>> load_wide(const T* from) {
  return load_as<I, Wide<T>>(from);
}
template <class V>
THRESHER_INLINE LaneOf<V> lane_sum(const V& v) {
  LaneOf<V> sum = 0;
  for (int lane = 0; lane < LANES_OF<V>; ++lane) sum += v[lane];
  return sum;
}

// Maps a number to an integer of the same order; NaN goes below everything, -0 equals 0.
inline uint64_t order_key(double x) {
  if (x != x) return 0;
  const uint64_t bits = bits_as<uint64_t>(x + 0.0), sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}

}  // namespace thresher
