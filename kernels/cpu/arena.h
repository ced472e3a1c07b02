// Scratch memory of one computation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace thresher {

// What a thread once needed is kept for its next computation, so that large buffers are not mapped
// and faulted in anew at every run.  One Arena at a time in a thread.
class Arena {
 public:
  Arena() : used_(0), wanted_(0) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (wanted_ + ALIGNMENT > kept().size()) {
      std::vector<std::byte>().swap(kept());
      try {
        kept().resize(wanted_ + ALIGNMENT);
      } catch (const std::bad_alloc&) {  // the next computation will ask again
      }
    }
  }

  // Uninitialised, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes =
        (static_cast<size_t>(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    wanted_ += bytes;
    std::byte* found;
    if (used_ + bytes + ALIGNMENT <= kept().size()) {
      found = aligned(kept().data()) + used_;
      used_ += bytes;
    } else {
      more_.push_back(std::make_unique<std::byte[]>(bytes + ALIGNMENT));
      found = aligned(more_.back().get());
    }
    return reinterpret_cast<T*>(found);
  }

 private:
  static constexpr size_t ALIGNMENT = 64;

  static std::byte* aligned(std::byte* at) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    return at + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
  }
  static std::vector<std::byte>& kept() {
    static thread_local std::vector<std::byte> bytes;
    return bytes;
  }

  size_t used_, wanted_;
  std::vector<std::unique_ptr<std::byte[]>> more_;
};

}  // namespace thresher
