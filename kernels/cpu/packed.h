// Weights in the order in which products read them.
#pragma once

#include <algorithm>

#include "cpu/pages.h"
#include "cpu/tile.h"

namespace thresher {

constexpr int64_t BLOCK = 32;  // columns that pass while rows are in the first cache: a multiple of every tile's

// Matrices [count, depth, width] by the columns of a tile, with zeros behind the last one: [count, blocks,
// panels, depth, columns].  As they came, the rows of a panel are `width` apart, which often puts all of
// them into a few sets of the caches.
template <class S>
class Packed {
 public:
  Packed(const S* matrices, int64_t count, int64_t depth, int64_t width)
      : count_(count), depth_(depth), blocks_((width + BLOCK - 1) / BLOCK),
        data_(allocate<S>(static_cast<size_t>(count * blocks_ * depth * BLOCK))) {
    const int64_t panel = tile_columns<Wide<S>>();
    S* to = data_.get();
    for (int64_t matrix = 0; matrix < count; ++matrix, matrices += depth * width)
      for (int64_t from = 0; from < blocks_ * BLOCK; from += panel) {
        const int64_t columns = std::clamp<int64_t>(width - from, 0, panel);
        for (int64_t row = 0; row < depth; ++row, to += panel) {
          if (columns > 0) std::copy_n(matrices + row * width + from, columns, to);
          std::fill(to + columns, to + panel, S{});
        }
      }
  }

  // [panels, depth, columns of a tile]
  const S* block(int64_t matrix, int64_t block) const {
    return data_.get() + (matrix * blocks_ + block) * depth_ * BLOCK;
  }
  int64_t count() const { return count_; }
  int64_t depth() const { return depth_; }
  int64_t blocks() const { return blocks_; }

 private:
  int64_t count_, depth_, blocks_;
  Owned<S> data_;
};

}  // namespace thresher
