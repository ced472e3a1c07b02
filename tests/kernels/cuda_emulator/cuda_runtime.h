// Enough of CUDA for kernels/**/*.cu to be compiled by a C++ compiler and run on a CPU, for tests.
//
// Each thread of a block is a context of its own that runs until it ends or meets a barrier; blocks run
// one after the other.  Threads and blocks run in rising or in falling order of their index, as
// thresher_emulator_falling() says: a kernel that lacks a barrier, or hangs on the order of its blocks,
// then computes two different things.  A barrier that not all threads of a block meet ends the process.
// "Device" memory is ordinary memory, so AddressSanitizer sees every access.
//
// This shows that arithmetic, indices and barriers are right.  It shows nothing about speed, and a race
// only where one of the two orders brings it out.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at = std::max(before, value);
  return before;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace emulator {

inline bool falling = false;

// Runs the threads of one block after the other.
class Block {
 public:
  Block(unsigned threads, const std::function<void()>& body) : threads_(threads), body_(body) {}

  void run() {
    running() = this;
    while (started_ < threads_) resume(fresh());
    while (!waiting_.empty()) {
      if (waiting_.size() != threads_) {
        std::fputs("a barrier was not met by all threads of a block\n", stderr);
        std::abort();
      }
      std::vector<Context*> turn;
      turn.swap(waiting_);
      for (Context* one : turn) resume(one);
    }
  }

  static void barrier() {
    Block& block = *running();
    Context* own = block.current_;
    block.waiting_.push_back(own);
    swapcontext(&own->context, &block.home_);
  }

 private:
  static constexpr size_t STACK = 1 << 16;
  struct Context {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    dim3 thread;
  };

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

  // A context that starts the threads that are left, one after the other, until one waits.
  Context* fresh() {
    static std::vector<std::unique_ptr<Context>> pool;
    if (pool.size() <= contexts_) pool.push_back(std::make_unique<Context>());
    Context* found = pool[contexts_++].get();
    getcontext(&found->context);
    found->context.uc_stack.ss_sp = found->stack.get();
    found->context.uc_stack.ss_size = STACK;
    found->context.uc_link = &home_;
    makecontext(&found->context, &Block::enter, 0);
    return found;
  }
  static void enter() {
    Block& block = *running();
    Context* own = block.current_;
    while (block.started_ < block.threads_) {
      const unsigned at = block.started_++, index = falling ? block.threads_ - 1 - at : at;
      own->thread = dim3(index % blockDim.x, index / blockDim.x % blockDim.y,
                         index / blockDim.x / blockDim.y);
      threadIdx = own->thread;
      block.body_();
    }
  }
  void resume(Context* one) {
    current_ = one;
    threadIdx = one->thread;
    swapcontext(&home_, &one->context);
  }

  unsigned threads_, started_ = 0;
  size_t contexts_ = 0;
  const std::function<void()>& body_;
  std::vector<Context*> waiting_;
  Context* current_ = nullptr;
  ucontext_t home_;
};

}  // namespace emulator

inline void __syncthreads() { emulator::Block::barrier(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const uint64_t threads = uint64_t{config->blockDim.x} * config->blockDim.y * config->blockDim.z;
  if (threads == 0 || threads > 1024 || config->gridDim.x == 0 || config->gridDim.x > 0x7fffffffu)
    return cudaErrorInvalidConfiguration;
  const std::function<void()> body = [&] { kernel(arguments...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned at = 0; at < gridDim.x; ++at) {
    blockIdx = dim3(emulator::falling ? gridDim.x - 1 - at : at);
    emulator::Block(static_cast<unsigned>(threads), body).run();
  }
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"), weak)) void thresher_emulator_falling(int falling) {
  emulator::falling = falling != 0;
}
