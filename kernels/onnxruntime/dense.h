// Products by ONNX Runtime's own kernels, for calls in which there is nothing to skip.
#pragma once

#include "onnxruntime/host.h"

namespace thresher {

class Product {
 public:
  // Of [rows, depth] with [depth, columns], or with [columns, depth] if that is `transposed`.
  Product(const Attributes& given, Element element, bool transposed);
  ~Product();
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  template <class T>
  void operator()(const Context& context, T* y, const T* x, const T* matrix, int64_t rows,
                  int64_t depth, int64_t columns) const {
    if (depth == 0) std::fill(y, y + rows * columns, T{});
    if (rows * depth * columns == 0) return;
    const Shape second = transposed_ ? Shape{columns, depth} : Shape{depth, columns};
    run(context, {y, {rows, columns}, sizeof(T)}, {x, {rows, depth}, sizeof(T)},
        {matrix, second, sizeof(T)});
  }

 private:
  struct Matrix {
    const void* data;
    Shape shape;
    size_t size;
  };
  struct Value;
  void run(const Context& context, const Matrix& y, const Matrix& x, const Matrix& matrix) const;

  const ort::Api& api_;
  const Element element_;
  const bool transposed_;
  ort::Op* op_ = nullptr;
  ort::MemoryInfo* memory_ = nullptr;
};

// From so many tokens on the runtime's product is faster than sums of rows.  With fewer it is not: it has
// to pack the matrix in every call, as only weights of nodes of its own are packed once (prompts of open
// length therefore have such nodes, see compiler/lowering/prompts.py).
constexpr int64_t MANY_TOKENS = 16;

// Types that ONNX Runtime multiplies on every processor.
template <class T>
constexpr bool MULTIPLIED = ELEMENT<T> == Element::DOUBLE || std::is_same_v<T, float>;

}  // namespace thresher
