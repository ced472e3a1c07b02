// GatherTokens in CUDA; see reference.py for what it computes.  A kernel cannot refuse: where an index
// is no position of a token, the row is zero.
#include "cuda/rows.h"

namespace thresher {
namespace {

// One block for each outgoing row of `width` units.
template <class Unit>
__global__ void gather(const Unit* x, const int64_t* index, int64_t tokens, int64_t count,
                       int64_t width, Unit* y) {
  const int64_t row = blockIdx.x, given = index[row], token = given < 0 ? given + tokens : given;
  Unit* to = y + row * width;
  if (token >= 0 && token < tokens)
    copy_row(to, x + (row / count * tokens + token) * width, width);
  else
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) to[c] = Unit{};
}

int64_t bytes_of(int64_t element) {
  switch (element) {
    case FLOAT: case INT32: return 4;
    case INT64: case DOUBLE: return 8;
    case FLOAT16: case BFLOAT16: return 2;
    case INT8: case UINT8: case BOOL: return 1;
    default: return 0;
  }
}

}  // namespace

int gather_tokens(const Call& call, Scratch& scratch) {
  const Tensor &x = call.inputs[0], &index = call.inputs[1], &y = call.outputs[0];
  const int64_t size = bytes_of(x.element);
  if (x.rank < 2 || index.rank != 2 || index.dims[0] != x.dims[0]) return WRONG_SHAPE;
  if (size == 0 || index.element != INT64) return WRONG_TYPE;
  if (!scratch.ready()) return scratch.status();

  int64_t bytes = size;
  bool fits = y.rank == x.rank && y.dims[0] == x.dims[0] && y.dims[1] == index.dims[1];
  for (int64_t axis = 2; axis < x.rank; ++axis) {
    fits = fits && y.dims[axis] == x.dims[axis];
    bytes *= x.dims[axis];
  }
  if (!fits) return WRONG_SHAPE;
  if (y.element != x.element) return WRONG_TYPE;
  if (!present(x) || !present(index) || !present(y)) return NO_DATA;
  if (bytes == 0) return OK;
  Launcher launch(call);
  by_unit(bytes, x.data, y.data, [&](auto unit) {
    using Unit = decltype(unit);
    launch(count_of(index), dim3(BLOCK), gather<Unit>, static_cast<const Unit*>(x.data),
           static_cast<const int64_t*>(index.data), x.dims[1], index.dims[1],
           bytes / static_cast<int64_t>(sizeof(Unit)), static_cast<Unit*>(y.data));
  });
  return launch.status();
}

}  // namespace thresher
