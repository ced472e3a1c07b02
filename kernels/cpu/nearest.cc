#include "cpu/nearest.h"

#include "cpu/pairs.h"

namespace thresher {
namespace {

template <class W>
using Mask = decltype(Vector<W>{} > Vector<W>{});
template <class W>
using Lane = std::remove_reference_t<decltype(Mask<W>{}[0])>;

// The best so far of each row, by lane.
template <class W>
struct Best {
  const Targets<W>& targets;
  Vector<W> value[PAIR_ROWS];
  Mask<W> panel[PAIR_ROWS];

  template <int ROWS, int PANELS>
  THRESHER_INLINE void tile(int64_t first, int64_t at, const Tile<W, ROWS, PANELS>& product) {
    for (int64_t p = 0; p < PANELS; ++p) {
      const Vector<W> limit = load(targets.limit(at + p));
      const Mask<W> here = Mask<W>{} + static_cast<Lane<W>>(at + p);
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t row = first + r;
        // NaN stays what it is, and is never better.
        const Vector<W> capped = limit < product[p][r] ? limit : product[p][r];
        const Mask<W> better = capped > value[row];
        value[row] = better ? capped : value[row];
        panel[row] = better ? here : panel[row];
      }
    }
  }
};

template <class W>
THRESHER_INLINE void block(const W* rows, int64_t count, const Targets<W>& targets, W* best,
                           int64_t* into) {
  Best<W> found{targets, {}, {}};
  for (int64_t row = 0; row < count; ++row) {
    found.value[row] = Vector<W>{} - std::numeric_limits<W>::infinity();
    found.panel[row] = Mask<W>{};
  }
  use_products(rows, count, targets, found);
  for (int64_t row = 0; row < count; ++row) {
    best[row] = found.value[row][0];
    into[row] = found.panel[row][0] * LANES;
    for (int lane = 1; lane < LANES; ++lane) {
      const W value = found.value[row][lane];
      const int64_t target = found.panel[row][lane] * LANES + lane;
      if (value > best[row] || (value == best[row] && target < into[row])) {
        best[row] = value;
        into[row] = target;
      }
    }
  }
}

template <class W>
THRESHER_INLINE void all(const W* rows, int64_t count, const Targets<W>& targets, W* best,
                         int64_t* into) {
  for (int64_t at = 0; at < count; at += PAIR_ROWS) {
    const int64_t size = count - at < PAIR_ROWS ? count - at : PAIR_ROWS;
    block(rows + at * targets.depth, size, targets, best + at, into + at);
  }
}

}  // namespace

THRESHER_VECTORISED void nearest(const float* rows, int64_t count, const Targets<float>& targets,
                                 float* best, int64_t* into) {
  all(rows, count, targets, best, into);
}
THRESHER_VECTORISED void nearest(const double* rows, int64_t count, const Targets<double>& targets,
                                 double* best, int64_t* into) {
  all(rows, count, targets, best, into);
}

}  // namespace thresher
