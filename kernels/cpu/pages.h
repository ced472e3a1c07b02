// Weights in large pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace thresher {

// Rows far apart lie each in pages of their own, and finding a page costs more than reading what is needed
// of it.  So the kernel of the system is asked, once, to keep a matrix in pages of 2 MiB.  It may decline.
class LargePages {
 public:
  void hold(const void* data, size_t bytes) const {
    std::call_once(asked_, [&] { ask(reinterpret_cast<uintptr_t>(data), bytes); });
  }

 private:
  static void ask([[maybe_unused]] uintptr_t at, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t PAGE = uintptr_t{1} << 21;
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1; older systems refuse it
    for (uintptr_t page = at / PAGE * PAGE; page < at + bytes; page += PAGE)
      madvise(reinterpret_cast<void*>(page), PAGE, COLLAPSE);  // one by one: its ends may not be ours
#endif
  }

  mutable std::once_flag asked_;
};

}  // namespace thresher
