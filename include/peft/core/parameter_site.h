// Parameter: a site for a bare tensor of a module, such as the stacked weights of experts.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "peft/core/adapted.h"

namespace peft {

/// What kind of tensor a `Parameter` is.
struct ParameterOptions {
  /// `name`: the tensor's name in its module, the last segment of the site's path.
  explicit ParameterOptions(std::string name) : name_(std::move(name)) {}
  TORCH_ARG(std::string, name);
  /// A 3-d tensor is (experts, in, out), not (experts, out, in): Hugging Face's `is_transposed`.
  TORCH_ARG(bool, is_transposed) = false;
};

/// Tag of `Adapted<Parameter>`.
class Parameter;

namespace internal {

/// A tensor on its own: weights, and no input to run on.
class ParameterView final : public LayerView {
 public:
  ParameterView(std::string path, Weights weights, bool is_transposed)
      : path_(std::move(path)), weights_(std::move(weights)), is_transposed_(is_transposed) {}

  Tensor forward(const Tensor&) const override { return refuse(); }
  Weights weights() const override { return weights_; }
  Tensor apply(const Tensor&, const Weights&) const override { return refuse(); }
  Tensor low_rank(const Tensor&, const Tensor&, const Tensor&) const override { return refuse(); }
  /// (fan_out, in), or (experts, fan_out, in).
  Tensor fold(const Tensor& BA) const override {
    if (weights_.weight.dim() == 2) return BA;
    const auto stack = BA.dim() == 2 ? BA.unsqueeze(0) : BA;
    return is_transposed_ ? stack.transpose(1, 2) : stack;
  }
  const LayerView& base() const override { return *this; }

 private:
  Tensor refuse() const {
    TORCH_CHECK(false, "'", path_, "' is a tensor without a forward: a method can change its weights only");
  }
  std::string path_;
  Weights weights_;
  bool is_transposed_;
};

}  // namespace internal

/// A tensor that another module registers and uses, with a bias that belongs to it or none. It carries
/// adapters; `forward()` is what its module calculates with. The keys of checkpoints stay the module's.
///
/// Of a 2-d tensor (out, in) the low-rank factors are a linear layer's. Of a 3-d one each expert has its own:
/// lora_A (rank · experts, in), the expert its slowest axis; lora_B (out, rank · experts), the expert its
/// fastest. Reference: Hugging Face PEFT's `target_parameters`.
template <>
class AdaptedImpl<Parameter> : public internal::WeightSite {
 public:
  /// `kind`: what else `info()` says of the site; shapes are filled in. What it does not offer is refused.
  AdaptedImpl(ParameterOptions settings, Weights weights, SiteInfo kind)
      : options(std::move(settings)), weights_(std::move(weights)), kind_(std::move(kind)) {}

  SiteInfo base_info() const override {
    auto info = internal::weighted_info(kind_.layer, weights_);
    info.offers = kind_.offers;
    info.weights_only = true;
    info.ignores_dropout = kind_.ignores_dropout;
    info.bare = kind_.bare;
    info.drawn_before = kind_.drawn_before;
    info.files = kind_.files;
    const auto& shape = info.weight_shape;
    if (shape.size() == 2) {
      info.fan_in = {shape[1]};
      info.fan_out = shape[0];
    } else if (shape.size() == 3) {
      info.experts = shape[0];
      info.expert_in = shape[options.is_transposed() ? 1 : 2];
      info.fan_out = shape[options.is_transposed() ? 2 : 1];
      if (info.experts == 1) info.fan_in = {info.expert_in};
    }
    return info;
  }

  /// The effective tensor under the active adapters.
  Tensor forward() { return effective().weight; }

  std::string segment(const std::string&) const override { return options.name(); }
  /// A site without adapters adds nothing to the archives of its module.
  bool is_serializable() const override { return !adapters_.empty(); }

  std::unique_ptr<LayerView> base_view() const override {
    return std::make_unique<internal::ParameterView>(path(), weights_, options.is_transposed());
  }
  Weights base_weights() const override { return weights_; }
  torch::OrderedDict<std::string, Tensor> base_parameters() const override {
    torch::OrderedDict<std::string, Tensor> tensors;
    if (weights_.weight.defined()) tensors.insert("weight", weights_.weight);
    if (weights_.bias.defined()) tensors.insert("bias", weights_.bias);
    return tensors;
  }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    nn::Module::to(device, dtype, non_blocking);
    move_kept(
        [&](Tensor& t) { t = t.to(device, t.is_floating_point() ? dtype : t.scalar_type(), non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    nn::Module::to(dtype, non_blocking);
    move_kept([&](Tensor& t) { t = t.to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override {
    nn::Module::to(device, non_blocking);
    move_kept([&](Tensor& t) { t = t.to(device, non_blocking); });
  }

  /// A copy with tensors of its own.
  std::shared_ptr<nn::Module> clone(const internal::OptionalDevice& device = {}) const override {
    torch::NoGradGuard no_grad;
    const auto own = [](const Tensor& t) {
      return t.defined() ? t.detach().clone().set_requires_grad(t.requires_grad()) : Tensor();
    };
    auto result =
        std::make_shared<AdaptedImpl>(options, Weights{own(weights_.weight), own(weights_.bias)}, kind_);
    result->copy_weight_site(*this);
    if (device) result->to(*device);
    return result;
  }
  /// Takes over the adapters of the same site in another module, which has the same values.
  void copy_from(const AdaptedImpl& other, const internal::OptionalDevice& device = {}) {
    copy_weight_site(other);
    if (device) to(*device);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Adapted<Parameter>(" << options.name() << ", " << weights_.weight.sizes() << ")";
  }

  ParameterOptions options;

 private:
  // The module that holds this site clones the tensors.
  void clone_(nn::Module& other, const internal::OptionalDevice& device) final {
    const auto* same = dynamic_cast<const AdaptedImpl*>(&other);
    TORCH_CHECK(same != nullptr, "clone: '", path(), "' was registered as another kind of site");
    weights_.weight.set_requires_grad(same->weights_.weight.requires_grad());
    if (weights_.bias.defined()) weights_.bias.set_requires_grad(same->weights_.bias.requires_grad());
    copy_from(*same, device);
  }

  Weights weights_;
  SiteInfo kind_;
};

/// `Module::load` of a module that holds sites for its own tensors: reads a checkpoint that may come from the
/// plain module, so lack the adapters.
///
/// Example:
/// ```
/// void load(torch::serialize::InputArchive& archive) override { peft::load_into(*this, archive); }
/// ```
inline void load_into(nn::Module& module, torch::serialize::InputArchive& archive) {
  const auto parameter_site = [](const auto& child) {
    return std::dynamic_pointer_cast<AdaptedImpl<Parameter>>(child.value());
  };
  for (const auto& child : module.named_children()) {
    if (const auto* site = dynamic_cast<const SiteImpl*>(child.value().get())) site->check_not_merged("load");
  }
  for (auto& item : module.named_parameters(/*recurse=*/false)) archive.read(item.key(), item.value());
  for (auto& item : module.named_buffers(/*recurse=*/false)) {
    archive.read(item.key(), item.value(), /*is_buffer=*/true);
  }
  for (const auto& child : module.named_children()) {
    if (!child.value()->is_serializable()) continue;
    torch::serialize::InputArchive inner;
    const bool present = archive.try_read(child.key(), inner);
    if (!present && parameter_site(child)) continue;
    TORCH_CHECK(present, "load: no such submodule '", child.key(), "' in the checkpoint of a ",
                module.name());
    child.value()->load(inner);
  }
}

/// Registers `tensor` as a parameter of `module`, and a site for it as the child `<name>_adapters`; the
/// site's path ends in `name`.
///
/// Example:
/// ```
/// struct ExpertsImpl : nn::Module {
///   peft::Adapted<peft::Parameter> up = peft::register_parameter(*this, "up", torch::randn({8, 32, 16}));
///   // x: (experts, tokens, in)
///   Tensor forward(const Tensor& x) { return torch::bmm(x, up().transpose(1, 2)); }
/// };
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(4), peft::named({"experts.up"}));
/// ```
/// Calculate with `up()`, never with the registered tensor, which no adapter changes. In a module that
/// derives from `nn::Cloneable`, call it in `reset`. Throws: what `Module::register_parameter` throws.
inline Adapted<Parameter> register_parameter(nn::Module& module, const std::string& name, Tensor tensor,
                                             bool is_transposed = false) {
  SiteInfo kind;
  kind.layer = "Parameter";
  kind.offers = {Needs::weights};
  kind.bare = true;
  kind.files = {FileNames::Kind::parameter, "", name, ""};
  const auto& registered = module.register_parameter(name, std::move(tensor));
  return module.register_module(
      name + "_adapters",
      Adapted<Parameter>(std::make_shared<AdaptedImpl<Parameter>>(
          ParameterOptions(name).is_transposed(is_transposed), Weights{registered, {}}, std::move(kind))));
}

}  // namespace peft
