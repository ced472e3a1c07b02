// Types of the elements of tensors, by ONNX's numbers.
#pragma once

namespace thresher {

enum class Element : int { FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BOOL = 9,
                           FLOAT16 = 10, DOUBLE = 11, BFLOAT16 = 16 };

}  // namespace thresher
