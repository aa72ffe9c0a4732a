// CPU level: which vector instructions the kernels use.
#pragma once

#include <algorithm>
#include <atomic>

/// 1 where this compiler can compile a function for AVX2 or AVX-512, whatever the file is compiled for:
/// `__attribute__((target("avx2,fma")))`, `__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))`.
#if defined(__x86_64__) && defined(__GNUC__)
#define PEFT_HAS_AVX 1
#include <immintrin.h>
#else
#define PEFT_HAS_AVX 0
#endif

/// Before a loop of up to 16 known rounds: GCC would else, at -O2, keep an array of vectors in memory.
#if defined(__GNUC__) && !defined(__clang__)
#define PEFT_UNROLLED _Pragma("GCC unroll 16")
#else
#define PEFT_UNROLLED
#endif

namespace peft::internal {

/// Vector instructions, each level with those before it.
enum class CpuLevel {
  scalar,  ///< plain C++, the kernels' definition
  avx2,    ///< AVX2 and FMA
  avx512   ///< AVX-512 F, BW, DQ and VL
};

/// The highest level that this machine and its operating system have.
inline CpuLevel highest_cpu_level() {
#if PEFT_HAS_AVX
  static const CpuLevel level = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::scalar;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? CpuLevel::avx512 : CpuLevel::avx2;
  }();
  return level;
#else
  return CpuLevel::scalar;
#endif
}

/// The level in use, by all threads.
inline std::atomic<CpuLevel>& chosen_cpu_level() {
  static std::atomic<CpuLevel> level{highest_cpu_level()};
  return level;
}

/// The level the kernels are to use: the machine's, unless a `CpuLevelGuard` lives.
inline CpuLevel cpu_level() { return chosen_cpu_level().load(std::memory_order_relaxed); }

/// Lowers the level of all threads while it lives, for tests and benchmarks; one that the machine does not
/// have becomes its highest.
///
/// Example:
/// ```
/// const CpuLevelGuard guard(CpuLevel::scalar);
/// ```
class CpuLevelGuard {
 public:
  explicit CpuLevelGuard(CpuLevel level)
      : before_(chosen_cpu_level().exchange(std::min(level, highest_cpu_level()))) {}
  ~CpuLevelGuard() { chosen_cpu_level() = before_; }
  CpuLevelGuard(const CpuLevelGuard&) = delete;
  CpuLevelGuard& operator=(const CpuLevelGuard&) = delete;

 private:
  CpuLevel before_;
};

}  // namespace peft::internal
