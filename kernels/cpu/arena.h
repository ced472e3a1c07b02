// Scratch memory of one computation.
#pragma once

#include <vector>

#include "cpu/pages.h"

namespace thresher {

// What a thread once needed is kept for its next computation, so that large buffers are not mapped
// and faulted in anew at every run.  One Arena at a time in a thread.
class Arena {
 public:
  Arena() : used_(0), wanted_(0) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (wanted_ <= kept().size) return;
    kept() = {};
    try {
      kept() = {allocate<std::byte>(wanted_), wanted_};
    } catch (const std::bad_alloc&) {  // the next computation will ask again
    }
  }

  // Uninitialised, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + LINE - 1) / LINE * LINE;
    wanted_ += bytes;
    std::byte* found;
    if (used_ + bytes <= kept().size) {
      found = kept().data.get() + used_;
      used_ += bytes;
    } else {
      more_.push_back(allocate<std::byte>(bytes));
      found = more_.back().get();
    }
    return reinterpret_cast<T*>(found);
  }

 private:
  struct Kept {
    Owned<std::byte> data;
    size_t size = 0;
  };
  static Kept& kept() {
    static thread_local Kept bytes;
    return bytes;
  }

  size_t used_, wanted_;
  std::vector<Owned<std::byte>> more_;
};

}  // namespace thresher
