#include "cpu/nearest.h"

#include "cpu/pairs.h"

namespace thresher {
namespace {

template <class I, class W>
using Mask = decltype(Vector<I, W>{} > Vector<I, W>{});

// The best so far of each row, by lane.
template <class I, class W>
struct Best {
  const Targets<W>& targets;
  Vector<I, W> value[PAIR_ROWS];
  Mask<I, W> first[PAIR_ROWS];  // the target in the first lane of the vector where it was

  template <int ROWS, int COUNT>
  THRESHER_INLINE void tile(int64_t first_row, int64_t at, const Tile<I, W, ROWS, COUNT>& product) {
    for (int64_t v = 0; v < COUNT; ++v, at += LANES<I, W>) {
      const Vector<I, W> limit = load<I>(targets.limit(at));
      const Mask<I, W> here = Mask<I, W>{} + static_cast<LaneOf<Mask<I, W>>>(at);
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t row = first_row + r;
        // NaN stays what it is, and is never better.
        const Vector<I, W> capped = limit < product[v][r] ? limit : product[v][r];
        const Mask<I, W> better = capped > value[row];
        value[row] = better ? capped : value[row];
        first[row] = better ? here : first[row];
      }
    }
  }
};

// The best so far of each target.
template <class I, class W>
struct BestRow {
  const W* limit;
  int64_t first;
  W* best;
  Number<W>* into;

  template <int ROWS, int COUNT>
  THRESHER_INLINE void tile(int64_t row, int64_t at, const Tile<I, W, ROWS, COUNT>& product) {
    for (int64_t v = 0; v < COUNT; ++v, at += LANES<I, W>) {
      Vector<I, W> value = load<I>(best + at);
      Vector<I, Number<W>> number = load<I>(into + at);
      for (int64_t r = 0; r < ROWS; ++r) {
        const Vector<I, W> most = Vector<I, W>{} + limit[row + r];
        const Vector<I, W> capped = most < product[v][r] ? most : product[v][r];  // NaN is never better
        const Mask<I, W> better = capped > value;
        value = better ? capped : value;
        number = better ? Vector<I, Number<W>>{} + static_cast<Number<W>>(first + row + r) : number;
      }
      store(best + at, value);
      store(into + at, number);
    }
  }
};

template <class I, class W>
THRESHER_INLINE void block(const W* rows, int64_t count, const Targets<W>& targets, W* best,
                           int64_t* into) {
  Best<I, W> found{targets, {}, {}};
  for (int64_t row = 0; row < count; ++row) {
    found.value[row] = Vector<I, W>{} - std::numeric_limits<W>::infinity();
    found.first[row] = Mask<I, W>{};
  }
  use_products<I>(rows, count, targets, found);
  for (int64_t row = 0; row < count; ++row) {
    best[row] = found.value[row][0];
    into[row] = found.first[row][0];
    for (int lane = 1; lane < LANES<I, W>; ++lane) {
      const W value = found.value[row][lane];
      const int64_t target = found.first[row][lane] + lane;
      if (value > best[row] || (value == best[row] && target < into[row])) {
        best[row] = value;
        into[row] = target;
      }
    }
  }
}

}  // namespace

template <class W>
void nearest(const W* rows, int64_t count, const Targets<W>& targets, W* best, int64_t* into) {
  dispatch([&](auto isa) THRESHER_INLINED {
    for (int64_t at = 0; at < count; at += PAIR_ROWS) {
      const int64_t size = count - at < PAIR_ROWS ? count - at : PAIR_ROWS;
      block<decltype(isa)>(rows + at * targets.depth, size, targets, best + at, into + at);
    }
  });
}

template <class W>
void nearest_rows(const W* rows, const W* limit, int64_t first, int64_t count, const Targets<W>& targets, W* best,
                  Number<W>* into) {
  dispatch([&](auto isa) THRESHER_INLINED {
    BestRow<decltype(isa), W> found{limit, first, best, into};
    use_products<decltype(isa)>(rows, count, targets, found);
  });
}

template void nearest<float>(const float*, int64_t, const Targets<float>&, float*, int64_t*);
template void nearest<double>(const double*, int64_t, const Targets<double>&, double*, int64_t*);
template void nearest_rows<float>(const float*, const float*, int64_t, int64_t, const Targets<float>&, float*,
                                  int32_t*);
template void nearest_rows<double>(const double*, const double*, int64_t, int64_t, const Targets<double>&, double*,
                                   int64_t*);

}  // namespace thresher
