// Site: a place in a frozen model where adapters attach; knows how to carry them, and no method.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/compat.h"
#include "peft/core/piece.h"
#include "peft/core/site_traits.h"

namespace peft {

/// What the files say of the model an adapter belongs to.
struct ModelDescription {
  std::string task_type;     ///< Hugging Face PEFT's: "SEQ_CLS", "FEATURE_EXTRACTION", …; empty: none
  std::string name_or_path;  ///< where the base came from; empty: unknown
  std::string model_type;    ///< Hugging Face's: "bert", …; empty: unknown
};

/// A model that can say what it is. Our own models are; yours may be.
class Described {
 public:
  virtual ~Described() = default;
  virtual ModelDescription describe() const = 0;
};

/// Where a piece was asked for: the declarative half of a target, for the config on disk.
struct Origin {
  std::vector<std::string> names;  ///< last path segments or whole paths; empty with a pattern or a predicate
  std::string pattern;             ///< regular expression for the whole path
  std::vector<std::string> exclude;  ///< names
  std::vector<int64_t> layers;       ///< layers_to_transform
  std::vector<std::string> layers_pattern;
};

class Controller;

/// What all pieces of one adapter share.
struct AdapterRecord {
  std::string name;
  ModelDescription model;
  std::vector<std::shared_ptr<Controller>> controllers;  ///< of the methods that have one
  bool has_optimizer = false;
};

/// One piece on a site, with where it came from.
struct Attached {
  std::shared_ptr<PieceImpl> piece;
  std::shared_ptr<const Origin> origin;
  std::shared_ptr<AdapterRecord> record;
};

/// A place where adapters attach. Derived sites say what they offer (`base_info`) and run `chain` in their
/// forward.
class SiteImpl : public nn::Module {
  /// Groups the pieces of one adapter in the module tree.
  class Container : public nn::Module {
   public:
    Container() : nn::Module("Adapter") {}
    void add(const std::shared_ptr<PieceImpl>& piece) { register_module(piece->method(), piece); }
    void add(const std::string& method, const std::shared_ptr<SharedImpl>& shared) {
      if (!shared_) shared_ = register_module("shared", std::make_shared<nn::Module>("Shared"));
      shared_->register_module(method, shared);
    }

   private:
    std::shared_ptr<nn::Module> shared_;
  };

 public:
  using nn::Module::Module;

  /// What the site is, without its path.
  virtual SiteInfo base_info() const = 0;
  /// What a method sees, with the path the site was last found under.
  SiteInfo info() const {
    auto info = base_info();
    info.path = path_;
    return info;
  }
  void set_path(std::string path) {
    path_ = std::move(path);
    for (auto& [name, slot] : adapters_) {
      for (auto& attached : slot.pieces) attached.piece->set_site(info());
    }
  }
  const std::string& path() const { return path_; }
  /// The last segment of its path, for a site that a parent holds under `key`.
  virtual std::string segment(const std::string& key) const { return key; }

  /// The pieces of one adapter, in the order they compose; empty if it has none here.
  const std::vector<Attached>& pieces(const std::string& adapter) const {
    static const std::vector<Attached> none;
    const auto found = adapters_.find(adapter);
    return found == adapters_.end() ? none : found->second.pieces;
  }
  std::vector<std::string> adapters() const {
    std::vector<std::string> names;
    for (const auto& [name, slot] : adapters_) names.push_back(name);
    return names;
  }

  /// Hangs a piece into the module tree at `<adapter>.<method>`. `add_adapter` checks everything before.
  void attach(Attached attached) {
    auto& [container, pieces, shared] = adapters_[attached.record->name];
    if (!container) container = register_module(attached.record->name, std::make_shared<Container>());
    container->add(attached.piece);
    attached.piece->train(is_training());
    const auto under = std::find_if(pieces.begin(), pieces.end(), [&](const Attached& other) {
      return attached.piece->substitutes() && !other.piece->substitutes();
    });
    pieces.insert(under, std::move(attached));
  }
  /// Hangs what an adapter's pieces of one method share into the module tree, at
  /// `<adapter>.shared.<method>`, and ties the pieces of this site to it.
  void attach_shared(const std::string& adapter, const std::string& method,
                     const std::shared_ptr<SharedImpl>& shared) {
    auto& slot = adapters_.at(adapter);
    slot.container->add(method, shared);
    shared->train(is_training());
    slot.shared.emplace(method, shared);
    for (const auto& attached : slot.pieces) {
      if (attached.piece->method() == method) attached.piece->tie(shared);
    }
  }
  /// The shared parts that are registered here, by method.
  const std::map<std::string, std::shared_ptr<SharedImpl>>& shared(const std::string& adapter) const {
    static const std::map<std::string, std::shared_ptr<SharedImpl>> none;
    const auto found = adapters_.find(adapter);
    return found == adapters_.end() ? none : found->second.shared;
  }
  void detach(const std::string& adapter) {
    if (adapters_.erase(adapter)) unregister_module(adapter);
  }
  /// `from` becomes `to`; the record is renamed by the caller.
  void rename(const std::string& from, const std::string& to) {
    auto node = adapters_.extract(from);
    if (node.empty()) return;
    unregister_module(from);
    register_module(to, node.mapped().container);
    node.key() = to;
    adapters_.insert(std::move(node));
  }
  /// True if a child, parameter or buffer of the base has this name already.
  bool owns_name(const std::string& name) const {
    if (adapters_.count(name)) return false;
    return named_children().contains(name) || named_parameters(false).contains(name) ||
           named_buffers(false).contains(name);
  }

  const std::shared_ptr<Activation>& activation() const { return activation_; }
  void share(std::shared_ptr<Activation> activation) { activation_ = std::move(activation); }
  void set_record(const std::string& adapter, const std::shared_ptr<AdapterRecord>& record) {
    for (auto& attached : adapters_.at(adapter).pieces) attached.record = record;
  }

  /// The untouched layer, valid while the site lives.
  virtual std::unique_ptr<LayerView> base_view() const = 0;
  /// The untouched layer's weights; the merged ones while merged.
  virtual Weights base_weights() const = 0;
  /// W′ − W of one adapter alone, in the weight's layout.
  virtual Weights delta(const std::string& adapter) const = 0;
  /// Effective weights of these adapters composed in order, computed out of place.
  virtual Weights merged_weights(const std::vector<std::string>& adapters) const = 0;
  /// Puts other values behind the base's parameters, keeping the old ones for `unmerge` if `keep`.
  virtual void swap_in(const Weights& weights, std::vector<std::string> adapters, bool keep) = 0;
  /// Puts the kept values back, bit for bit.
  virtual void swap_out() = 0;
  virtual bool keeps_original() const = 0;
  bool is_merged() const { return !merged_.empty(); }
  const std::vector<std::string>& merged() const { return merged_; }

  /// Base parameters under their keys, adapters left out.
  virtual torch::OrderedDict<std::string, Tensor> base_parameters() const = 0;

  /// Reads a checkpoint that may come from the plain layer, so lack the adapters.
  void load(torch::serialize::InputArchive& archive) override {
    TORCH_CHECK(!is_merged(), "load: '", path_,
                "' is merged, and unmerge would undo it (hint: unmerge first)");
    for (auto& item : named_parameters(/*recurse=*/false)) archive.read(item.key(), item.value());
    for (auto& item : named_buffers(/*recurse=*/false))
      archive.read(item.key(), item.value(), /*is_buffer=*/true);
    for (const auto& child : named_children()) {
      if (!child.value()->is_serializable()) continue;
      torch::serialize::InputArchive inner;
      const bool present = archive.try_read(child.key(), inner);
      if (!present && adapters_.count(child.key())) continue;
      TORCH_CHECK(present, "load: no such submodule '", child.key(), "' in the checkpoint of site '", path_,
                  "'");
      child.value()->load(inner);
    }
  }

 protected:
  /// Copies adapters (own tensors, own records) and the state of a merge; the base is the derived class's.
  void copy_adapters_from(const SiteImpl& other) {
    path_ = other.path_;
    merged_ = other.merged_;
    activation_ = std::make_shared<Activation>();
    activation_->set(*other.activation_->get());
    for (const auto& child : other.named_children()) {  // the order of registration
      const auto found = other.adapters_.find(child.key());
      if (found == other.adapters_.end()) continue;
      auto record = std::make_shared<AdapterRecord>(*found->second.pieces.front().record);
      record->has_optimizer = false;
      record->controllers.clear();  // peft::clone copies them
      for (const auto& attached : found->second.pieces)
        attach({attached.piece->copy(), attached.origin, record});
      // The pieces of other sites are tied by peft::clone and peft::adapter.
      for (const auto& [method, shared] : found->second.shared)
        attach_shared(child.key(), method, shared->copy());
    }
    train(other.is_training());
  }

  /// The pieces of these adapters here, bottom first.
  std::vector<PieceImpl*> resolve(const std::vector<std::string>& names) const {
    std::vector<PieceImpl*> found;
    for (const auto& name : names) {
      for (const auto& attached : pieces(name)) found.push_back(attached.piece.get());
    }
    return found;
  }

  /// The snapshot this forward works with, or nullptr where no adapter can matter.
  std::shared_ptr<const ActiveSet> active_set() const {
    if (adapters_.empty() || is_merged()) return nullptr;
    auto set = ForwardScope::active(activation_);
    return set->enabled ? set : nullptr;
  }

  struct Slot {
    std::shared_ptr<Container> container;
    std::vector<Attached> pieces;
    std::map<std::string, std::shared_ptr<SharedImpl>> shared;  ///< by method
  };
  std::map<std::string, Slot> adapters_;
  std::vector<std::string> merged_;

 private:
  std::string path_;
  std::shared_ptr<Activation> activation_ = std::make_shared<Activation>();
};

}  // namespace peft
