// Kept: a tensor computed from others, until one of them changes.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

/// A tensor's values, as they were: its memory and how often it had been written to. Keeps the values not
/// alive, but their place from being taken for another tensor's.
class ValueMark {
 public:
  ValueMark() = default;
  explicit ValueMark(const Tensor& t)
      : storage_(t.storage().getWeakStorageImpl()), data_(t.data_ptr()), version_(t._version()) {}
  /// Whether a tensor still has these values. False for the mark of none.
  bool is(const Tensor& t) const {
    return storage_ && t.data_ptr() == data_ && t._version() == version_ &&
           storage_->lock().get() == t.storage().unsafeGetStorageImpl();
  }
  bool is_of_none() const { return !storage_; }

 private:
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage_;
  const void* data_ = nullptr;
  int64_t version_ = 0;
};

/// A value without a history that is computed anew only when a tensor it comes from has been written to, has
/// got other memory, or a number it comes from is another. Several threads may ask at once, on a GPU on one
/// stream.
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
      for (const auto& source : sources)
        sources_.push_back(source.defined() ? ValueMark(source) : ValueMark());
      number_ = number;
    }
    return value_;
  }

 private:
  bool stands(const std::vector<Tensor>& sources, double number) const {
    return value_.defined() && number == number_ &&
           std::equal(sources.begin(), sources.end(), sources_.begin(), sources_.end(),
                      [](const Tensor& now, const ValueMark& then) {
                        return now.defined() ? then.is(now) : then.is_of_none();
                      });
  }

  mutable std::mutex mutex_;
  mutable Tensor value_;
  mutable std::vector<ValueMark> sources_;
  mutable double number_ = 0;
};

}  // namespace peft::internal
