// ONNX Runtime as the host of kernels.
#pragma once

#include "cpu/kernel.h"
#include "onnxruntime/ort.h"

namespace thresher::ort {

class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  template <class Function>
  Function get(Slot slot) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[slot]));
  }
  // Turns a status into an Error.
  void check(Status* status) const;
  Status* status(const char* message) const;

 private:
  Table table_;
};

struct NodeAttributes final : Attributes {
  NodeAttributes(const Api& api, const KernelInfo* info) : api(api), info(info) {}
  int64_t integer(const char* name) const override;
  float number(const char* name) const override;
  std::string text(const char* name) const override;

  const Api& api;  // lives as long as the kernel
  const KernelInfo* const info;
};

struct Run final : Context {
  Run(const Api& api, KernelContext* handle, const std::vector<bool>& constants)
      : api(api), handle(handle), constants(constants) {}
  bool constant(size_t index) const override { return constants.at(index); }
  const void* read(size_t index, Shape& shape) const override;
  void* write(size_t index, const Shape& shape) const override;
  void run(void (*part)(void*, size_t), size_t parts, void* job) const override;

  const Api& api;
  KernelContext* const handle;
  const std::vector<bool>& constants;  // by input
};

struct Domain final : Library {
  Domain(const Api& api, CustomOpDomain* handle) : api(api), handle(handle) {}
  void add(const Implementation& of) const override;

  const Api& api;
  CustomOpDomain* const handle;
};

}  // namespace thresher::ort
