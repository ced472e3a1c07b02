#include "cpu/nearest.h"

#include <cmath>

#include "cpu/tile.h"

namespace thresher {
namespace {

constexpr int64_t TILE = 6;    // rows at once: with one panel their sums fill the registers of AVX2
constexpr int64_t BLOCK = 96;  // rows that stay in the cache while the panels pass

template <class W>
using Mask = decltype(Vector<W>{} > Vector<W>{});
template <class W>
using Lane = std::remove_reference_t<decltype(Mask<W>{}[0])>;

template <class W>
struct Running {  // best so far, by lane
  Vector<W> value;
  Mask<W> panel;
};

template <class W, int64_t ROWS, int64_t PANELS>
THRESHER_INLINE void tile(const W* rows, const Targets<W>& targets, int64_t at, Running<W>* found) {
  const int64_t depth = targets.depth;
  const W* panel = targets.panel(at);
  Vector<W> sum[PANELS][ROWS] = {};
  add_products<ROWS, PANELS>(sum, rows, depth, depth,
                             [&](int64_t channel, int64_t p) __attribute__((always_inline)) {
                               return load(panel + (p * depth + channel) * LANES);
                             });
  for (int64_t p = 0; p < PANELS; ++p) {
    const Vector<W> limit = load(targets.limit(at + p));
    const Mask<W> here = Mask<W>{} + static_cast<Lane<W>>(at + p);
    for (int64_t row = 0; row < ROWS; ++row) {
      // NaN stays what it is, and is never better.
      const Vector<W> capped = limit < sum[p][row] ? limit : sum[p][row];
      const Mask<W> better = capped > found[row].value;
      found[row].value = better ? capped : found[row].value;
      found[row].panel = better ? here : found[row].panel;
    }
  }
}

template <class W, int64_t PANELS>
THRESHER_INLINE void against(const W* rows, int64_t count, const Targets<W>& targets, int64_t at,
                             Running<W>* found) {
  int64_t row = 0;
  for (; row + TILE <= count; row += TILE)
    tile<W, TILE, PANELS>(rows + row * targets.depth, targets, at, found + row);
  for (; row < count; ++row)
    tile<W, 1, PANELS>(rows + row * targets.depth, targets, at, found + row);
}

template <class W>
THRESHER_INLINE void block(const W* rows, int64_t count, const Targets<W>& targets, W* best,
                           int64_t* into) {
  Running<W> found[BLOCK];
  for (int64_t row = 0; row < count; ++row) {
    found[row].value = Vector<W>{} - std::numeric_limits<W>::infinity();
    found[row].panel = Mask<W>{};
  }
  int64_t panel = 0;
  if (many_registers())
    for (; panel + 2 <= targets.panels; panel += 2) against<W, 2>(rows, count, targets, panel, found);
  for (; panel < targets.panels; ++panel) against<W, 1>(rows, count, targets, panel, found);
  for (int64_t row = 0; row < count; ++row) {
    best[row] = found[row].value[0];
    into[row] = found[row].panel[0] * LANES;
    for (int lane = 1; lane < LANES; ++lane) {
      const W value = found[row].value[lane];
      const int64_t target = found[row].panel[lane] * LANES + lane;
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
  for (int64_t at = 0; at < count; at += BLOCK) {
    const int64_t size = count - at < BLOCK ? count - at : BLOCK;
    block(rows + at * targets.depth, size, targets, best + at, into + at);
  }
}

template <class W>
THRESHER_INLINE void unit(W* row, int64_t depth, W least) {
  Vector<W> squares = {};
  int64_t channel = 0;
  for (; channel + LANES <= depth; channel += LANES) {
    const Vector<W> part = load(row + channel);
    squares += part * part;
  }
  W sum = lane_sum<W>(squares);
  for (; channel < depth; ++channel) sum += row[channel] * row[channel];
  const W length = std::sqrt(sum);
  const W inverse = 1 / (length > least ? length : least);
  for (channel = 0; channel < depth; ++channel) row[channel] *= inverse;
}

}  // namespace

THRESHER_VECTORISED void normalise(float* row, int64_t depth, float least) {
  unit(row, depth, least);
}
THRESHER_VECTORISED void normalise(double* row, int64_t depth, double least) {
  unit(row, depth, least);
}

THRESHER_VECTORISED void nearest(const float* rows, int64_t count, const Targets<float>& targets,
                                 float* best, int64_t* into) {
  all(rows, count, targets, best, into);
}
THRESHER_VECTORISED void nearest(const double* rows, int64_t count, const Targets<double>& targets,
                                 double* best, int64_t* into) {
  all(rows, count, targets, best, into);
}

}  // namespace thresher
