// Plain: what a user of LibTorch would write without this library. Layers as the papers' formulas, autograd
// for the rest, a loop over tensors after the step.
#pragma once

#include <peft/peft.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace bench {

using peft::Tensor;

/// A frozen linear layer and an adapter's tensors under their last names (`lora_A`, …).
struct PlainLayer {
  Tensor weight, bias;
  std::map<std::string, Tensor> tensors;
  double scaling = 1, dropout = 0;

  const Tensor& at(const std::string& name) const { return tensors.at(name); }
  Tensor base(const Tensor& x) const { return torch::linear(x, weight, bias); }
  /// x in the adapter's type, after dropout.
  Tensor entry(const Tensor& x) const {
    const auto input = x.to(tensors.begin()->second.scalar_type());
    return dropout > 0 ? torch::dropout(input, dropout, /*train=*/true) : input;
  }
  Tensor lora(const Tensor& x, const Tensor& A) const {
    return torch::linear(torch::linear(entry(x), A), at("lora_B")) * scaling;
  }

  Tensor lora(const Tensor& x) const { return base(x) + lora(x, at("lora_A")).to(x.scalar_type()); }
  Tensor adalora(const Tensor& x) const {
    return base(x) + lora(x, at("lora_A") * at("lora_E")).to(x.scalar_type());
  }
  /// The norm of W + s BA over all columns, once a forward.
  Tensor dora(const Tensor& x) const {
    const auto y = torch::linear(x, weight);
    const auto norm = (weight + scaling * torch::mm(at("lora_B"), at("lora_A"))).detach().norm(2, 1);
    const auto factor = at("lora_magnitude_vector").flatten() / norm;
    return (y + bias + (factor - 1) * y + factor * lora(x, at("lora_A"))).to(x.scalar_type());
  }
  /// As the author's code: the dense update, whose gradient gives the score.
  Tensor increlora(const Tensor& x, Tensor& update) const {
    const auto chunks = [this](const std::string& prefix, int64_t along) {
      std::vector<Tensor> found;
      for (const auto& [name, tensor] : tensors) {
        if (name.starts_with(prefix)) found.push_back(tensor);
      }
      return torch::cat(found, along);
    };
    update = scaling * torch::mm(chunks("lora_B", 1), chunks("lora_A", 0) * chunks("lora_E", 0));
    update.retain_grad();
    return base(x) + torch::linear(entry(x), update);
  }
  Tensor ia3(const Tensor& x) const { return (base(x) * at("ia3_l").flatten()).to(x.scalar_type()); }
  Tensor bottleneck(const Tensor& x) const {
    const auto h = base(x);
    const auto inner = torch::relu(torch::linear(h, at("adapter_down.weight"), at("adapter_down.bias")));
    return h + torch::linear(inner, at("adapter_up.weight"), at("adapter_up.bias"));
  }
};

/// LoRA, or with `diagonal` AdaLoRA's B diag(E) A, as a method of one's own on the library's sites.
struct PlainOptions {
  static constexpr peft::Needs needs = peft::Needs::weights;
  static constexpr const char* method = "plain";

  TORCH_ARG(int64_t, rank) = 8;
  TORCH_ARG(double, scaling) = 1;
  TORCH_ARG(double, dropout) = 0;
  TORCH_ARG(bool, diagonal) = false;
};

class PlainImpl : public peft::Piece<PlainImpl, PlainOptions> {
 public:
  PlainImpl(const PlainOptions& settings, const peft::SiteInfo& site)
      : Piece(PlainOptions::method, settings, site) {
    lora_A = register_parameter("lora_A", torch::empty({settings.rank(), site.fan_in.front()}));
    if (settings.diagonal()) lora_E = register_parameter("lora_E", torch::empty({settings.rank(), 1}));
    lora_B = register_parameter("lora_B", torch::empty({site.fan_out, settings.rank()}));
  }
  Tensor forward(const Tensor& x, const peft::LayerView& layer) override {
    auto input = x.to(lora_A.scalar_type());
    if (is_training() && options.dropout() > 0) input = torch::dropout(input, options.dropout(), true);
    const auto A = options.diagonal() ? lora_A * lora_E : lora_A;
    const auto update = torch::linear(torch::linear(input, A), lora_B) * options.scaling();
    return layer.forward(x) + update.to(x.scalar_type());
  }
  peft::Weights effective(const peft::Weights& weights, const peft::LayerView&) const override {
    const auto A = options.diagonal() ? lora_A * lora_E : lora_A;
    return {weights.weight + options.scaling() * torch::mm(lora_B, A), weights.bias};
  }
  void initialize(const peft::LayerView&) override {}

  Tensor lora_A, lora_E, lora_B;
};

inline std::string refusal(const PlainOptions&, const peft::SiteInfo& site) {
  return site.fan_in.size() == 1 ? "" : "a " + site.layer;
}
inline std::shared_ptr<peft::PieceImpl> make_piece(const PlainOptions& options, const peft::SiteInfo& site) {
  return std::make_shared<PlainImpl>(options, site);
}

/// Gives plain pieces the values of an adapter with the same sites and tensors.
inline void copy_values(const peft::Adapter& from, const peft::Adapter& plain) {
  torch::NoGradGuard no_grad;
  std::map<std::string, Tensor> values;
  for (const auto& [name, tensor] : from.named_parameters()) values[name] = tensor;
  const std::string method = std::string(".") + PlainOptions::method + ".";
  for (auto [name, tensor] : plain.named_parameters()) {
    const auto at = name.rfind(method);
    tensor.copy_(
        values.at(name.replace(at, method.size(), "." + from.entries().front().piece->method() + ".")));
  }
}

/// AdaLoRA around a step, tensor by tensor, as the authors' code does it.
class PlainAllocator {
 public:
  PlainAllocator(std::vector<std::shared_ptr<PlainImpl>> layers, double weight, int64_t keep)
      : layers_(std::move(layers)), weight_(weight), keep_(keep) {}

  /// The orthogonality penalty, with its graph.
  Tensor penalty() const {
    Tensor sum = torch::zeros({}, layers_.front()->lora_A.options());
    for (const auto& layer : layers_) {
      const auto add = [&](const Tensor& product) {
        sum = sum + (product - torch::eye(product.size(0), product.options())).norm();
      };
      add(torch::mm(layer->lora_A, layer->lora_A.t()));
      add(torch::mm(layer->lora_B.t(), layer->lora_B));
    }
    return sum * (weight_ / (2.0 * static_cast<double>(layers_.size())));
  }

  /// Importance; from the second step on, allocation and masks.
  void after_step() {
    torch::NoGradGuard no_grad;
    std::vector<Tensor> scores;
    for (const auto& layer : layers_) {
      const auto a = importance(layer->lora_A).mean(1), b = importance(layer->lora_B).mean(0);
      scores.push_back(importance(layer->lora_E).flatten() + a + b);
    }
    if (steps_++ == 0) return;
    const auto all = torch::cat(scores);
    const auto threshold =
        std::get<0>(torch::kthvalue(all, std::max<int64_t>(1, all.numel() - keep_))).item<float>();
    for (size_t i = 0; i < layers_.size(); ++i) {
      layers_[i]->lora_E.masked_fill_((scores[i] <= threshold).unsqueeze(1), 0.0);
    }
  }

 private:
  Tensor importance(const Tensor& parameter) {
    constexpr double beta = 0.85;
    auto& [mean, deviation] = averages_[parameter.unsafeGetTensorImpl()];
    if (!mean.defined()) {
      mean = torch::zeros_like(parameter);
      deviation = torch::zeros_like(parameter);
    }
    const auto sensitivity = (parameter * parameter.grad()).abs();
    mean = beta * mean + (1 - beta) * sensitivity;
    deviation = beta * deviation + (1 - beta) * (sensitivity - mean).abs();
    return mean * deviation;
  }

  std::vector<std::shared_ptr<PlainImpl>> layers_;
  double weight_;
  int64_t keep_, steps_ = 0;
  std::map<const void*, std::pair<Tensor, Tensor>> averages_;
};

}  // namespace bench
