// Activation: which adapters of a model are active, switched by one thread while others infer.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"

namespace peft {

/// An immutable snapshot of a model's adapters.
struct ActiveSet {
  std::vector<std::string> active;  ///< in the order they compose
  std::vector<std::string> known;   ///< every adapter of the model
  bool enabled = true;

  bool knows(const std::string& name) const {
    return std::find(known.begin(), known.end(), name) != known.end();
  }
};

/// The active set of one model, shared by its sites. Readers copy a pointer under a small mutex.
class Activation {
 public:
  std::shared_ptr<const ActiveSet> get() const {
    const std::lock_guard lock(mutex_);
    return set_;
  }
  void set(ActiveSet set) {
    auto next = std::make_shared<const ActiveSet>(std::move(set));
    const std::lock_guard lock(mutex_);
    set_.swap(next);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const ActiveSet> set_ = std::make_shared<const ActiveSet>();
};

/// Opened by a model's `forward`: everything inside sees one snapshot of the active adapters, whatever other
/// threads do meanwhile. Nested scopes share the outermost one. A site outside any scope takes its own
/// snapshot.
class ForwardScope {
 public:
  ForwardScope() {
    if (!current_) current_ = this;
  }
  ~ForwardScope() {
    if (current_ == this) current_ = nullptr;
  }
  ForwardScope(const ForwardScope&) = delete;
  ForwardScope& operator=(const ForwardScope&) = delete;

  /// The snapshot this thread's forward works with.
  static std::shared_ptr<const ActiveSet> active(const std::shared_ptr<Activation>& activation) {
    if (!current_) return activation->get();
    for (const auto& [seen, set] : current_->seen_) {
      if (seen == activation) return set;
    }
    return current_->seen_.emplace_back(activation, activation->get()).second;
  }

 private:
  static inline thread_local ForwardScope* current_ = nullptr;
  std::vector<std::pair<std::shared_ptr<Activation>, std::shared_ptr<const ActiveSet>>> seen_;
};

/// While it lives, each row of this thread's batches uses its own adapter; "__base__" is none. Inference
/// only. Example:
/// ```
/// peft::RowAdapters rows({"german", "__base__", "french"});
/// auto logits = model->forward(batch_of_three).logits;
/// ```
class RowAdapters {
 public:
  explicit RowAdapters(std::vector<std::string> names) : names_(std::move(names)), outer_(current_) {
    TORCH_CHECK_VALUE(!names_.empty(), "RowAdapters: expected one adapter name a row, but got none");
    current_ = this;
  }
  ~RowAdapters() { current_ = outer_; }
  RowAdapters(const RowAdapters&) = delete;
  RowAdapters& operator=(const RowAdapters&) = delete;

  static constexpr const char* base = "__base__";
  /// The names in force on this thread, or nullptr.
  static const std::vector<std::string>* current() { return current_ ? &current_->names_ : nullptr; }

 private:
  static inline thread_local const RowAdapters* current_ = nullptr;
  std::vector<std::string> names_;
  const RowAdapters* outer_;
};

}  // namespace peft
