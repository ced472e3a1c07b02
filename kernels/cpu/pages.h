// Memory in large pages.  Finding a page costs, which shows where a kernel reads a little of each of many.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace thresher {

constexpr size_t LARGE_PAGE = size_t{1} << 21;
constexpr size_t LINE = 64;  // of a cache

struct Free {
  void operator()(void* data) const { std::free(data); }
};
template <class T>
using Owned = std::unique_ptr<T[], Free>;

// Uninitialised, aligned to a cache line; in large pages if it is large and the system has them.
template <class T>
Owned<T> allocate(size_t count) {
  const size_t bytes = count * sizeof(T), alignment = bytes < LARGE_PAGE ? LINE : LARGE_PAGE;
  const size_t whole = (bytes / alignment + 1) * alignment;
  void* data = std::aligned_alloc(alignment, whole);
  if (!data) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == LARGE_PAGE) madvise(data, whole, MADV_HUGEPAGE);
#endif
  return Owned<T>(static_cast<T*>(data));
}

// Weights of the host's: the kernel of the system is asked, once, to move them.  It may decline.
class LargePages {
 public:
  void hold(const void* data, size_t bytes) const {
    std::call_once(asked_, [&] { ask(reinterpret_cast<uintptr_t>(data), bytes); });
  }

 private:
  static void ask([[maybe_unused]] uintptr_t at, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1; older systems refuse it
    for (uintptr_t page = at / LARGE_PAGE * LARGE_PAGE; page < at + bytes; page += LARGE_PAGE)
      madvise(reinterpret_cast<void*>(page), LARGE_PAGE, COLLAPSE);  // one by one: its ends may not be ours
#endif
  }

  mutable std::once_flag asked_;
};

}  // namespace thresher
