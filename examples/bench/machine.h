// Machine: what the figures were measured on, in a few lines.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <fmt/format.h>
#include <peft/kernels/shadow.h>
#include <torch/version.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <string_view>

#include "finetune/threads.h"

namespace bench {

namespace internal {

/// The value of the first line of /proc/cpuinfo that begins so.
inline std::string cpuinfo(std::string_view key) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.compare(0, key.size(), key) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

/// "OpenBLAS 0.3.21, kernel SkylakeX" or "MKL 2024.2".
inline std::string blas() {
  if (auto* corename = finetune::internal::loaded_function<const char*()>("openblas_get_corename")) {
    std::string config;
    if (auto* get = finetune::internal::loaded_function<const char*()>("openblas_get_config")) config = get();
    const auto words = config.substr(0, config.find(' ', config.find(' ') + 1));
    return fmt::format("{}, kernel {}", words.empty() ? "OpenBLAS" : words, corename());
  }
  if (!at::hasMKL()) return "unknown";
  const std::string text = at::get_mkl_version(), word = "Version ";
  const auto begin = text.find(word);
  if (begin == std::string::npos) return text;
  const auto version = text.substr(begin + word.size());
  return "MKL " + version.substr(0, version.find_first_of(" -"));
}

}  // namespace internal

/// What the header of a run says, in order of its names.
inline std::map<std::string, std::string> machine(const std::string& threads, bool tuned,
                                                  const std::string& clock) {
  const char* tunables = std::getenv("GLIBC_TUNABLES");
  return {
      {"cpu", internal::cpuinfo("model name")},
      {"bf16 instructions", peft::cpu_multiplies_bfloat16() ? "yes" : "no"},
      {"blas", internal::blas()},
      {"libtorch", TORCH_VERSION},
      {"threads", threads},
      {"malloc", tuned      ? "glibc, keeping freed memory (mmap and trim thresholds raised)"
                 : tunables ? fmt::format("glibc, GLIBC_TUNABLES={}", tunables)
                            : std::string("glibc's defaults")},
      {"clock", clock},
  };
}

}  // namespace bench
