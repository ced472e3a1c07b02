// ClassAttention in CUDA; see reference.py for what it computes.
#include "cuda/rows.h"

namespace thresher {
namespace {

constexpr int GROUPS = 8;  // keys that a block of attend reads at once

// Steps through a bias that broadcasts to [B, H, 1, N].
struct Bias {
  const float* data;
  int64_t item, head, token;
};

// map[b, h] = softmax(scale * k[b, h] @ q[b, h, row] + bias).  Threads (LANES, GROUPS).
template <class T>
__global__ void attend(const T* q, const T* k, Bias bias, int heads, int64_t queries, int64_t row,
                       int tokens, int64_t depth, float scale, float* map) {
  __shared__ float shared[GROUPS][LANES];
  const int64_t at = blockIdx.x;
  const T *query = q + (at * queries + row) * depth, *keys = k + at * tokens * depth;
  const float* shift = bias.data + at / heads * bias.item + at % heads * bias.head;
  float* to = map + at * tokens;
  const int lane = static_cast<int>(threadIdx.x), group = static_cast<int>(threadIdx.y);
  for (int start = 0; start < tokens; start += GROUPS) {
    const int token = start + group;
    float product = 0;
    if (token < tokens)
      for (int64_t c = lane; c < depth; c += LANES)
        product += widen(query[c]) * widen(keys[token * depth + c]);
    const float sum = sum_of_lanes(product, shared);
    if (lane == 0 && token < tokens) to[token] = sum * scale + shift[token * bias.token];
  }
  __syncthreads();  // all logits are there
  float most = -INFINITY;
  for (int token = lane; token < tokens; token += LANES) most = fmaxf(most, to[token]);
  shared[group][lane] = most;
  __syncthreads();
  for (int i = 0; i < LANES; ++i) most = fmaxf(most, shared[group][i]);
  float part = 0;
  for (int token = lane; token < tokens; token += LANES) part += expf(to[token] - most);
  const float total = sum_of_lanes(part, shared);  // of each group, which all see every token
  __syncthreads();                                 // the logits have been read
  for (int token = group * LANES + lane; token < tokens; token += GROUPS * LANES)
    to[token] = expf(to[token] - most) / total;
}

// score[b, n] = the mean over the heads.
__global__ void mean_of_heads(const float* map, int64_t count, int heads, int tokens,
                              float* score) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
  for (int head = 0; head < heads; ++head)
    sum += map[(at / tokens * heads + head) * tokens + at % tokens];
  score[at] = sum / static_cast<float>(heads);
}

template <class T>
int attention(const Call& call, Scratch& scratch) {
  const Tensor &q = call.inputs[0], &k = call.inputs[1], &bias = call.inputs[2],
               &score = call.outputs[0];
  const int64_t batch = q.dims[0], heads = q.dims[1], depth = q.dims[3], tokens = k.dims[2];
  if (k.rank != 4 || k.dims[0] != batch || k.dims[1] != heads || k.dims[3] != depth || heads == 0)
    return WRONG_SHAPE;
  if (k.element != q.element || bias.element != FLOAT || score.element != FLOAT) return WRONG_TYPE;
  if (call.row < 0 || call.row >= q.dims[2]) return WRONG_COUNT;
  const int64_t full[4] = {batch, heads, 1, tokens};
  int64_t stride[4] = {}, step = 1;
  if (bias.rank > 4) return WRONG_SHAPE;
  for (int64_t i = 3; i >= 4 - bias.rank; --i) {
    const int64_t size = bias.dims[bias.rank - 4 + i];
    if (size != 1 && size != full[i]) return WRONG_SHAPE;
    if (size != 1) stride[i] = step;
    step *= size;
  }
  float* map = scratch.take<float>(batch * heads * tokens);
  if (!scratch.ready()) return scratch.status();

  if (!has_shape(score, batch, tokens)) return WRONG_SHAPE;
  if (!present(q) || !present(k) || !present(bias) || !present(score)) return NO_DATA;
  if (tokens == 0) return OK;
  Launcher launch(call);
  launch(batch * heads, dim3(LANES, GROUPS), attend<T>, static_cast<const T*>(q.data),
         static_cast<const T*>(k.data),
         Bias{static_cast<const float*>(bias.data), stride[0], stride[1], stride[3]},
         static_cast<int>(heads), q.dims[2], call.row, static_cast<int>(tokens), depth,
         static_cast<float>(call.scale), map);
  launch(parts(batch * tokens, BLOCK), dim3(BLOCK), mean_of_heads, map, batch * tokens,
         static_cast<int>(heads), static_cast<int>(tokens), static_cast<float*>(score.data));
  return launch.status();
}

}  // namespace

int class_attention(const Call& call, Scratch& scratch) {
  if (call.inputs[0].rank != 4) return WRONG_SHAPE;
  return by_type(call.inputs[0].element,
                 [&](auto type) { return attention<decltype(type)>(call, scratch); });
}

}  // namespace thresher
