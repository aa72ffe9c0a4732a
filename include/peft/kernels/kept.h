// Kept: a tensor computed from others, until one of them changes.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

/// A value without a history that is computed anew only when a tensor it comes from has been written to, has
/// got other memory, or a number it comes from is another. Several threads may ask at once.
class Kept {
 public:
  Kept() = default;
  // A copy of the owner has tensors of its own.
  Kept(const Kept&) {}
  Kept& operator=(const Kept&) { return *this; }
  ~Kept() = default;

  /// `compute()`, or what it gave before. `sources` may hold undefined tensors.
  template <class Compute>
  Tensor of(const std::vector<Tensor>& sources, double number, const Compute& compute) const {
    const torch::NoGradGuard no_grad;
    // Tensors made in inference mode count no changes, and serve no backward.
    const bool counts = std::none_of(sources.begin(), sources.end(),
                                     [](const Tensor& t) { return t.defined() && t.is_inference(); });
    if (!counts || c10::InferenceMode::is_enabled()) return compute();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!stands(sources, number)) {
      value_ = Tensor();
      sources_.clear();
      value_ = compute();
      for (const auto& source : sources) sources_.push_back(source.defined() ? Source(source) : Source());
      number_ = number;
    }
    return value_;
  }

 private:
  /// The memory behind a tensor, as it was. A handle that does not keep the values, but their place from
  /// being taken for another's.
  struct Source {
    Source() = default;
    explicit Source(const Tensor& t)
        : storage(t.storage().getWeakStorageImpl()), data(t.data_ptr()), version(t._version()) {}
    bool is(const Tensor& t) const {
      return t.data_ptr() == data && t._version() == version && storage &&
             storage->lock().get() == t.storage().unsafeGetStorageImpl();
    }
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    const void* data = nullptr;
    int64_t version = 0;
  };
  bool stands(const std::vector<Tensor>& sources, double number) const {
    return value_.defined() && number == number_ &&
           std::equal(sources.begin(), sources.end(), sources_.begin(), sources_.end(),
                      [](const Tensor& now, const Source& then) {
                        return now.defined() ? then.is(now) : !then.storage;
                      });
  }

  mutable std::mutex mutex_;
  mutable Tensor value_;
  mutable std::vector<Source> sources_;
  mutable double number_ = 0;
};

}  // namespace peft::internal
