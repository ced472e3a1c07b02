// The C interface of the CUDA kernels: one structure for all operators, filled by name.  No header of
// CUDA is needed to use it.  kernels/cuda_library.py holds the same structure for Python.
#pragma once

#include <cstdint>

extern "C" {

// Dense, row by row.  `element` is a number of ONNX's TensorProto.DataType.
struct ThresherTensor {
  void* data;
  int64_t element;
  int64_t rank;
  int64_t dims[8];
};

// Inputs and outputs in the order of the ONNX operator, without the input `keep`, which is given here.
// Outputs behind the first may be null.
struct ThresherCall {
  ThresherTensor inputs[4];
  ThresherTensor outputs[4];
  int64_t keep;         // tokens that leave
  int64_t protect;      // attribute "protected"
  int64_t row;          // attribute of ClassAttention, as is `scale`
  double scale;
  double margin;        // attribute of TokenEnergy
  void* workspace;      // device memory, aligned to 16 bytes
  int64_t workspace_bytes;
  void* stream;         // a cudaStream_t
};

// Queues the kernels of an operator on the stream.  Returns 0, a negative number for a call that is
// wrong, or a positive one, which is a cudaError_t.
int thresher_cuda_launch(const char* op, const ThresherCall* call);

// How much workspace the call needs; depends on the shapes of the inputs only and grows with them.
int thresher_cuda_workspace(const char* op, const ThresherCall* call, int64_t* bytes);

// What a returned number means.
const char* thresher_cuda_message(int status);
}
