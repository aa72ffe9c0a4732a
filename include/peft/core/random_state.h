// RandomState: where the random number generators stand, to put them back there.
#pragma once

#include <ATen/Context.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

inline Tensor generator_state(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_generator_state(at::Generator generator, const Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// Where the random number generators stand that a computation may draw from: the CPU's, and those of the
/// GPUs its inputs are on.
class RandomState {
 public:
  explicit RandomState(const std::vector<Tensor>& inputs = {}) {
    add(torch::kCPU);
    for (const auto& input : inputs) {
      if (input.defined() && input.is_cuda()) add(input.device());
    }
  }
  /// The same generators now.
  RandomState now() const {
    auto result = *this;
    for (auto& [device, state] : result.states_) state = state_of(device);
    return result;
  }
  void restore() const {
    for (const auto& [device, state] : states_) {
      set_generator_state(at::globalContext().defaultGenerator(device), state);
    }
  }
  friend bool operator==(const RandomState& a, const RandomState& b) {
    return std::equal(a.states_.begin(), a.states_.end(), b.states_.begin(), b.states_.end(),
                      [](const auto& x, const auto& y) {
                        const auto &own = x.second, &other = y.second;  // bytes on the CPU
                        return x.first == y.first && own.nbytes() == other.nbytes() &&
                               std::memcmp(own.data_ptr(), other.data_ptr(), own.nbytes()) == 0;
                      });
  }

 private:
  void add(torch::Device device) {
    const bool known = std::any_of(states_.begin(), states_.end(),
                                   [device](const auto& state) { return state.first == device; });
    if (!known) states_.emplace_back(device, state_of(device));
  }
  static Tensor state_of(torch::Device device) {
    return generator_state(at::globalContext().defaultGenerator(device));
  }

  std::vector<std::pair<torch::Device, Tensor>> states_;
};

/// Puts the generators back to where they stood, as this ends.
class RandomStateGuard {
 public:
  explicit RandomStateGuard(RandomState before = RandomState()) : before_(std::move(before)) {}
  ~RandomStateGuard() { before_.restore(); }
  RandomStateGuard(const RandomStateGuard&) = delete;
  RandomStateGuard& operator=(const RandomStateGuard&) = delete;

 private:
  RandomState before_;
};

}  // namespace peft::internal
