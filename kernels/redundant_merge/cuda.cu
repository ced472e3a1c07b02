// RedundantMerge in CUDA; see reference.py for what it computes.
#include "cuda/scored.h"

namespace thresher {
namespace {

// Of twice as many as merge, by falling score: a source, a target, a source and so on.
struct Turns {
  static constexpr bool CHOOSES = false;

  static __device__ uint32_t key(float size, float score) {
    return order_key(size == 0 ? PADDING : score);
  }
  static void set(Scored& of) {
    of.sources = of.targets = of.merging();
    of.step = 2;
    of.first_target = 1;
  }
};

}  // namespace

int redundant_merge(const Call& call, Scratch& scratch) { return merge_by_score<Turns>(call, scratch); }

}  // namespace thresher
