// RestoreTokens in CUDA; see reference.py for what it computes.  A kernel cannot refuse: where a slot is
// no position in x, the row is zero.
#include "cuda/rows.h"

namespace thresher {
namespace {

// One block for each outgoing row of `width` units.
template <class Unit>
__global__ void restore(const Unit* x, const int64_t* slot, const Unit* aside, int64_t left,
                        int64_t tokens, int64_t width, Unit* y) {
  const int64_t row = blockIdx.x, at = slot[row];
  Unit* to = y + row * width;
  if (at < left)
    copy_row(to, at < 0 ? aside + row * width : x + (row / tokens * left + at) * width, width);
  else
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) to[c] = Unit{};
}

}  // namespace

int restore_tokens(const Call& call, Scratch& scratch) {
  const Tensor &x = call.inputs[0], &slot = call.inputs[1], &aside = call.inputs[2],
               &y = call.outputs[0];
  if (x.rank != 3 || aside.rank != 3 || aside.dims[0] != x.dims[0] || aside.dims[2] != x.dims[2] ||
      !has_shape(slot, x.dims[0], aside.dims[1]))
    return WRONG_SHAPE;
  if (slot.element != INT64 || aside.element != x.element) return WRONG_TYPE;
  const int status = by_type(x.element, [](auto) { return OK; });
  if (status != OK) return status;
  if (!scratch.ready()) return scratch.status();

  if (!has_shape(y, x.dims[0], aside.dims[1], x.dims[2])) return WRONG_SHAPE;
  if (y.element != x.element) return WRONG_TYPE;
  if (!present(x) || !present(slot) || !present(aside) || !present(y)) return NO_DATA;
  const int64_t bytes = x.dims[2] * (x.element == FLOAT ? 4 : 2);
  if (bytes == 0) return OK;
  Launcher launch(call);
  const int64_t both = bytes | reinterpret_cast<intptr_t>(aside.data);  // all are to be aligned
  by_unit(both, x.data, y.data, [&](auto unit) {
    using Unit = decltype(unit);
    launch(count_of(slot), dim3(BLOCK), restore<Unit>, static_cast<const Unit*>(x.data),
           static_cast<const int64_t*>(slot.data), static_cast<const Unit*>(aside.data), x.dims[1],
           aside.dims[1], bytes / static_cast<int64_t>(sizeof(Unit)), static_cast<Unit*>(y.data));
  });
  return launch.status();
}

}  // namespace thresher
