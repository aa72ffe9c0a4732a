// KeptMemory: glibc keeps the memory of one step for the next.
#pragma once

#include <fmt/format.h>

#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace finetune {

namespace internal {

inline constexpr int mmap_threshold = 32 << 20;  // the largest that glibc accepts
inline constexpr int trim_threshold = 2'000'000'000;
inline constexpr int top_pad = 64 << 20;

}  // namespace internal

/// Keeps the memory of one step for the next. glibc would give every large block back to the kernel, which
/// then has to clear it again.
inline void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, internal::mmap_threshold);
  mallopt(M_TRIM_THRESHOLD, internal::trim_threshold);
  mallopt(M_TOP_PAD, internal::top_pad);
#endif
}

/// The environment variables that have a child process keep it alike.
inline std::vector<std::string> kept_memory_variables() {
  return {fmt::format("MALLOC_MMAP_THRESHOLD_={}", internal::mmap_threshold),
          fmt::format("MALLOC_TRIM_THRESHOLD_={}", internal::trim_threshold),
          fmt::format("MALLOC_TOP_PAD_={}", internal::top_pad)};
}

}  // namespace finetune
