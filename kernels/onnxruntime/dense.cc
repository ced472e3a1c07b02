#include "onnxruntime/dense.h"

namespace thresher {

namespace {

// One attribute of an operator; an operator made by hand has no defaults.
struct Given {
  template <class V>
  Given(const ort::Api& api, const char* name, V value) : api(api) {
    const auto type = std::is_integral_v<V> ? ort::ATTRIBUTE_INT : ort::ATTRIBUTE_FLOAT;
    api.check(api.get<ort::Status* (*)(const char*, const void*, int, ort::AttributeType,
                                       ort::OpAttribute**)>(ort::CREATE_OP_ATTRIBUTE)(
        name, &value, 1, type, &made));
  }
  ~Given() { api.get<void (*)(ort::OpAttribute*)>(ort::RELEASE_OP_ATTRIBUTE)(made); }
  const ort::Api& api;
  ort::OpAttribute* made = nullptr;
};

}  // namespace

// Only ONNX Runtime is given operators that multiply by this.
static const ort::NodeAttributes& of_ort(const Attributes& given) {
  return static_cast<const ort::NodeAttributes&>(given);
}

struct Product::Value {
  Value(const Product& of, const Matrix& matrix) : api(of.api_) {
    const size_t bytes = matrix.size * static_cast<size_t>(matrix.shape[0] * matrix.shape[1]);
    api.check(api.get<ort::Status* (*)(const ort::MemoryInfo*, void*, size_t, const int64_t*, size_t,
                                       Element, ort::Value**)>(ort::CREATE_TENSOR_WITH_DATA)(
        of.memory_, const_cast<void*>(matrix.data), bytes, matrix.shape.data(), matrix.shape.size(),
        of.element_, &made));
  }
  ~Value() { api.get<void (*)(ort::Value*)>(ort::RELEASE_VALUE)(made); }
  const ort::Api& api;
  ort::Value* made = nullptr;
};

Product::Product(const Attributes& given, Element element, bool transposed)
    : api_(of_ort(given).api), element_(element), transposed_(transposed) {
  const char* constraint = "T";
  const Given transA(api_, "transA", int64_t{0}), transB(api_, "transB", int64_t{1});
  const Given alpha(api_, "alpha", 1.0f), beta(api_, "beta", 0.0f);
  const ort::OpAttribute* attributes[] = {transA.made, transB.made, alpha.made, beta.made};
  api_.check(api_.get<ort::Status* (*)(const ort::KernelInfo*, const char*, const char*, int,
                                       const char**, const Element*, int,
                                       const ort::OpAttribute* const*, int, int, int, ort::Op**)>(
      ort::CREATE_OP)(of_ort(given).info, transposed ? "Gemm" : "MatMul", "", 13, &constraint, &element, 1,
                      attributes, transposed ? 4 : 0, 2, 1, &op_));
  api_.check(api_.get<ort::Status* (*)(int, int, ort::MemoryInfo**)>(ort::CREATE_CPU_MEMORY_INFO)(
      0, 0, &memory_));
}

Product::~Product() {
  api_.get<void (*)(ort::Op*)>(ort::RELEASE_OP)(op_);
  api_.get<void (*)(ort::MemoryInfo*)>(ort::RELEASE_MEMORY_INFO)(memory_);
}

void Product::run(const Context& context, const Matrix& y, const Matrix& x,
                  const Matrix& matrix) const {
  const Value result(*this, y), first(*this, x), second(*this, matrix);
  const ort::Value* inputs[] = {first.made, second.made};
  ort::Value* outputs[] = {result.made};
  api_.check(api_.get<ort::Status* (*)(const ort::KernelContext*, const ort::Op*,
                                       const ort::Value* const*, int, ort::Value* const*, int)>(
      ort::INVOKE_OP)(static_cast<const ort::Run&>(context).handle, op_, inputs, 2, outputs, 1));
}

}  // namespace thresher
