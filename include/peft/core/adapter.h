// Adapter: the user's handle on all pieces of one name across a model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/core/problems.h"
#include "peft/core/site.h"

namespace peft {

/// All pieces of one name across a model. A handle: copies share their state. Made by `add_adapter`,
/// `load_adapter` and `adapter`.
///
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8).alpha(16), peft::named({"query", "value"}));
/// std::cout << adapter.count() << " weights train on " << adapter.sites().size() << " layers\n";
/// ```
class Adapter {
 public:
  /// One piece, where it sits and why.
  struct Entry {
    std::shared_ptr<SiteImpl> site;
    std::shared_ptr<PieceImpl> piece;
    std::shared_ptr<const Origin> origin;
  };

  explicit Adapter(std::shared_ptr<AdapterRecord> record) : state_(std::make_shared<State>()) {
    state_->record = std::move(record);
  }

  const std::string& name() const { return state_->record->name; }
  AdapterRecord& record() const { return *state_->record; }
  const std::shared_ptr<AdapterRecord>& shared_record() const { return state_->record; }
  const std::vector<Entry>& entries() const { return state_->entries; }
  void add(Entry entry) const { state_->entries.push_back(std::move(entry)); }
  void set_entries(std::vector<Entry> entries) const { state_->entries = std::move(entries); }

  /// Throws c10::Error where the layers are not named as in the model that the adapter was added to: a verb
  /// on a part of that names them as in the part.
  void check_names(const char* verb) const {
    const auto& known = record().paths;
    for (const auto& entry : entries()) {
      const auto& path = entry.site->path();
      TORCH_CHECK(
          known.empty() || std::find(known.begin(), known.end(), path) != known.end(), verb, ": '", name(),
          "' has a layer '", path,
          "', which is its path in another model, a part or a whole that a verb was called on since (hint: "
          "peft::adapter(model, name) gives a handle with the paths of that model)");
    }
  }

  /// Paths of the adapted layers, in the model's order, each once.
  std::vector<std::string> sites() const {
    std::vector<std::string> paths;
    for (const auto& entry : entries()) {
      if (paths.empty() || paths.back() != entry.site->path()) paths.push_back(entry.site->path());
    }
    return paths;
  }

  /// The tensors that train, as `<site>.<method>.<tensor>`, in the model's order.
  std::vector<std::pair<std::string, Tensor>> named_parameters() const {
    std::vector<std::pair<std::string, Tensor>> named;
    for (const auto& [key, tensor] : named_tensors()) {
      if (tensor.requires_grad()) named.emplace_back(key, tensor);
    }
    return named;
  }
  /// The tensors that train.
  std::vector<Tensor> parameters() const {
    std::vector<Tensor> tensors;
    for (const auto& [key, tensor] : named_parameters()) tensors.push_back(tensor);
    return tensors;
  }
  /// Every tensor of the adapter, frozen ones and buffers too.
  std::vector<std::pair<std::string, Tensor>> named_tensors() const {
    std::vector<std::pair<std::string, Tensor>> named;
    const auto add = [&named](const Entry& entry, const std::string& method, const nn::Module& module) {
      const auto& path = entry.site->path();
      const auto prefix = (path.empty() ? "" : path + ".") + method + ".";
      for (const auto& item : module.named_parameters())
        named.emplace_back(prefix + item.key(), item.value());
      for (const auto& item : module.named_buffers()) named.emplace_back(prefix + item.key(), item.value());
    };
    each_part([&](const Entry& entry, const std::string& method,
                  const SharedImpl& shared) { add(entry, "shared." + method, shared); },
              [&](const Entry& entry) { add(entry, entry.piece->method(), *entry.piece); });
    return named;
  }

  /// Number of weights that train and are in use: of a method that grows, without its reserves, which are
  /// among the `parameters()` (`PieceImpl::trainable`).
  int64_t count() const {
    int64_t total = 0;
    each_part([&](const Entry&, const std::string&,
                  const SharedImpl& shared) { total += internal::trainable(shared); },
              [&](const Entry& entry) { total += entry.piece->trainable(); });
    return total;
  }

  /// The penalty that training adds to the loss (AdaLoRA's orthogonality, say), of the tensors as they are: 0
  /// where no method has one. `peft::AdamW` adds its gradient; do not add it to the loss as well.
  Tensor penalty() const {
    Tensor total = torch::zeros({});
    for (const auto& controller : record().controllers) {
      const auto term = controller->penalty();
      if (term.defined()) total = total.to(term.device()) + term;
    }
    return total;
  }

  /// Around the step of an optimizer other than `peft::AdamW`, for methods with a controller: after backward,
  /// before clipping. Returns the parameters that have just joined the adapter, for a new group of the
  /// optimizer.
  ///
  /// Example:
  /// ```
  /// loss.backward();
  /// for (auto& tensor : adapter.before_step()) optimizer.add_param_group({{tensor}});
  /// optimizer.step();
  /// adapter.after_step();
  /// ```
  std::vector<Tensor> before_step() const {
    torch::NoGradGuard no_grad;
    std::vector<Tensor> joined;
    for (const auto& controller : record().controllers) {
      controller->add_penalty_gradients();
      for (const auto& [name, tensor] : controller->grow(foreign_step())) joined.push_back(tensor);
    }
    return joined;
  }
  /// After the step of such an optimizer, before its `zero_grad`.
  void after_step() const {
    torch::NoGradGuard no_grad;
    for (const auto& controller : record().controllers) {
      controller->after_update(foreign_step());
    }
    accept_changes();
  }
  /// Tells methods with a controller that the tensors were changed on purpose, outside a training step.
  void accept_changes() const {
    for (const auto& entry : entries()) entry.piece->mark();
  }

  /// Multiplies the adapter's contribution by `factor`; 1 is as trained. Throws, before anything is changed,
  /// where a method has no strength to scale.
  void scale(double factor) const {
    internal::Problems problems;
    for (const auto& entry : entries()) {
      if (!entry.piece->scalable() && factor != 1.0) {
        problems.add("'" + entry.site->path() + "': " + entry.piece->method() + " has no strength to scale");
      }
    }
    problems.raise("Adapter::scale of '" + name() + "'");
    for (const auto& entry : entries()) entry.piece->set_scale(factor);
  }

  /// W′ − W of this adapter alone at one site, in the layout the layer stores its weight.
  Tensor effective_delta(const std::string& site) const {
    std::vector<std::string> paths;
    const Entry* found = nullptr;
    for (const auto& entry : entries()) {
      if (entry.site->path() == site) found = &entry;
      paths.push_back(entry.site->path());
    }
    TORCH_CHECK_VALUE(found, "effective_delta: adapter '", name(), "' has no site '", site,
                      "'; closest: ", internal::closest(site, paths));
    return found->site->delta(name()).weight;
  }

  /// The pieces of one method: `adapter.layers<peft::LoraImpl>()`.
  template <class PieceType>
  std::vector<std::shared_ptr<PieceType>> layers() const {
    std::vector<std::shared_ptr<PieceType>> pieces;
    for (const auto& entry : entries()) {
      if (auto piece = std::dynamic_pointer_cast<PieceType>(entry.piece)) pieces.push_back(std::move(piece));
    }
    return pieces;
  }

 private:
  /// Visits what the adapter has at its sites, in the model's order: of each the shared parts, then the
  /// pieces.
  template <class OfShared, class OfPiece>
  void each_part(const OfShared& of_shared, const OfPiece& of_piece) const {
    const SiteImpl* last = nullptr;
    for (const auto& entry : entries()) {
      if (entry.site.get() != last) {
        for (const auto& [method, shared] : entry.site->shared(name())) of_shared(entry, method, *shared);
      }
      last = entry.site.get();
      of_piece(entry);
    }
  }

  struct State {
    std::shared_ptr<AdapterRecord> record;
    std::vector<Entry> entries;
  };
  static StepContext foreign_step() {
    return {{}, [](const Tensor& parameter) { return parameter.grad().defined(); }};
  }

  std::shared_ptr<State> state_;
};

}  // namespace peft
