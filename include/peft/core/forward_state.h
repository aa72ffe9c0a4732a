// ForwardState: what a forward depends on beside its inputs and random numbers: autocast, rows and tasks.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/compat.h"
#include "peft/core/input.h"

namespace peft::internal {

/// True while a function runs that backward is to run again (`checkpoint`).
inline thread_local bool runs_again = false;

/// Autocast as it was where this was made.
class AutocastState {
 public:
  AutocastState() {
    for (auto& [device, enabled, dtype] : kinds_) {
      enabled = set_autocast(device, true);
      set_autocast(device, enabled);
      dtype = set_autocast_dtype(device, torch::kBFloat16);
      set_autocast_dtype(device, dtype);
    }
  }
  void set() const {
    for (const auto& [device, enabled, dtype] : kinds_) {
      set_autocast(device, enabled);
      set_autocast_dtype(device, dtype);
    }
  }

 private:
  struct Kind {
    torch::DeviceType device;
    bool enabled;
    torch::ScalarType dtype;
  };
  std::array<Kind, 2> kinds_{Kind{torch::kCPU, false, torch::kBFloat16},
                             Kind{torch::kCUDA, false, torch::kBFloat16}};
};

/// Autocast as it was, while this lives, and no cache of the weights it casts: they would carry the history
/// of one run into another.
class AutocastGuard {
 public:
  explicit AutocastGuard(const AutocastState& state) : cached_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
    state.set();
  }
  ~AutocastGuard() {
    before_.set();
    at::autocast::set_autocast_cache_enabled(cached_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  AutocastState before_;
  bool cached_;
};

/// Which rows and tasks a thread's forwards are for.
struct RowState {
  std::optional<std::vector<std::string>> adapters;
  Tensor tasks = TaskIds::current();
  RowState() {
    if (const auto* names = RowAdapters::current()) adapters = *names;
  }
};

}  // namespace peft::internal
