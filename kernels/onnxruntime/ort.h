// The part of ONNX Runtime's C interface that custom operators need.
//
// ONNX Runtime ships no headers with its Python packages.  Its interface is a table of functions to
// which releases only append, and a struct of callbacks that says which version it was written for:
// both can be declared here once and hold for every release since VERSION.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/element.h"

namespace thresher::ort {

constexpr uint32_t VERSION = 17;  // of the table: 1.17 was the first release with ParallelFor
constexpr uint32_t OP_VERSION = 16;  // of CustomOp: 1.16 was the first whose callbacks return errors

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct CustomOpDomain;
struct SessionOptions;
struct Op;  // an operator of the runtime's own
struct OpAttribute;
struct MemoryInfo;

using Table = const void* const*;

struct ApiBase {
  Table (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// Places in the table.
enum Slot : size_t {
  CREATE_STATUS = 0,
  GET_ERROR_MESSAGE = 2,
  CREATE_CUSTOM_OP_DOMAIN = 26,
  CUSTOM_OP_DOMAIN_ADD = 27,
  ADD_CUSTOM_OP_DOMAIN = 28,
  CREATE_TENSOR_WITH_DATA = 49,
  GET_TENSOR_MUTABLE_DATA = 51,
  GET_DIMENSIONS_COUNT = 61,
  GET_DIMENSIONS = 62,
  GET_TENSOR_TYPE_AND_SHAPE = 65,
  CREATE_CPU_MEMORY_INFO = 69,
  GET_ATTRIBUTE_FLOAT = 85,
  GET_ATTRIBUTE_INT64 = 86,
  GET_ATTRIBUTE_STRING = 87,
  GET_OUTPUT_COUNT = 89,
  GET_INPUT = 90,
  GET_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_MEMORY_INFO = 94,
  RELEASE_VALUE = 96,
  RELEASE_SHAPE_INFO = 99,
  CREATE_OP_ATTRIBUTE = 211,
  RELEASE_OP_ATTRIBUTE = 212,
  CREATE_OP = 213,
  INVOKE_OP = 214,
  RELEASE_OP = 215,
  GET_CONSTANT_INPUT = 249,
  PARALLEL_FOR = 274,
};

constexpr int INVALID_ARGUMENT = 2;  // the code of every error of ours
enum AttributeType : int { ATTRIBUTE_INT = 1, ATTRIBUTE_FLOAT = 3 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1 };

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, Table, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  Element (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  Element (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory_type)(const CustomOp*, size_t);
  int (*get_variadic_input_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_or_error)(const CustomOp*, Table, const KernelInfo*, void** kernel);
  Status* (*compute_or_error)(void* kernel, KernelContext*);
};

}  // namespace thresher::ort
