// Invertible adapters: a change of the embeddings that is undone before the output layer.
#pragma once

#include <torch/arg.h>

#include <cmath>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "peft/core/activation_function.h"
#include "peft/core/input.h"
#include "peft/methods/projection.h"

namespace peft {

/// Settings of `Invertible`. Beside a bottleneck under one name: `add_adapter(*model, {peft::on(pfeiffer()),
/// peft::on(InvertibleOptions())}, "quechua")` is AdapterHub's `seq_bn_inv`.
struct InvertibleOptions {
  static constexpr Needs needs = Needs::input;
  static constexpr const char* method = "invertible";

  explicit InvertibleOptions(double reduction_factor = 2) : reduction_factor_(reduction_factor) {}

  /// The functions have half // reduction_factor channels in their middle, at least 1; positive.
  TORCH_ARG(double, reduction_factor);
  /// The function in them, by a name `activation_functions` has. (AdapterHub takes the bottleneck's.)
  TORCH_ARG(std::string, non_linearity) = "relu";
};

/// A coupling of the halves of x = (x₁, x₂), x₁ of width // 2 channels: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁); its
/// inverse x₂ = y₂ − G(y₁), x₁ = y₁ − F(x₂) before a language model's output layer. F and G are two
/// projections with the non-linearity between.
/// Shapes, with a = width // 2, b = width − a, r the factor: F.0.weight: (b // r, b); F.2.weight: (a, b //
/// r); G.0.weight: (a // r, a); G.2.weight: (b, a // r); biases as long as the weights are high. Trains: all.
/// Starts N(0, 0.02²), biases 0: close to no change, not none. Throws: c10::ValueError for options out of
/// range, a factor larger than half the width. Paper: MAD-X, arXiv 2005.00052, §3.3. Reference: AdapterHub's
/// NICE coupling block, which it applies in reverse in its own heads and through its model interface.
class InvertibleImpl : public Piece<InvertibleImpl, InvertibleOptions, InputPieceImpl> {
 public:
  InvertibleImpl(InvertibleOptions settings, const SiteInfo& site);

  Embedded embed(Embedded in) override {
    const auto [first, second] = halves(in.values);
    const auto changed = first + F->forward(second);
    in.values = joined(changed, second + G->forward(changed), in.values);
    return in;
  }
  Tensor leave(const Tensor& hidden) override {
    const auto [first, second] = halves(hidden);
    const auto restored = second - G->forward(first);
    return joined(first - F->forward(restored), restored, hidden);
  }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    for (auto* half : {F.get(), G.get()}) half->draw();
    for (auto* half : {F.get(), G.get()}) half->restart();
  }
  /// After the bottlenecks and what they share, as in AdapterHub.
  int turn() const override { return 2; }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Invertible(" << site().width << ", " << options.non_linearity() << ")";
  }

  /// What is added to one half.
  class Subnet : public nn::Module {
   public:
    Subnet(int64_t in, int64_t middle, int64_t out, ActivationFunction activation)
        : nn::Module("Subnet"), activation_(activation) {
      down = register_module("0", std::make_shared<internal::DenseProjection>(in, middle));
      up = register_module("2", std::make_shared<internal::DenseProjection>(middle, out));
    }
    Tensor forward(const Tensor& x) const { return up->forward(activation_(down->forward(x))); }
    /// The draws of torch.nn.Linear.
    void draw() const {
      down->draw();
      up->draw();
    }
    void restart() const {
      for (auto* layer : {down.get(), up.get()}) {
        layer->restart([](Tensor weight) { weight.normal_(0.0, 0.02); });
      }
    }

    std::shared_ptr<internal::DenseProjection> down, up;

   private:
    ActivationFunction activation_;
  };

  std::shared_ptr<Subnet> F, G;

 private:
  std::pair<Tensor, Tensor> halves(const Tensor& x) const {
    const auto wide = x.to(F->down->weight.scalar_type());
    const auto half = site().width / 2;
    return {wide.narrow(-1, 0, half), wide.narrow(-1, half, site().width - half)};
  }
  static Tensor joined(const Tensor& first, const Tensor& second, const Tensor& like) {
    return torch::cat({first, second}, -1).to(like.scalar_type());
  }
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const InvertibleOptions& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.reduction_factor()) && options.reduction_factor() > 0,
                    "InvertibleOptions: reduction_factor must be positive, but got ",
                    options.reduction_factor());
  activation_function(options.non_linearity());
}

/// Where it goes that has no target.
inline bool goes_to(const InvertibleOptions&, const SiteInfo& site) {
  return site.input && site.input->embedded();
}

/// Why a site cannot take an invertible adapter, or an empty string.
inline std::string refusal(const InvertibleOptions& options, const SiteInfo& site) {
  if (goes_to(options, site)) return {};
  return "an invertible adapter works on embeddings that have their positions and norm";
}

inline std::shared_ptr<PieceImpl> make_piece(const InvertibleOptions& options, const SiteInfo& site) {
  return std::make_shared<InvertibleImpl>(options, site);
}

inline InvertibleImpl::InvertibleImpl(InvertibleOptions settings, const SiteInfo& site)
    : Piece(InvertibleOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Invertible: '", site.path, "': ", why);
  const auto a = site.width / 2, b = site.width - a;
  const auto middle = [&](int64_t width) {
    return internal::floor_divide(static_cast<double>(width), options.reduction_factor());
  };
  TORCH_CHECK_VALUE(a > 0 && middle(a) > 0, "Invertible: '", site.path, "': half of width ", site.width,
                    " leaves no channels at reduction_factor ", options.reduction_factor());
  const auto activation = activation_function(options.non_linearity());
  F = register_module("F", std::make_shared<Subnet>(b, middle(b), a, activation));
  G = register_module("G", std::make_shared<Subnet>(a, middle(a), b, activation));
}

}  // namespace peft
