// Activation: which adapters of a model are active, switched by one thread while others infer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/composition.h"

namespace peft {

/// An immutable snapshot of a model's adapters.
struct ActiveSet {
  Composition composition;          ///< how the active ones work together
  std::vector<std::string> active;  ///< their names, in the order they compose
  std::vector<std::string> known;   ///< every adapter of the model
  bool enabled = true;

  void activate(Composition next) {
    composition = std::move(next);
    active = composition.names();
  }
  /// Puts `last` on top of the active ones.
  void append(Composition last) {
    composition.append(std::move(last));
    active = composition.names();
  }

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
    return current_ ? current_->of(activation).set : activation->get();
  }

  /// Into how many parts an active Parallel divides the batch of this thread's forward: how often the model
  /// repeats its inputs, which the sites then rely on. Throws: c10::Error for a Parallel outside any scope.
  static int64_t branches(const std::shared_ptr<Activation>& activation) {
    const auto set = active(activation);
    const auto count = set->enabled ? set->composition.branches() : int64_t{1};
    TORCH_CHECK(current_ || count == 1,
                "Parallel: the model's forward must open a peft::ForwardScope before it repeats its inputs");
    if (current_) current_->of(activation).repeats = true;
    return count;
  }
  /// Whether the model has asked for `branches`.
  static bool repeats(const std::shared_ptr<Activation>& activation) {
    return current_ && current_->of(activation).repeats;
  }

  /// Tensors that several sites of one forward use: what `make` gives, made for the first that asks, and kept
  /// for the others until the forward ends. `owner` and `number` tell them apart. Outside any scope they are
  /// made each time.
  template <class Make>
  static std::vector<Tensor> once(const void* owner, int64_t number, const Make& make) {
    if (!current_) return make();
    for (const auto& made : current_->made_) {
      if (made.owner == owner && made.number == number) return made.tensors;
    }
    auto tensors = make();
    return current_->made_.emplace_back(Made{owner, number, std::move(tensors)}).tensors;
  }

 private:
  struct Seen {
    std::shared_ptr<Activation> activation;
    std::shared_ptr<const ActiveSet> set;
    bool repeats = false;
  };
  Seen& of(const std::shared_ptr<Activation>& activation) {
    for (auto& seen : seen_) {
      if (seen.activation == activation) return seen;
    }
    return seen_.emplace_back(Seen{activation, activation->get()});
  }

  struct Made {
    const void* owner;
    int64_t number;
    std::vector<Tensor> tensors;
  };

  static inline thread_local ForwardScope* current_ = nullptr;
  std::vector<Seen> seen_;
  std::vector<Made> made_;
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
