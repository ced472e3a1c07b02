// Merging by a score: ranks by it decide which tokens are sources and which targets.
//
// Ranks, tokens by rank, nearest target of each source, which sources join, lists of those, places, outgoing
// rows.  What the sides are is the operator's own:
//
//   struct Sides {
//     static constexpr bool CHOOSES;  // whether only the sources most like a target join, or all
//     static uint32_t key(float size, float score);  // the largest is the first in rank
//     static void set(Scored& of);    // sources, targets, step, first_target; at most half are sources
//   };
#pragma once

#include "cuda/merging.h"

namespace thresher {

// All that the steps share.  The pool is what is behind the prefix.
struct Scored : Groups {
  int protect, pool, targets;
  int step, first_target;  // sources are of rank 0, step, 2 step, ...; targets likewise from this rank on
  const float* score;
  const int* rank;   // [B, pool]
  int* ranked;       // [B, pool], the token of each rank
  const int* order;  // [B, sources], of the sources by similarity; null where all join
  int* fate;         // [B, N], 0 of tokens that stay and `keep` of those that join: ranks for `place`

  __device__ int wanted() const { return sources; }
  __device__ int source(int64_t item, int index) const { return ranked[item * pool + index * step]; }
  __device__ int target(int64_t item, int index) const {
    return ranked[item * pool + first_target + index * step];
  }
  __device__ bool joins(int64_t item, int index) const {
    return !order || order[item * sources + index] < merging();
  }
  __device__ void leave(int64_t item, int index) const {
    fate[item * tokens + source(item, index)] = keep;
  }
};

template <class Sides>
struct SideKeys {
  Scored of;

  __device__ uint32_t operator()(int64_t item, int index) const {
    const int64_t at = item * of.tokens + of.protect + index;
    return Sides::key(of.size[at], of.score[at]);
  }
};

// One thread for each token: none has joined another yet, and those of the pool are listed by rank.
[[maybe_unused]] static __global__ void list_by_rank(Scored of) {
  const Mine mine(of.tokens);
  if (mine.index >= of.tokens) return;
  const int64_t at = mine.item * of.tokens + mine.index;
  of.head[at] = -1;
  of.fate[at] = 0;
  const int index = mine.index - of.protect;
  if (index >= 0) of.ranked[mine.item * of.pool + of.rank[mine.item * of.pool + index]] = mine.index;
}

template <class T, class Sides>
int merge_by_score(const Call& call, Scratch& scratch) {
  const Tensor &given = call.inputs[0], &size = call.inputs[1], &metric = call.inputs[2],
               &score = call.inputs[3];
  const Tensor &y = call.outputs[0], &out_size = call.outputs[1], &kept = call.outputs[2],
               &slot = call.outputs[3];
  const Stream x(given);
  if (!has_shape(size, x.batch, x.tokens) || !has_shape(score, x.batch, x.tokens) ||
      metric.rank != 4 || metric.dims[0] != x.batch || metric.dims[1] == 0 ||
      metric.dims[2] != x.tokens)
    return WRONG_SHAPE;
  if (size.element != FLOAT || score.element != FLOAT || metric.element != given.element)
    return WRONG_TYPE;
  if (call.protect < 0 || call.protect >= x.tokens) return WRONG_COUNT;
  Scored of = {};
  of.tokens = x.tokens;
  of.protect = static_cast<int>(call.protect);
  of.pool = of.tokens - of.protect;
  const int64_t all = x.batch * of.tokens, pool = x.batch * of.pool, half = x.batch * (of.pool / 2);
  float* units = scratch.take<float>(all * metric.dims[3]);
  Found* best = scratch.take<Found>(half);
  int* rank = scratch.take<int>(pool);
  int* order = scratch.take<int>(Sides::CHOOSES ? half : 0);
  of.ranked = scratch.take<int>(pool);
  of.origin = scratch.take<int>(all);
  of.head = scratch.take<int>(all);
  of.next = scratch.take<int>(half);
  of.fate = scratch.take<int>(all);
  if (!scratch.ready()) return scratch.status();

  if (call.keep < of.tokens - of.pool / 2 || call.keep > of.tokens) return WRONG_COUNT;
  of.keep = static_cast<int>(call.keep);
  if (!has_shape(y, x.batch, of.keep, x.width) || !fits(out_size, FLOAT, x.batch, of.keep) ||
      !fits(kept, INT64, x.batch, of.keep) || !fits(slot, INT64, x.batch, of.tokens))
    return WRONG_SHAPE;
  if (y.element != given.element) return WRONG_TYPE;
  if (!present(given) || !present(size) || !present(metric) || !present(score) || !present(y))
    return NO_DATA;
  Sides::set(of);
  of.size = static_cast<const float*>(size.data);
  of.score = static_cast<const float*>(score.data);
  of.best = best;
  of.rank = rank;
  of.order = Sides::CHOOSES ? order : nullptr;
  of.slot = static_cast<int64_t*>(slot.data);

  Launcher launch(call);
  const int64_t by_token = x.batch * parts(of.tokens, BLOCK);
  const int64_t by_source = x.batch * parts(of.sources, BLOCK);
  launch(x.batch * parts(of.pool, BLOCK), dim3(BLOCK), rank_by_counting<SideKeys<Sides>>,
         SideKeys<Sides>{of}, of.pool, rank);
  launch(by_token, dim3(BLOCK), list_by_rank, of);
  find_nearest(launch, static_cast<const T*>(metric.data), x.batch, of.tokens, metric.dims[1],
               metric.dims[3], of.size, of, of.sources, of.targets, units, best);
  if (Sides::CHOOSES)
    launch(by_source, dim3(BLOCK), rank_by_counting<BySimilarity<Scored>>, BySimilarity<Scored>{of},
           of.sources, order);
  launch(by_source, dim3(BLOCK), link<Scored>, of);
  launch(by_token, dim3(BLOCK), place,
         Placement{of.fate, of.tokens, of.keep, 0, nullptr, of.origin, nullptr, of.slot});
  launch(x.batch * of.keep, dim3(BLOCK), write_means<T, MeanBySize, Scored>, of,
         static_cast<const T*>(given.data), x.width, static_cast<T*>(y.data),
         static_cast<float*>(out_size.data), static_cast<int64_t*>(kept.data));
  return launch.status();
}

template <class Sides>
int merge_by_score(const Call& call, Scratch& scratch) {
  if (call.inputs[0].rank != 3) return WRONG_SHAPE;
  return by_type(call.inputs[0].element, [&](auto type) {
    return merge_by_score<decltype(type), Sides>(call, scratch);
  });
}

}  // namespace thresher
