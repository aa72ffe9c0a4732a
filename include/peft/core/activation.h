// Activation: which adapters of a model are active, switched by one thread while others infer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/composition.h"
#include "peft/core/piece_tree.h"

namespace peft {
namespace internal {

/// Names of adapters, shared by the copies of a snapshot: a model may carry thousands.
class Names {
 public:
  Names() = default;
  Names(std::initializer_list<std::string> names)
      : names_(std::make_shared<const std::vector<std::string>>(names)) {}

  operator const std::vector<std::string>&() const { return *names_; }
  auto begin() const { return names_->begin(); }
  auto end() const { return names_->end(); }
  size_t size() const { return names_->size(); }
  bool empty() const { return names_->empty(); }

  void push_back(const std::string& name) {
    auto longer = *names_;
    longer.push_back(name);
    names_ = std::make_shared<const std::vector<std::string>>(std::move(longer));
  }
  void erase(const std::string& name) {
    auto shorter = *names_;
    std::erase(shorter, name);
    names_ = std::make_shared<const std::vector<std::string>>(std::move(shorter));
  }
  void rename(const std::string& from, const std::string& to) {
    auto renamed = *names_;
    std::replace(renamed.begin(), renamed.end(), from, to);
    names_ = std::make_shared<const std::vector<std::string>>(std::move(renamed));
  }

 private:
  std::shared_ptr<const std::vector<std::string>> names_ = std::make_shared<const std::vector<std::string>>();
};

/// What the sites of a model make of one snapshot: the tree of each, built by the first forward that asks.
class PieceTrees {
 public:
  explicit PieceTrees(size_t sites) : slots_(sites) {}

  /// The tree of a site, by its number in the model's activation; nullptr where it was built from other
  /// pieces than the site has now, which `state` tells, or the snapshot is older than the site.
  template <class Build>
  const PieceTree* of(size_t site, uint64_t state, const Build& build) {
    if (site >= slots_.size()) return nullptr;
    auto& slot = slots_[site];
    std::call_once(slot.built, [&] {
      slot.tree = build();
      slot.state = state;
    });
    return slot.state == state ? &slot.tree : nullptr;
  }

 private:
  struct Slot {
    std::once_flag built;
    PieceTree tree;
    uint64_t state = 0;
  };
  std::vector<Slot> slots_;
};

}  // namespace internal

/// An immutable snapshot of a model's adapters.
struct ActiveSet {
  Composition composition;          ///< how the active ones work together
  std::vector<std::string> active;  ///< their names, in the order they compose
  internal::Names known;            ///< every adapter of the model
  bool enabled = true;
  std::shared_ptr<internal::PieceTrees> trees = {};  ///< of this snapshot, made by `Activation::set`

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
  bool is_active(const std::string& name) const {
    return std::find(active.begin(), active.end(), name) != active.end();
  }
};

/// The active set of one model, shared by its sites. Readers copy a pointer under a small mutex.
class Activation {
 public:
  std::shared_ptr<const ActiveSet> get() const {
    const std::lock_guard lock(mutex_);
    return set_;
  }
  /// Makes a snapshot the active one.
  void set(ActiveSet set) {
    const std::lock_guard lock(mutex_);
    ready_.clear();
    put(std::move(set));
  }

  /// The same for a list of adapters that was checked for a whole model: `reuse` then finds it until an
  /// adapter comes, goes, is renamed, merged or switched off.
  void set_checked(const std::weak_ptr<nn::Module>& model, ActiveSet set) {
    const std::lock_guard lock(mutex_);
    const auto names = set.active;
    put(std::move(set));
    constexpr size_t most = 1024;  // lists that a program switches between
    if (ready_.size() >= most) ready_.clear();
    if (!model.expired()) ready_[names] = {model, set_};
  }
  /// Makes the snapshot active that was checked for these names. False if there is none.
  bool reuse(const nn::Module& model, const std::vector<std::string>& names) {
    const std::lock_guard lock(mutex_);
    const auto found = ready_.find(names);
    if (found == ready_.end() || found->second.model.lock().get() != &model) return false;
    set_ = found->second.set;
    return true;
  }
  /// To be called when what was checked may no longer hold.
  void forget() {
    const std::lock_guard lock(mutex_);
    ready_.clear();
  }

  /// The number of a site that joins the model.
  size_t join() {
    const std::lock_guard lock(mutex_);
    return sites_++;
  }

 private:
  struct Ready {
    std::weak_ptr<nn::Module> model;
    std::shared_ptr<const ActiveSet> set;
  };

  void put(ActiveSet set) {
    set.trees = std::make_shared<internal::PieceTrees>(sites_);
    set_ = std::make_shared<const ActiveSet>(std::move(set));
  }

  mutable std::mutex mutex_;
  size_t sites_ = 0;
  std::map<std::vector<std::string>, Ready> ready_;
  std::shared_ptr<const ActiveSet> set_ = [] {
    ActiveSet none;
    none.trees = std::make_shared<internal::PieceTrees>(0);
    return std::make_shared<const ActiveSet>(std::move(none));
  }();
};

/// Opened by a model's `forward`: everything inside sees one snapshot of the active adapters, whatever other
/// threads do meanwhile. Nested scopes share the outermost one. A site outside any scope takes its own
/// snapshot.
class ForwardScope {
 public:
  /// What one forward has seen of an activation.
  struct Seen {
    std::shared_ptr<Activation> activation;
    std::shared_ptr<const ActiveSet> set;
    bool repeats = false;
  };
  /// What sites of one forward have made for each other.
  struct Made {
    const void* owner;
    int64_t number;
    std::vector<Tensor> tensors;
  };
  struct State {
    std::vector<Seen> seen;
    std::vector<Made> made;
  };

  ForwardScope() {
    if (!current_) current_ = this;
  }
  /// A part of an earlier forward again: what that had seen stands, whatever scope is open.
  explicit ForwardScope(std::vector<Seen> seen) : outer_(current_), state_{std::move(seen), {}} {
    current_ = this;
  }
  ~ForwardScope() {
    if (current_ == this) current_ = outer_;
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
    for (const auto& made : current_->state_.made) {
      if (made.owner == owner && made.number == number) return made.tensors;
    }
    auto tensors = make();
    return current_->state_.made.emplace_back(Made{owner, number, std::move(tensors)}).tensors;
  }

  /// Of the scope that is open on this thread.
  static State& state() {
    TORCH_INTERNAL_ASSERT(current_);
    return current_->state_;
  }

 private:
  Seen& of(const std::shared_ptr<Activation>& activation) {
    for (auto& seen : state_.seen) {
      if (seen.activation == activation) return seen;
    }
    return state_.seen.emplace_back(Seen{activation, activation->get()});
  }

  static inline thread_local ForwardScope* current_ = nullptr;
  ForwardScope* outer_ = nullptr;
  State state_;
};

/// While it lives, each row of this thread's batches uses its own adapter; "__base__" is none. Inference
/// only.
///
/// Example:
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
