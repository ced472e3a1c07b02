// Rows of tokens, and sums over the threads beside each other.
#pragma once

#include "cuda/kernel.h"

namespace thresher {

// The sum of a value over the LANES threads of a row of the block, the same in all of them.
template <int ROWS>
__device__ inline float sum_of_lanes(float value, float (&shared)[ROWS][LANES]) {
  __syncthreads();  // the last sum has been read
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += shared[threadIdx.y][lane];
  return sum;
}

// By all threads of a block of one axis.
template <class T>
__device__ inline void copy_row(T* to, const T* from, int64_t width) {
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) to[c] = from[c];
}

// The `stay` tokens of `origin` go to the first of `keep` rows; kept may be null.  One block for each.
template <class T>
__global__ void copy_rows(const T* x, int tokens, int stay, int keep, int64_t width,
                          const int* origin, T* y, int64_t* kept) {
  const int64_t item = blockIdx.x / stay, row = blockIdx.x % stay;
  const int64_t from = origin[item * stay + row];
  if (kept && threadIdx.x == 0) kept[item * keep + row] = from;
  copy_row(y + (item * keep + row) * width, x + (item * tokens + from) * width, width);
}

struct alignas(16) Sixteen {
  uint64_t low, high;
};

// Calls body(Unit{}) with the largest unit in which rows of so many bytes can be copied.
template <class Body>
void by_unit(int64_t bytes, const void* from, const void* to, const Body& body) {
  const auto all = static_cast<uint64_t>(bytes) | reinterpret_cast<uintptr_t>(from) |
                   reinterpret_cast<uintptr_t>(to);
  if (all % 16 == 0)
    body(Sixteen{});
  else if (all % 8 == 0)
    body(uint64_t{});
  else if (all % 4 == 0)
    body(uint32_t{});
  else if (all % 2 == 0)
    body(uint16_t{});
  else
    body(uint8_t{});
}

}  // namespace thresher
