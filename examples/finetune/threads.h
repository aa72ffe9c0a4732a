// Threads: how many compute, in the combination that is fast with the BLAS LibTorch was linked with.
#pragma once

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>

namespace finetune {

namespace internal {

/// A function of a library this process has loaded, or nullptr.
template <class Function>
Function* loaded_function(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

inline bool is_environment(const char* name, std::string_view value) {
  const char* found = std::getenv(name);
  return found != nullptr && found == value;
}

/// What OpenBLAS calls the kernel it has chosen, if that is one for much older processors than this.
inline std::string slow_kernel() {
#if defined(__x86_64__)
  auto* name_of_kernel = loaded_function<const char*()>("openblas_get_corename");
  if (name_of_kernel == nullptr || !__builtin_cpu_supports("avx2")) return {};
  const std::string name = name_of_kernel();
  constexpr std::array<std::string_view, 6> fast{"Haswell",        "Zen",      "SkylakeX", "Cooperlake",
                                                 "SapphireRapids", "Excavator"};
  const auto same = [&](std::string_view other) {
    return std::equal(name.begin(), name.end(), other.begin(), other.end(),
                      [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); });
  };
  return std::any_of(fast.begin(), fast.end(), same) ? std::string() : name;
#else
  return {};
#endif
}

}  // namespace internal

/// Sets the number of threads, 0 for one a core, and says in a line what was set. OpenMP's threads, which
/// LibTorch uses, and those of an OpenBLAS with threads of its own fight for the cores: while one kind waits
/// in a loop, the other starves. So only OpenBLAS gets several, unless OpenMP was told not to wait in a loop
/// (GOMP_SPINCOUNT=0).
inline std::string set_threads(int wanted) {
  const int count = wanted > 0 ? wanted : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  auto* set_blas = internal::loaded_function<void(int)>("openblas_set_num_threads");
  auto* kind = internal::loaded_function<int()>("openblas_get_parallel");
  constexpr int own_threads = 1;
  int torch_threads = count;
  if (set_blas != nullptr) {
    const bool patient = internal::is_environment("GOMP_SPINCOUNT", "0") ||
                         internal::is_environment("OMP_WAIT_POLICY", "passive");
    if (kind != nullptr && kind() == own_threads && !patient) torch_threads = 1;
  }
  at::set_num_threads(torch_threads);
  if (set_blas == nullptr) return fmt::format("{} threads", count);
  set_blas(count);
  return fmt::format("{} threads in LibTorch, {} in OpenBLAS", torch_threads, count);
}

/// A warning for people, or nothing: OpenBLAS releases that do not know a processor take a kernel several
/// times slower than they have.
inline std::string slow_blas_warning() {
  const auto kernel = internal::slow_kernel();
  if (kernel.empty()) return {};
  const char* better = "Haswell";
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) better = "SkylakeX";
#endif
  return fmt::format(
      "warning: OpenBLAS does not know this processor and runs its slow kernel '{}' (hint: export "
      "OPENBLAS_CORETYPE={})",
      kernel, better);
}

}  // namespace finetune
