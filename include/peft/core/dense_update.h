// Dense update: what methods that add a whole matrix to a weight have in common.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "peft/core/pattern.h"
#include "peft/core/piece.h"
#include "peft/kernels/cuda_graph.h"

namespace peft::internal {

/// y = F(x) + F_Δ(x), F_Δ the layer with weight Δ and no bias; W′ = W + Δ, Δ = α / r · delta().
/// `Derived` has `Tensor delta() const`, Δ before scaling in the weight's layout, and `bool rescales()
/// const`: whether rank dropout divides by the share of rows it kept. `Options` has rank, alpha, their
/// patterns, rank_dropout and module_dropout. Reference: the LyCORIS layers of Hugging Face PEFT, their draws
/// included: every training forward draws one number for module dropout, also at rate 0, then a row of them
/// for rank dropout. On a GPU the numbers of a positive rate are drawn there, and what is dropped has
/// gradients of zero rather than none.
template <class Derived, class Options>
class DenseUpdate : public Piece<Derived, Options> {
 public:
  DenseUpdate(Options settings, const SiteInfo& site)
      : Piece<Derived, Options>(Options::method, std::move(settings), site),
        rank(first_match(this->options.rank_pattern(), site.path, this->options.rank())),
        alpha(first_match(this->options.alpha_pattern(), site.path, this->options.alpha())) {}

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    const auto y = layer.forward(x);
    const bool training = this->is_training();
    const double rate = this->options.module_dropout();
    const bool on_gpu = x.is_cuda() && rate > 0;
    if (training && !on_gpu && torch::rand({1}).item<float>() <= static_cast<float>(rate)) return y;
    auto update = scaled_delta();
    if (training && on_gpu) update = update * (torch::rand({1}, x.device()) > rate);
    if (training && this->options.rank_dropout() > 0) update = update * kept_rows(update);
    return y + layer.apply(x.to(update.scalar_type()), {update, {}});
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    return {weights.weight + scaled_delta().to(weights.weight.scalar_type()), weights.bias};
  }

  bool scalable() const override { return true; }
  void set_scale(double factor) override { factor_ = factor; }
  double scale() const { return factor_; }
  /// α / r, with the adapter's `scale` in it.
  double scaling() const { return factor_ * alpha / static_cast<double>(rank); }
  void copy_state(const Derived& other) {
    rank = other.rank;
    alpha = other.alpha;
    factor_ = other.factor_;
  }

  int64_t rank;
  double alpha;

 private:
  Tensor scaled_delta() const { return static_cast<const Derived*>(this)->delta() * scaling(); }

  /// 1 for a kept output, 0 for a dropped one, in a shape that multiplies Δ.
  Tensor kept_rows(const Tensor& update) const {
    const auto rows = update.size(0);
    auto kept = torch::rand({rows}, device_of_draws(update))
                    .gt(this->options.rank_dropout())
                    .to(update.scalar_type());
    // Where no row is kept the reference divides by zero; here nothing is added.
    if (static_cast<const Derived*>(this)->rescales()) {
      kept = kept / kept.mean().clamp_min(1.0 / static_cast<double>(rows));
    }
    std::vector<int64_t> shape(static_cast<size_t>(update.dim()), 1);
    shape[0] = rows;
    return kept.to(update.device()).view(shape);
  }

  double factor_ = 1.0;
};

/// Throws c10::ValueError, naming the option, if one that `DenseUpdate` reads is out of range.
template <class Options>
void check_dense_update(const std::string& name, const Options& options) {
  TORCH_CHECK_VALUE(options.rank() > 0, name, ": rank must be positive, but got ", options.rank());
  TORCH_CHECK_VALUE(std::isfinite(options.alpha()), name, ": alpha must be finite, but got ",
                    options.alpha());
  TORCH_CHECK_VALUE(options.rank_dropout() >= 0 && options.rank_dropout() < 1, name,
                    ": rank_dropout must be in [0, 1), but got ", options.rank_dropout());
  TORCH_CHECK_VALUE(options.module_dropout() >= 0 && options.module_dropout() < 1, name,
                    ": module_dropout must be in [0, 1), but got ", options.module_dropout());
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(rank > 0, name, ": rank_pattern of '", pattern, "' must be positive, but got ", rank);
    check_pattern(name + ": rank_pattern", pattern);
  }
  for (const auto& [pattern, alpha] : options.alpha_pattern()) {
    TORCH_CHECK_VALUE(std::isfinite(alpha), name, ": alpha_pattern of '", pattern,
                      "' must be finite, but got ", alpha);
    check_pattern(name + ": alpha_pattern", pattern);
  }
}

/// Why a site cannot take such a method, or an empty string: the reference has it for linear layers and
/// convolutions of one and two dimensions.
inline std::string dense_update_refusal(const SiteInfo& site) {
  const bool fits =
      !site.lookup && !site.bare && !site.fan_in_fan_out && !site.fan_in.empty() && site.fan_in.size() <= 3;
  if (fits) return {};
  return "a " + site.layer + (site.fan_in_fan_out ? " that stores (in, out)" : "") +
         " has no such form (hint: linear layers and convolutions of one or two dimensions have one)";
}

/// True for a convolution whose kernel has more than one position.
inline bool has_wide_kernel(const SiteInfo& site) {
  for (size_t axis = 2; axis < site.weight_shape.size(); ++axis) {
    if (site.weight_shape[axis] != 1) return true;
  }
  return false;
}

/// The kernel as two sizes: of one dimension k, (k, 1).
inline std::pair<int64_t, int64_t> kernel_2d(const SiteInfo& site) {
  const auto& shape = site.weight_shape;
  return {shape.at(2), shape.size() > 3 ? shape[3] : 1};
}

}  // namespace peft::internal
