// What an operator in CUDA is: a function that checks a call, takes scratch memory and launches.
//
//   int compute(const Call& call, Scratch& scratch) {
//     demand the shapes; take from scratch;
//     if (!scratch.ready()) return scratch.status();  // only the size was asked for, or there is too little
//     demand the counts; launch;
//   }
//
// Kernels use shared memory, barriers and integer atomics, and no warp intrinsics: results do not
// depend on how blocks and warps are scheduled, and tests/kernels/cuda_emulator can run the same
// sources on a CPU.  Grids have one axis, which has room for 2^31 - 1 blocks.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/call.h"
#include "cuda/numeric.h"

namespace thresher {

using Call = ThresherCall;
using Tensor = ThresherTensor;

enum Status : int {
  OK = 0,
  UNKNOWN_OPERATOR = -1,
  WRONG_TYPE = -2,
  WRONG_SHAPE = -3,
  WRONG_COUNT = -4,
  TOO_LARGE = -5,
  SMALL_WORKSPACE = -6,
  NO_DATA = -7,
};

enum Element : int64_t {  // of ONNX's TensorProto.DataType
  FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BOOL = 9, FLOAT16 = 10, DOUBLE = 11,
  BFLOAT16 = 16,
};

constexpr float EPSILON = 1e-12f;  // a zero row gets similarity 0 to everything
constexpr float PADDING = 1e4f;    // beyond every cosine
constexpr int BLOCK = 128;         // threads of a block that need no other shape
constexpr int LANES = 32;          // threads beside each other in a block of two axes

// Whether sizes are sizes, and so few that no index overflows.
inline bool sane(const Tensor& tensor) {
  if (tensor.rank < 0 || tensor.rank > 8) return false;
  int64_t count = 1;
  for (int64_t axis = 0; axis < tensor.rank; ++axis) {
    const int64_t size = tensor.dims[axis];
    if (size < 0 || size > INT_MAX || (size && count > INT64_MAX / 16 / size)) return false;
    count *= size ? size : 1;
  }
  return true;
}
inline int64_t count_of(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < tensor.rank; ++axis) count *= tensor.dims[axis];
  return count;
}
inline bool present(const Tensor& tensor) { return tensor.data || count_of(tensor) == 0; }

inline bool has_shape(const Tensor& tensor, int64_t a, int64_t b) {
  return tensor.rank == 2 && tensor.dims[0] == a && tensor.dims[1] == b;
}
inline bool has_shape(const Tensor& tensor, int64_t a, int64_t b, int64_t c) {
  return tensor.rank == 3 && tensor.dims[0] == a && tensor.dims[1] == b && tensor.dims[2] == c;
}
// Of an output that may be left out.
inline bool fits(const Tensor& tensor, Element element, int64_t a, int64_t b) {
  return !tensor.data || (tensor.element == element && has_shape(tensor, a, b));
}

// Calls body(T{}) with the type of the tokens.
template <class Body>
int by_type(int64_t element, const Body& body) {
  switch (element) {
    case FLOAT: return body(float{});
    case FLOAT16: return body(Half{});
    case BFLOAT16: return body(BFloat16{});
    default: return WRONG_TYPE;
  }
}

// Parts of the workspace; measures what is needed where there is none.
class Scratch {
 public:
  Scratch() : base_(nullptr), bytes_(0), measures_(true) {}
  Scratch(void* base, int64_t bytes)
      : base_(static_cast<char*>(base)), bytes_(bytes), measures_(false) {}

  // Uninitialised, aligned to 16 bytes.
  template <class T>
  T* take(int64_t count) {
    char* found = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(found);
  }
  int64_t used() const { return used_; }
  bool ready() const { return !measures_ && status() == OK; }
  int status() const {
    return measures_ || (used_ <= bytes_ && (base_ || used_ == 0)) ? OK : SMALL_WORKSPACE;
  }

 private:
  char* base_;
  int64_t bytes_, used_ = 0;
  bool measures_;
};

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Queues kernels until one fails.
class Launcher {
 public:
  explicit Launcher(const Call& call) : stream_(static_cast<cudaStream_t>(call.stream)) {}

  template <class... Parameters, class... Arguments>
  void operator()(int64_t blocks, dim3 threads, void (*kernel)(Parameters...),
                  Arguments... arguments) {
    if (status_ != OK || blocks == 0) return;
    if (blocks > INT_MAX) {
      status_ = TOO_LARGE;
      return;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.stream = stream_;
    status_ = static_cast<int>(
        cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }
  // Sets memory to zero.
  template <class T>
  void clear(T* at, int64_t count) {
    if (status_ != OK || count == 0) return;
    status_ = static_cast<int>(
        cudaMemsetAsync(at, 0, static_cast<size_t>(count) * sizeof(T), stream_));
  }
  int status() const { return status_; }

 private:
  cudaStream_t stream_;
  int status_ = OK;
};

// The tokens of a call: its first input.
struct Stream {
  explicit Stream(const Tensor& x)
      : batch(x.dims[0]), width(x.dims[2]), tokens(static_cast<int>(x.dims[1])) {}
  int64_t batch, width;
  int tokens;
};

}  // namespace thresher
