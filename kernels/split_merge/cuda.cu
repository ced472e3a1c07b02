// SplitMerge in CUDA; see reference.py for what it computes.
#include "cuda/scored.h"

namespace thresher {
namespace {

constexpr float LOWEST = -1e30f;  // the score of padding

// The half of lower score are sources, the others targets, both by rising score.
struct Halves {
  static constexpr bool CHOOSES = true;

  static __device__ uint32_t key(float size, float score) {
    return ~order_key(size == 0 ? LOWEST : score);
  }
  static void set(Scored& of) {
    of.sources = of.first_target = of.pool / 2;
    of.targets = of.pool - of.sources;
    of.step = 1;
  }
};

}  // namespace

int split_merge(const Call& call, Scratch& scratch) { return merge_by_score<Halves>(call, scratch); }

}  // namespace thresher
