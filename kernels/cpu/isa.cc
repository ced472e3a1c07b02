// Tells which instruction set the kernels run with.
#include "cpu/isa.h"

extern "C" __attribute__((visibility("default"))) const char* thresher_isa() {
#if defined(__x86_64__)
  using thresher::Level;
  const Level found = thresher::level();
  return found == Level::AVX512 ? "avx512" : found == Level::AVX2 ? "avx2" : "sse2";
#else
  return "neon";
#endif
}
