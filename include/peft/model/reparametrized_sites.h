// ReparametrizedSites: a frozen module whose code nobody may change, with a site for each weight it reads.
#pragma once

#include <torch/nn/modules/activation.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/core/parameter_site.h"
#include "peft/model/reparametrized_members.h"

namespace peft {
namespace internal {

/// Reaches what copies a site's adapters.
struct OpenSite : WeightSite {
  static void copy(const WeightSite& from, WeightSite& to) { (to.*&OpenSite::copy_weight_site)(from); }
};

/// A site, and the tensors of a module in whose place its effective weights are put for a forward.
struct Slot {
  std::shared_ptr<WeightSite> site;
  std::shared_ptr<nn::Module> module;
  Member::Find weight, bias;  ///< empty where there is none
};

/// What the parts of a model have in common while sites are made for them.
struct Survey {
  std::vector<Member> members;  ///< of the model's own classes
  std::vector<Slot> slots = {};
  std::map<const nn::Module*, std::shared_ptr<nn::Module>> made = {};

  /// Where the module reads the tensor it registered as `name`. `own`: only if the user named it.
  Member::Find find(nn::Module& module, const std::string& name, bool own = false) const {
    for (const auto* list : {&members, &layer_members()}) {
      for (const auto& known : *list) {
        if (known.name == name && known.find(module)) return known.find;
      }
      if (own) return {};
    }
    return recurrent_member<nn::RNNImpl, nn::LSTMImpl, nn::GRUImpl>(module, name);
  }
};

/// Why a module would not run on another tensor in place of the parameter `name`, for a message that calls
/// its site so; empty if it would. A name it has not registered is fine where the member is undefined too.
inline std::string unreachable(nn::Module& module, const std::string& name, const Member::Find& find) {
  const auto text = "tensor of a " + module.name() + " in a member ";
  if (!find) {
    return text + "that only its class knows (hint: Reparametrized(model, {member(\"" + name +
           "\", &Class::" + name + ")}))";
  }
  const auto tensors = module.named_parameters(/*recurse=*/false);
  const auto* registered = tensors.find(name);
  const bool same = registered ? find(module)->is_same(*registered) : !find(module)->defined();
  return same ? "" : text + "'" + name + "' that holds another than it registers";
}

/// A layer that its model runs, as a site that changes the weights it runs on.
template <class Layer>
class ReadLayer : public LayerSite<Layer, ReadLayer<Layer>> {
  using Base = LayerSite<Layer, ReadLayer<Layer>>;

 public:
  /// `layer`: a copy that shares the tensors, since the model's own holds others while the model runs.
  explicit ReadLayer(Layer layer) : Base(std::move(layer)) {}

  SiteInfo base_info() const override {
    auto info = Base::base_info();
    info.offers = {Needs::weights};
    info.weights_only = info.ignores_dropout = true;
    info.files = files;
    if (!refusal_.empty()) {
      info.layer = refusal_;
      info.offers.clear();
    }
    return info;
  }
  /// Makes it a site that no method can take.
  void refuse(std::string why) { refusal_ = std::move(why); }

  FileNames files;

 private:
  std::string refusal_;
};

/// A module of a frozen model as its adapters see it: it registers the module's tensors and children under
/// the module's names, and sites for those that the module's forward reads from its members.
///
/// What a module registers is a second handle on the tensor that a member holds. Its forward reads the
/// member: with effective weights there, for one forward, the module runs on them, while all that is
/// registered, and every site, keeps to the base.
class Mirror : public nn::Module {
 public:
  Mirror(std::shared_ptr<nn::Module> module, Survey& survey)
      : nn::Module(module->name()), mirrored_(std::move(module)) {
    train(mirrored_->is_training());
    for (const auto& item : mirrored_->named_parameters(/*recurse=*/false)) {
      register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    for (const auto& item : mirrored_->named_buffers(/*recurse=*/false)) {
      register_buffer(item.key(), item.value());
    }
    const auto attention = std::dynamic_pointer_cast<nn::MultiheadAttentionImpl>(mirrored_);
    attention ? add_attention(*attention, survey) : add_tensors(survey);
    for (const auto& child : mirrored_->named_children()) {
      const bool projects = attention && child.value() == attention->out_proj.ptr();
      register_module(child.key(), site_or_mirror(child.value(), projects, survey));
    }
  }

  bool is_serializable() const override { return mirrored_->is_serializable(); }
  /// Reads a checkpoint that may come from the plain module, so lack the adapters.
  void load(torch::serialize::InputArchive& archive) override { load_into(*this, archive); }
  void pretty_print(std::ostream& stream) const override { mirrored_->pretty_print(stream); }

 private:
  /// A site at `name` for the tensors that `kind.files` names.
  void add_site(const std::string& key, const std::string& name, SiteInfo kind, Survey& survey) {
    const auto tensors = named_parameters(/*recurse=*/false);
    const auto& files = kind.files;
    Slot slot{nullptr, mirrored_, survey.find(*mirrored_, files.weight), {}};
    Weights weights{tensors[files.weight], {}};
    auto why = unreachable(*mirrored_, files.weight, slot.weight);
    if (const auto* bias = files.bias.empty() ? nullptr : tensors.find(files.bias)) {
      weights.bias = *bias;
      slot.bias = survey.find(*mirrored_, files.bias);
      if (why.empty()) why = unreachable(*mirrored_, files.bias, slot.bias);
    }
    if (why.empty()) {
      kind.offers = {Needs::weights};
    } else {
      kind.layer = why;
      weights = {};
    }
    const auto site = register_module(
        key, std::make_shared<AdaptedImpl<Parameter>>(ParameterOptions(name), weights, std::move(kind)));
    site->train(is_training());
    if (!why.empty()) return;
    slot.site = site;
    survey.slots.push_back(std::move(slot));
  }

  void add_attention(const nn::MultiheadAttentionImpl& attention, Survey& survey) {
    SiteInfo kind;
    if (attention._qkv_same_embed_dim) {
      kind.layer = "Linear";
      kind.ignores_dropout = true;
      kind.files = {FileNames::Kind::part, "", "in_proj_weight", "in_proj_bias"};
      kind.drawn_before = attention.out_proj->weight.sizes().vec();
      add_site("in_proj", "in_proj", std::move(kind), survey);
      return;
    }
    for (const char* name : {"q_proj_weight", "k_proj_weight", "v_proj_weight"}) add_tensor(name, survey);
  }
  void add_tensor(const std::string& name, Survey& survey) {
    SiteInfo kind;
    kind.layer = "Parameter";
    kind.bare = true;
    kind.files = {FileNames::Kind::parameter, "", name, ""};
    add_site(name + "_adapters", name, std::move(kind), survey);
  }

  /// Sites for the module's own tensors: of LibTorch's layers for each `weight…` with the bias of the same
  /// name, of others for each tensor.
  void add_tensors(Survey& survey) {
    const auto tensors = named_parameters(/*recurse=*/false);
    const auto is_layers = [&](const std::string& name) {
      return tensors.contains(name) && survey.find(*mirrored_, name) &&
             !survey.find(*mirrored_, name, /*own=*/true);
    };
    for (const auto& name : tensors.keys()) {
      const std::string_view weight = "weight", bias = "bias";
      if (name.starts_with(weight) && is_layers(name)) {
        SiteInfo kind;
        kind.layer = tensors[name].dim() == 2 ? "Linear" : mirrored_->name();
        kind.files = {FileNames::Kind::parameter, "", name, "bias" + name.substr(weight.size())};
        add_site(name + "_adapters", name, std::move(kind), survey);
      } else if (!name.starts_with(bias) || !is_layers("weight" + name.substr(bias.size()))) {
        add_tensor(name, survey);
      }
    }
  }

  static std::shared_ptr<nn::Module> site_or_mirror(const std::shared_ptr<nn::Module>& module, bool projects,
                                                    Survey& survey) {
    if (const auto found = survey.made.find(module.get()); found != survey.made.end()) return found->second;
    std::shared_ptr<nn::Module> made;
    if (dynamic_cast<SiteImpl*>(module.get()) || dynamic_cast<Mirror*>(module.get())) {
      made = module;
    } else {
      made = layer_site<nn::Linear, nn::Conv1d, nn::Conv2d, nn::Conv3d, nn::Embedding, nn::LayerNorm>(
          module, projects, survey);
    }
    if (!made) made = std::make_shared<Mirror>(module, survey);
    return survey.made[module.get()] = made;
  }

  /// A site for a layer that has `SiteTraits`, or nullptr.
  template <class... Layers>
  static std::shared_ptr<nn::Module> layer_site(const std::shared_ptr<nn::Module>& module, bool projects,
                                                Survey& survey) {
    std::shared_ptr<nn::Module> made;
    const auto attempt = [&]<class Layer>(Layer*) {
      using Impl = typename Layer::ContainedType;
      const auto layer = std::dynamic_pointer_cast<Impl>(module);
      if (made || !layer) return;
      const auto site = std::make_shared<ReadLayer<Layer>>(Layer(std::make_shared<Impl>(*layer)));
      if (projects) site->files = {FileNames::Kind::part, "base_layer.out_proj."};
      site->train(layer->is_training());
      made = site;
      Slot slot{site, module, survey.find(*module, "weight"), survey.find(*module, "bias")};
      auto why = unreachable(*module, "weight", slot.weight);
      if (why.empty() && slot.bias) why = unreachable(*module, "bias", slot.bias);
      why.empty() ? survey.slots.push_back(std::move(slot)) : site->refuse(std::move(why));
    };
    (attempt(static_cast<Layers*>(nullptr)), ...);
    return made;
  }

  std::shared_ptr<nn::Module> mirrored_;
};

/// The root of a mirror: what replaces the module for its users.
template <class Wrapped, class Derived>
class MirrorRoot : public Mirror {
 public:
  void train(bool on = true) override {
    Mirror::train(on);
    base->train(on);
  }
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    base->to(device, dtype, non_blocking);
    Mirror::to(device, dtype, non_blocking);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    base->to(dtype, non_blocking);
    Mirror::to(dtype, non_blocking);
  }
  void to(torch::Device device, bool non_blocking = false) override {
    base->to(device, non_blocking);
    Mirror::to(device, non_blocking);
  }

  /// A copy with tensors of its own. Throws: what the module's own `clone` throws, which asks it to derive
  /// from nn::Cloneable.
  std::shared_ptr<nn::Module> clone(const OptionalDevice& device = {}) const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<Derived>(cloned_base(), members_);
    TORCH_CHECK(result->slots_.size() == slots_.size(), "clone: the clone of this ", name(), " has ",
                result->slots_.size(), " weights that take adapters, expected ", slots_.size());
    for (size_t i = 0; i < slots_.size(); ++i) OpenSite::copy(*slots_[i].site, *result->slots_[i].site);
    result->copy_settings(static_cast<const Derived&>(*this));
    set_modes(*this, *result);
    set_modes(*base, *result->base);
    if (device) result->to(*device);
    return result;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::";
    base->pretty_print(stream);
  }

  std::shared_ptr<Wrapped> base;  ///< the module itself

 protected:
  MirrorRoot(std::shared_ptr<Wrapped> module, std::vector<Member> members)
      : MirrorRoot(std::move(module), Survey{std::move(members)}) {}

  /// Copies what else a derived class holds.
  void copy_settings(const Derived&) {}

  std::vector<Slot> slots_;
  std::vector<Member> members_;

 private:
  MirrorRoot(std::shared_ptr<Wrapped> module, Survey survey)
      : Mirror(module, survey),
        base(std::move(module)),
        slots_(std::move(survey.slots)),
        members_(std::move(survey.members)) {}

  std::shared_ptr<Wrapped> cloned_base() const {
    // A clone draws its weights before it copies them; the generator must not notice.
    const RandomStateGuard kept;
    auto copy = std::dynamic_pointer_cast<Wrapped>(base->clone());
    TORCH_CHECK(copy != nullptr, "clone: the clone() of this ", name(), " does not return its own type");
    const auto keys = [](const nn::Module& module) { return module.named_parameters().keys(); };
    TORCH_CHECK(keys(*copy) == keys(*base), "clone: the clone() of this ", name(),
                " has other parameters than the module itself");
    copy_tensors(*base, *copy);  // of a child that is not nn::Cloneable, clone() has drawn new ones
    return copy;
  }
  /// The modules of one train and evaluate as those of the other.
  static void set_modes(const nn::Module& from, nn::Module& to) {
    const auto given = from.modules(/*include_self=*/false), taken = to.modules(/*include_self=*/false);
    to.train(from.is_training());
    TORCH_INTERNAL_ASSERT(given.size() == taken.size());
    for (size_t i = 0; i < given.size(); ++i) taken[i]->train(given[i]->is_training());
  }
  void clone_(nn::Module& other, const OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: a ", name(), " was registered as another kind of layer");
    static_cast<Derived&>(*this) = *copy;
  }
};

}  // namespace internal
}  // namespace peft
