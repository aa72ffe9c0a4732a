// Site: a place in a frozen model where adapters attach; knows how to carry them, and no method.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/attached.h"
#include "peft/core/compat.h"
#include "peft/core/piece.h"
#include "peft/core/piece_tree.h"
#include "peft/core/problems.h"
#include "peft/core/row_groups.h"
#include "peft/core/site_traits.h"

namespace peft {

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

  using Flow = internal::Flow;
  using Missing = internal::Missing;

  /// What the site is, without its path.
  virtual SiteInfo base_info() const = 0;
  /// What a method sees, with the path the site was last found under.
  SiteInfo info() const {
    auto info = base_info();
    info.path = path_;
    info.beside_blocks = beside_blocks_;
    for (const auto& head : heads_) {
      const auto site = head.lock();
      if (site && site->tied_words().get() == this) info.tied.push_back(site->path());
    }
    return info;
  }
  void set_path(std::string path) {
    path_ = std::move(path);
    for (auto& [name, slot] : adapters_) {
      for (auto& attached : slot.pieces) attached.piece->set_site(info());
    }
  }
  const std::string& path() const { return path_; }
  /// Tells a site without tensors of its own the type and the device of those around it.
  virtual void set_surroundings(torch::ScalarType, torch::Device) {}
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
    change();
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
    std::erase(merged_, adapter);
    if (!adapters_.erase(adapter)) return;
    unregister_module(adapter);
    change();
  }
  /// `from` becomes `to`; the record is renamed by the caller.
  void rename(const std::string& from, const std::string& to) {
    auto node = adapters_.extract(from);
    if (node.empty()) return;
    unregister_module(from);
    register_module(to, node.mapped().container);
    node.key() = to;
    adapters_.insert(std::move(node));
    change();
  }
  /// True if a child, parameter or buffer of the base has this name already.
  bool owns_name(const std::string& name) const {
    if (adapters_.count(name)) return false;
    const auto children = base_children();
    return std::any_of(children.begin(), children.end(),
                       [&](const auto& child) { return child.first == name; }) ||
           named_parameters(false).contains(name) || named_buffers(false).contains(name);
  }
  /// The children that are no adapters.
  virtual std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>> base_children() const {
    std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>> children;
    for (const auto& child : named_children()) {
      if (!adapters_.count(child.key())) children.emplace_back(child.key(), child.value());
    }
    return children;
  }

  /// Says that this site's weight is the matrix of `words`: what acts on it in all its uses
  /// (`PieceImpl::follows_ties`) acts here too, while both are one. A model says it again of its clones.
  void tie_to(const std::shared_ptr<SiteImpl>& words) {
    words_ = words;
    change();
    std::erase_if(words->heads_,
                  [this](const auto& head) { return head.expired() || head.lock().get() == this; });
    words->heads_.push_back(std::dynamic_pointer_cast<SiteImpl>(shared_from_this()));
  }
  /// Says that what this layer gives is read by every block of the model, beside the text: DeBERTa's vectors
  /// of distances and their norm. It is then no part of what follows the blocks, wherever it is registered.
  void stand_beside_blocks() { beside_blocks_ = true; }

  /// True if the adapter has pieces here, or such that act here.
  bool acts(const std::string& adapter) const { return !resolve({adapter}).empty(); }

  const std::shared_ptr<Activation>& activation() const { return activation_; }
  void share(std::shared_ptr<Activation> activation) {
    if (activation == activation_) return;
    activation_ = std::move(activation);
    number_ = activation_->join();
    change();
  }
  void set_record(const std::string& adapter, const std::shared_ptr<AdapterRecord>& record) {
    for (auto& attached : adapters_.at(adapter).pieces) attached.record = record;
  }

  /// The untouched layer, valid while the site lives.
  virtual std::unique_ptr<LayerView> base_view() const = 0;
  /// The untouched layer's weights; the merged ones while merged.
  virtual Weights base_weights() const = 0;
  /// W′ − W of one adapter alone, in the weight's layout.
  virtual Weights delta(const std::string& adapter) const = 0;
  /// Effective weights of these adapters, computed out of place.
  virtual Weights merged_weights(const Composition& adapters) const = 0;
  /// Puts other values behind the base's parameters, keeping the old ones for `unmerge` if `keep`.
  virtual void swap_in(const Weights& weights, std::vector<std::string> adapters, bool keep) = 0;
  /// Puts the kept values back, bit for bit.
  virtual void swap_out() = 0;
  virtual bool keeps_original() const = 0;
  bool is_merged() const { return !merged_.empty(); }
  /// What a message says of a merged site.
  std::string merged_text() const {
    return keeps_original() ? "is merged (hint: unmerge first)"
                            : "is merged, and its original was not kept (hint: remove_adapter makes the "
                              "merged model a plain one)";
  }
  /// Throws c10::Error where the site is merged.
  void check_not_merged(const std::string& verb) const {
    TORCH_CHECK(!is_merged(), verb, ": '", path_, "' ", merged_text());
  }
  const std::vector<std::string>& merged() const { return merged_; }

  /// Base parameters under their keys, adapters left out.
  virtual torch::OrderedDict<std::string, Tensor> base_parameters() const = 0;

  /// The pieces of these adapters here.
  PieceTree resolve(const Composition& composition) const {
    PieceTree tree;
    tree.block = composition.block;
    if (composition.is_adapter()) {
      if (const auto words = tied_words()) {
        for (const auto& attached : words->pieces(composition.name)) {
          if (attached.piece->follows_ties()) tree.pieces.push_back(attached.piece.get());
        }
      }
      for (const auto& attached : pieces(composition.name)) tree.pieces.push_back(attached.piece.get());
      return tree;
    }
    tree.lengths = composition.lengths;
    tree.weights = composition.weights;
    if (!composition.name.empty() && !pieces(composition.name).empty()) {
      tree.fusion = pieces(composition.name).front().piece.get();
    }
    for (const auto& child : composition.children) tree.children.push_back(resolve(child));
    if (tree.block != Composition::Block::stack) return tree;
    std::erase_if(tree.children, [](const PieceTree& child) { return child.empty(); });
    const bool flat = std::all_of(tree.children.begin(), tree.children.end(), [](const PieceTree& child) {
      return child.block == Composition::Block::adapter;
    });
    if (!flat) return tree;
    for (const auto& child : tree.children) {
      tree.pieces.insert(tree.pieces.end(), child.pieces.begin(), child.pieces.end());
    }
    tree.children.clear();
    return tree;
  }
  /// Why the site cannot run a tree, or an empty string.
  virtual std::string refusal(const PieceTree& tree) const = 0;

  /// How often a model repeats its inputs: N under an active `Parallel` of N adapters, else 1. For a model's
  /// forward, inside its `ForwardScope`, before its other sites; outputs then have N · batch rows.
  /// Throws: c10::Error for a Parallel outside any scope.
  ///
  /// Example:
  /// ```
  /// const auto branches = words->branches();
  /// auto x = words->forward(branches > 1 ? ids.repeat({branches, 1}) : ids);
  /// ```
  int64_t branches() const { return RowAdapters::current() ? 1 : ForwardScope::branches(activation_); }
  /// True if rows of one batch use different adapters: a model must then not let one row serve others.
  bool by_rows() const {
    if (RowAdapters::current()) return true;
    const auto set = ForwardScope::active(activation_);
    return set->enabled && set->composition.by_rows();
  }

  /// Reads a checkpoint that may come from the plain layer, so lack the adapters.
  void load(torch::serialize::InputArchive& archive) override {
    check_not_merged("load");
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
    beside_blocks_ = other.beside_blocks_;
    merged_ = other.merged_;
    share(std::make_shared<Activation>());
    activation_->set(*other.activation_->get());
    for (const auto& child : other.named_children()) {  // the order of registration
      const auto found = other.adapters_.find(child.key());
      if (found == other.adapters_.end()) continue;
      auto record = std::make_shared<AdapterRecord>(*found->second.pieces.front().record);
      record->has_optimizer = false;
      record->controllers.clear();  // peft::clone copies them
      const auto& pieces = found->second.pieces;
      for (const auto& item : found->second.container->named_children()) {  // so too
        const auto attached = std::find_if(pieces.begin(), pieces.end(), [&item](const Attached& each) {
          return each.piece == item.value();
        });
        if (attached != pieces.end()) attach({attached->piece->copy(), attached->origin, record});
      }
      // The pieces of other sites are tied by peft::clone and peft::adapter.
      for (const auto& [method, shared] : found->second.shared)
        attach_shared(child.key(), method, shared->copy());
    }
    train(other.is_training());
  }

  /// The snapshot this forward works with, or nullptr where no adapter can matter.
  std::shared_ptr<const ActiveSet> active_set() const {
    if ((adapters_.empty() && words_.expired()) || is_merged()) return nullptr;
    auto set = ForwardScope::active(activation_);
    return set->enabled ? set : nullptr;
  }
  /// The pieces this forward runs over, or nullptr where no adapter can matter.
  std::shared_ptr<const PieceTree> active_tree() const {
    auto set = active_set();
    if (!set) return nullptr;
    const auto build = [&] { return resolve(set->composition); };
    if (const auto* kept = set->trees->of(number_, state(), build)) return {std::move(set), kept};
    return std::make_shared<const PieceTree>(build());
  }
  /// True if a piece that this forward runs over, in any row, is one that `is` picks.
  template <class Is>
  bool uses(const Is& is) const {
    bool found = false;
    const auto look = [&](const PieceImpl& piece) { found = found || is(piece); };
    if (const auto* names = RowAdapters::current()) {
      for (const auto& name : *names) resolve({name}).each(look);
    } else if (const auto tree = active_tree()) {
      tree->each(look);
    }
    return found;
  }
  /// To be called when the site's pieces or weights are no longer those that `set_active` checked.
  void change() {
    ++changes_;
    activation_->forget();
  }

  /// Runs a site's forward over its active pieces: `run(flow, tree)` for the flow's rows that use them, where
  /// blocks that divide the batch hold one child. Rows are put back in their places; a tensor that only some
  /// of them have is `missing(i, flow)` of the others, or 0.
  template <class Run>
  Flow route(const Flow& in, const Run& run, const Missing& missing = {}) const {
    const auto* names = RowAdapters::current();
    if (names) {
      check_not_merged("RowAdapters");
      return run_groups(in, named_groups(*names, in), run, missing);
    }
    const auto active = active_tree();
    const auto& tree = active ? *active : no_pieces();
    if (tree.empty()) return run(in, no_pieces());
    if (!tree.by_rows()) return run(in, tree);
    TORCH_CHECK(!tree.holds(Composition::Block::parallel) || ForwardScope::repeats(activation_),
                "Parallel: '", path_, "' got a batch that its model has not repeated for ",
                ForwardScope::active(activation_)->composition.branches(),
                " adapters (hint: a model asks a site for branches() in its forward)");
    return run_groups(in, internal::RowDivision(tree, internal::batch_size(in), path_).groups(), run,
                      missing);
  }

  struct Slot {
    std::shared_ptr<Container> container;
    std::vector<Attached> pieces;
    std::map<std::string, std::shared_ptr<SharedImpl>> shared;  ///< by method
  };
  std::map<std::string, Slot> adapters_;
  std::vector<std::string> merged_;

 private:
  static const PieceTree& no_pieces() {
    static const PieceTree none;
    return none;
  }
  /// Differs whenever `resolve` may.
  uint64_t state() const {
    const auto words = tied_words();
    return words ? 2 * (changes_ + words->changes_) + 1 : 2 * changes_;
  }
  /// The site whose matrix is this one's, while both are one.
  std::shared_ptr<SiteImpl> tied_words() const {
    auto words = words_.lock();
    const bool one = words && words->base_weights().weight.data_ptr() == base_weights().weight.data_ptr();
    return one ? words : nullptr;
  }

  /// Of `RowAdapters`.
  std::vector<internal::RowGroup> named_groups(const std::vector<std::string>& names, const Flow& in) const {
    TORCH_CHECK(!is_training(), "RowAdapters: mixed batches are for inference, but '", path_,
                "' is in training mode");
    const auto set = ForwardScope::active(activation_);
    std::map<std::string, std::vector<int64_t>> members;
    bool touched = false;
    for (size_t i = 0; i < names.size(); ++i) {
      TORCH_CHECK_VALUE(names[i] == RowAdapters::base || set->knows(names[i]),
                        "RowAdapters: ", internal::no_adapter_text(names[i], set->known));
      members[names[i]].push_back(static_cast<int64_t>(i));
      touched = touched || acts(names[i]);
    }
    if (!touched || !set->enabled) return {};
    const auto batch = internal::batch_size(in);
    TORCH_CHECK_VALUE(batch == static_cast<int64_t>(names.size()), "RowAdapters: '", path_, "' expected ",
                      names.size(), " rows, one a name, but got ", batch);
    std::vector<internal::RowGroup> groups;
    for (auto& [name, own] : members) groups.push_back({std::move(own), resolve(name)});
    return groups;
  }

  /// Runs each group on its rows; without groups, all rows without pieces.
  template <class Run>
  Flow run_groups(const Flow& in, const std::vector<internal::RowGroup>& groups, const Run& run,
                  const Missing& missing) const {
    if (groups.empty()) return run(in, no_pieces());
    std::vector<Flow> parts;
    for (const auto& group : groups) parts.push_back(run(internal::only_rows(in, group.rows), group.tree));
    return internal::rejoined(parts, groups, missing, path_);
  }

  std::string path_;
  bool beside_blocks_ = false;
  std::weak_ptr<SiteImpl> words_;               ///< whose matrix is this site's too
  std::vector<std::weak_ptr<SiteImpl>> heads_;  ///< whose matrix this site's is
  std::shared_ptr<Activation> activation_ = std::make_shared<Activation>();
  size_t number_ = activation_->join();  ///< among the sites that share it
  uint64_t changes_ = 0;                 ///< of its pieces
};

}  // namespace peft
