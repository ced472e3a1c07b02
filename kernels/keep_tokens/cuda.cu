// KeepTokens and FuseTokens in CUDA; see reference.py for what they compute.
#include "cuda/rank.h"
#include "cuda/rows.h"

namespace thresher {
namespace {

constexpr int GROUPS = 8;  // dropped tokens that a block of fuse_rows reads at once

// The last row: sum_i score_i x_i over the tokens that do not stay, LANES channels of it in each block.
// Threads (LANES, GROUPS).
template <class T>
__global__ void fuse_rows(const T* x, const float* score, const int* rank, const int* first,
                          int tokens, int keep, int64_t width, T* y, int64_t* kept) {
  __shared__ float shared[GROUPS][LANES];
  const int64_t across = (width + LANES - 1) / LANES, item = blockIdx.x / across;
  const int64_t part = blockIdx.x % across, channel = part * LANES + threadIdx.x;
  const int group = static_cast<int>(threadIdx.y);
  float sum = 0;
  if (channel < width)
    for (int token = group; token < tokens; token += GROUPS)
      if (rank[item * tokens + token] >= keep - 1)
        sum += score[item * tokens + token] * widen(x[(item * tokens + token) * width + channel]);
  shared[group][threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && channel < width) {
    float total = 0;
    for (int i = 0; i < GROUPS; ++i) total += shared[i][threadIdx.x];
    y[(item * keep + keep - 1) * width + channel] = narrow<T>(total);
  }
  if (kept && part == 0 && group == 0 && threadIdx.x == 0)
    kept[item * keep + keep - 1] = first[item];
}

template <class T>
int select(const Call& call, Scratch& scratch, bool fuses) {
  const Tensor &given = call.inputs[0], &score = call.inputs[1];
  const Tensor &y = call.outputs[0], &kept = call.outputs[1], &slot = call.outputs[2];
  const Stream x(given);
  if (!has_shape(score, x.batch, x.tokens)) return WRONG_SHAPE;
  if (score.element != FLOAT) return WRONG_TYPE;
  if (call.protect < 0 || call.protect + fuses > x.tokens) return WRONG_COUNT;
  int* rank = scratch.take<int>(x.batch * x.tokens);
  int* origin = scratch.take<int>(x.batch * x.tokens);
  int* first = scratch.take<int>(x.batch);  // the best of the dropped tokens
  if (!scratch.ready()) return scratch.status();

  if (call.keep < call.protect + fuses || call.keep > x.tokens) return WRONG_COUNT;
  const int keep = static_cast<int>(call.keep), stay = keep - fuses;
  if (!has_shape(y, x.batch, keep, x.width) || !fits(kept, INT64, x.batch, keep) ||
      !fits(slot, INT64, x.batch, x.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(score) || !present(y)) return NO_DATA;

  Launcher launch(call);
  const auto* tokens = static_cast<const T*>(given.data);
  const auto* scores = static_cast<const float*>(score.data);
  auto* to = static_cast<T*>(y.data);
  auto* stands_for = static_cast<int64_t*>(kept.data);
  const int64_t blocks = x.batch * parts(x.tokens, BLOCK);
  launch(blocks, dim3(BLOCK), rank_by_counting<ByScore>,
         ByScore{scores, nullptr, x.tokens, static_cast<int>(call.protect)}, x.tokens, rank);
  launch(blocks, dim3(BLOCK), place,
         Placement{rank, x.tokens, stay, fuses, nullptr, origin, first, static_cast<int64_t*>(slot.data)});
  launch(x.batch * stay, dim3(BLOCK), copy_rows<T>, tokens, x.tokens, stay, keep, x.width, origin,
         to, stands_for);
  if (fuses)
    launch(x.batch * parts(x.width, LANES), dim3(LANES, GROUPS), fuse_rows<T>, tokens, scores, rank,
           first, x.tokens, keep, x.width, to, stands_for);
  return launch.status();
}

int select(const Call& call, Scratch& scratch, bool fuses) {
  if (call.inputs[0].rank != 3) return WRONG_SHAPE;
  return by_type(call.inputs[0].element,
                 [&](auto type) { return select<decltype(type)>(call, scratch, fuses); });
}

}  // namespace

int keep_tokens(const Call& call, Scratch& scratch) { return select(call, scratch, false); }
int fuse_tokens(const Call& call, Scratch& scratch) { return select(call, scratch, true); }

}  // namespace thresher
