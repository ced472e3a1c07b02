#include "cpu/kernel.h"

namespace thresher {

std::string text(const Shape& shape) {
  std::string said = "[";
  for (size_t i = 0; i < shape.size(); ++i) said += (i ? ", " : "") + std::to_string(shape[i]);
  return said + "]";
}

int64_t Context::scalar(size_t index) const {
  const Tensor<int64_t> found = input<int64_t>(index);
  demand(found.count() == 1, "a count is one number", found.shape);
  return *found.data;
}

}  // namespace thresher
