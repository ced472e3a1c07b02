// ClassAttention on the CPU; see reference.py for what it computes.
#include "cpu/activation.h"
#include "cpu/arena.h"
#include "cpu/rows.h"

namespace thresher {
namespace {

// to = softmax(scale * keys @ query + bias)
template <class I, class T>
THRESHER_INLINE void attend(Wide<T>* to, Wide<T>* query, const T* q, const T* keys, int64_t tokens, int64_t depth,
                            float scale, const float* bias, int64_t bias_stride) {
  using W = Wide<T>;
  constexpr int64_t ONE = LANES<I, W>;
  begin_sum<T>(query, 1, q, depth);
  W most = -std::numeric_limits<W>::infinity();
  for (int64_t token = 0; token < tokens; ++token) {
    const T* key = keys + token * depth;
    Vector<I, W> products = {};
    int64_t i = 0;
    for (; i + ONE <= depth; i += ONE) products += load<I>(query + i) * load_wide<I>(key + i);
    W sum = lane_sum(products);
    for (; i < depth; ++i) sum += query[i] * widen(key[i]);
    to[token] = sum * scale + bias[token * bias_stride];
    most = to[token] > most ? to[token] : most;
  }
  change_all<I>(to, tokens, [most](const auto& x) THRESHER_INLINED { return exponential(x - most); });
  Vector<I, W> parts = {};
  int64_t token = 0;
  for (; token + ONE <= tokens; token += ONE) parts += load<I>(to + token);
  W total = lane_sum(parts);
  for (; token < tokens; ++token) total += to[token];
  for (token = 0; token < tokens; ++token) to[token] /= total;
}

// Steps through a bias that broadcasts to [B, H, 1, N], by the axes of that.
struct Broadcast {
  Broadcast(const Tensor<float>& bias, const Shape& shape) : data(bias.data), stride{0, 0, 0, 0} {
    const size_t rank = bias.shape.size();
    demand(rank <= 4, "bias broadcasts to [B, H, 1, N]", bias.shape);
    int64_t step = 1;
    for (size_t i = 0; i < rank; ++i) {
      const int64_t size = bias.shape[rank - 1 - i];
      demand(size == 1 || size == shape[3 - i], "bias broadcasts to [B, H, 1, N]", bias.shape);
      if (size != 1) stride[3 - i] = step;
      step *= size;
    }
  }
  const float* data;
  int64_t stride[4];
};

template <class T>
struct ClassAttention {
  using W = Wide<T>;
  static constexpr Signature signature{
      "ClassAttention", {TOKENS, TOKENS, Element::FLOAT}, {Element::FLOAT}};
  explicit ClassAttention(const Attributes& given)
      : scale(given.number("scale")), row(given.integer("row")) {}

  void compute(const Context& context) const {
    const Tensor<T> q = context.input<T>(0), k = context.input<T>(1);
    demand(q.shape.size() == 4, "q is [B, H, Nq, d]", q.shape);
    const int64_t batch = q.shape[0], heads = q.shape[1], depth = q.shape[3];
    demand(k.shape.size() == 4 && k.shape[0] == batch && k.shape[1] == heads && k.shape[3] == depth,
           "k is [B, H, N, d] of the same batch, heads and depth as q", k.shape);
    demand(row >= 0 && row < q.shape[2], "row is a query", {row});
    demand(heads > 0, "q has heads", q.shape);
    const int64_t tokens = k.shape[2], maps = batch * heads;
    const Broadcast bias(context.input<float>(2), {batch, heads, 1, tokens});
    float* score = context.output<float>(0, {batch, tokens});

    Arena arena;
    W* map = arena.take<W>(maps * tokens);
    W* queries = arena.take<W>(maps * depth);
    context.parallel(maps, 1, [&](int64_t begin, int64_t end) {
      dispatch([&](auto isa) THRESHER_INLINED {
        for (int64_t at = begin; at < end; ++at) {
          const float* shift =
              bias.data + at / heads * bias.stride[0] + at % heads * bias.stride[1];
          attend<decltype(isa), T>(map + at * tokens, queries + at * depth,
                                   q.data + (at * q.shape[2] + row) * depth, k.data + at * tokens * depth,
                                   tokens, depth, scale, shift, bias.stride[3]);
        }
      });
    });
    for (int64_t item = 0; item < batch; ++item)
      for (int64_t token = 0; token < tokens; ++token) {
        W sum = 0;
        for (int64_t head = 0; head < heads; ++head)
          sum += map[(item * heads + head) * tokens + token];
        score[item * tokens + token] = static_cast<float>(sum / static_cast<W>(heads));
      }
  }

  const float scale;
  const int64_t row;
};

}  // namespace

void add_class_attention(const Library& library) {
  add<ClassAttention, float, Half, BFloat16, double>(library);
}

}  // namespace thresher
