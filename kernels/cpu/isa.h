// The instruction sets that functions are compiled for; the best one of the processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

#define THRESHER_INLINE inline __attribute__((always_inline))
#define THRESHER_INLINED __attribute__((always_inline))  // of a lambda: behind its parameters

namespace thresher {

// Bytes of a vector register, and how many of them products fill with sums.  Code that is written for any of
// them is told by a template parameter I.
template <int WIDTH, int COUNT>
struct Isa {
  static constexpr int BYTES = WIDTH, SUMS = COUNT;
};

#if defined(__x86_64__)
using Sse2 = Isa<16, 12>;  // of 16 registers
using Avx2 = Isa<32, 12>;
using Avx512 = Isa<64, 24>;  // of 32

enum class Level { SSE2, AVX2, AVX512 };

// The best one of this processor, or what $THRESHER_ISA allows.
inline Level level() {
  static const Level found = [] {
    const char* most = std::getenv("THRESHER_ISA");
    const auto stops_at = [most](const char* name) { return most && std::strcmp(most, name) == 0; };
    if (stops_at("sse2") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("bmi2"))
      return Level::SSE2;
    if (stops_at("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return Level::AVX2;
    return Level::AVX512;
  }();
  return found;
}

template <class Body>
__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))) void with_avx512(const Body& body) {
  body(Avx512{});
}
template <class Body>
__attribute__((target("avx2,fma,bmi2"))) void with_avx2(const Body& body) {
  body(Avx2{});
}

// Calls body(isa), which is to be inlined, as is all that it calls.
template <class Body>
void dispatch(const Body& body) {
  switch (level()) {
    case Level::AVX512: return with_avx512(body);
    case Level::AVX2: return with_avx2(body);
    case Level::SSE2: return body(Sse2{});
  }
}
#else
using Neon = Isa<16, 20>;  // of 32: numbers of rows wait in registers too; part of every aarch64

template <class Body>
void dispatch(const Body& body) {
  body(Neon{});
}
#endif

}  // namespace thresher
