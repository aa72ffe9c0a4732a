// AdaLoRA, the layer: options, and a low-rank update in the form of a singular value decomposition.
#pragma once

#include <torch/arg.h>

#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/core/pattern.h"
#include "peft/core/piece.h"

namespace peft {

/// For each initial rank of a layer, by the layer's path, whether it is left.
using KeptRanks = std::map<std::string, std::vector<bool>>;

/// Settings of `AdaLora`. Defaults are Hugging Face's. Steps are the optimizer's, counted from 0.
struct AdaLoraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "adalora";

  /// `total_step`: steps of the whole training, more than `tinit` + `tfinal`.
  explicit AdaLoraOptions(int64_t total_step) : total_step_(total_step) {}

  TORCH_ARG(int64_t, total_step);
  /// Rank of every matrix at the start, at least 1.
  TORCH_ARG(int64_t, init_rank) = 12;
  /// Mean rank of the matrices at the end, from 0 to `init_rank`.
  TORCH_ARG(int64_t, target_rank) = 8;
  /// Steps at the start without masking.
  TORCH_ARG(int64_t, tinit) = 0;
  /// Steps at the end with the final ranks; at least 1 keeps masked values from growing again.
  TORCH_ARG(int64_t, tfinal) = 0;
  /// Steps from one masking to the next.
  TORCH_ARG(int64_t, delta_t) = 1;
  /// Decay of the smoothed sensitivity, in (0, 1).
  TORCH_ARG(double, beta1) = 0.85;
  /// Decay of the smoothed uncertainty, in (0, 1).
  TORCH_ARG(double, beta2) = 0.85;
  /// Weight λ of the orthogonality penalty (paper and original code: 0.1).
  TORCH_ARG(double, orth_reg_weight) = 0.5;
  /// α; not positive: the initial rank.
  TORCH_ARG(double, alpha) = 8.0;
  /// Rate of dropout on the adapter's input, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// `false`: A, E and B keep standard normal values, which change the output at once.
  TORCH_ARG(bool, init) = true;
  /// Which of the initial ranks are left, all where a layer is not named: the `rank_pattern` of a saved
  /// adapter.
  TORCH_ARG(KeptRanks, kept) = {};
};

/// AdaLoRA: y = F(x) + s · B (A ⊙ E) dropout(x), s = α / (r₀ + 1e-5), r₀ the initial rank throughout.
/// Formula: W′ = W + s · fold(B (A ⊙ E)).
/// Shapes: lora_A: (rank, prod(fan_in)); lora_E: (rank, 1); lora_B: (fan_out, rank).
/// Trains: all three. Count: r (fan_in + fan_out + 1).
/// Throws: c10::ValueError for options out of range; c10::Error when an optimizer left the controller out.
/// Paper: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512, equation
/// 3; scaling, score and penalty as in the authors' and Hugging Face's code, which agree and differ from it.
class AdaLoraImpl : public Piece<AdaLoraImpl, AdaLoraOptions> {
 public:
  AdaLoraImpl(AdaLoraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    guard_.check(*this, {lora_A, lora_E, lora_B});
    if (const auto fused = fused_forward(x, layer)) return *fused;
    const auto y = layer.forward(x);
    auto input = x.scalar_type() == lora_A.scalar_type() ? x : x.to(lora_A.scalar_type());
    if (is_training() && options.dropout() > 0) input = torch::dropout(input, options.dropout(), true);
    std::vector<int64_t> shape_A{lora_A.size(0)}, shape_B{lora_B.size(0), lora_B.size(1)};
    shape_A.insert(shape_A.end(), site().fan_in.begin(), site().fan_in.end());
    shape_B.resize(site().fan_in.size() + 1, 1);
    if (lora_A.size(0) == 0) return y;
    const auto update = layer.low_rank(input, (lora_A * lora_E).view(shape_A), lora_B.view(shape_B));
    return y + (update * strength() / divisor()).to(y.scalar_type());
  }

  std::optional<LowRankTerm> low_rank() const override {
    guard_.check(*this, {lora_A, lora_E, lora_B});
    return LowRankTerm{lora_A, lora_B, lora_E, scaling(), is_training() ? options.dropout() : 0.0, {}};
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto delta = layer.fold(at::mm(lora_B, lora_A * lora_E)) * strength() / divisor();
    return {weights.weight + delta.to(weights.weight.scalar_type()), weights.bias};
  }

  /// Draws as the reference does, the discarded draws included.
  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    lora_A.copy_(torch::randn(lora_A.sizes()));
    lora_E.copy_(torch::randn(lora_E.sizes()));
    lora_B.copy_(torch::randn(lora_B.sizes()));
    torch::randn({1});  // the reference's `ranknum`
    if (!options.init()) return;
    lora_E.zero_();
    lora_A.normal_(0.0, 0.02);
    lora_B.normal_(0.0, 0.02);
  }

  bool needs_controller() const override { return true; }
  void mark() const override { guard_.mark({lora_A, lora_E, lora_B}); }
  bool scalable() const override { return true; }
  void set_scale(double factor) override { factor_ = factor; }
  double scale() const { return factor_; }
  /// s, with the adapter's `scale` in it.
  double scaling() const { return strength() / divisor(); }
  /// Ranks that are not masked.
  int64_t rank() const { return torch::count_nonzero(lora_E.detach()).item<int64_t>(); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::AdaLora(rank=" << lora_E.size(0) << " of " << options.init_rank()
           << ", alpha=" << options.alpha() << ", dropout=" << options.dropout() << ")";
  }
  void copy_state(const AdaLoraImpl& other) {
    factor_ = other.factor_;
    kept = other.kept;
  }

  Tensor lora_A, lora_E, lora_B;
  std::vector<size_t> rows;  ///< which of the initial ranks the rows of A are
  std::vector<bool> kept;    ///< for each initial rank whether the last masking left it; empty before

 private:
  double strength() const {
    return factor_ * (options.alpha() > 0 ? options.alpha() : static_cast<double>(options.init_rank()));
  }
  double divisor() const { return static_cast<double>(options.init_rank()) + 1e-5; }

  StepGuard guard_;
  double factor_ = 1.0;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const AdaLoraOptions& options) {
  internal::Problems problems;
  const auto require = [&](bool fits, const char* must, auto value) {
    if (!fits) problems.add(std::string(must) + ", but got " + c10::str(value));
  };
  require(options.init_rank() > 0, "init_rank must be positive", options.init_rank());
  require(options.target_rank() >= 0, "target_rank must be at least 0", options.target_rank());
  require(options.target_rank() <= options.init_rank(),
          ("target_rank must be at most init_rank, which is " + std::to_string(options.init_rank())).c_str(),
          options.target_rank());
  require(options.tinit() >= 0, "tinit must be at least 0 steps", options.tinit());
  require(options.tfinal() >= 0, "tfinal must be at least 0 steps", options.tfinal());
  require(options.delta_t() > 0, "delta_t must be positive", options.delta_t());
  require(options.total_step() > options.tinit() + options.tfinal(),
          ("total_step must be more than tinit + tfinal, which is " +
           std::to_string(options.tinit() + options.tfinal()) + " (the steps in which ranks are taken away)")
              .c_str(),
          options.total_step());
  require(options.beta1() > 0 && options.beta1() < 1, "beta1 must be in (0, 1)", options.beta1());
  require(options.beta2() > 0 && options.beta2() < 1, "beta2 must be in (0, 1)", options.beta2());
  require(options.orth_reg_weight() >= 0 && std::isfinite(options.orth_reg_weight()),
          "orth_reg_weight must be at least 0", options.orth_reg_weight());
  require(std::isfinite(options.alpha()), "alpha must be finite", options.alpha());
  require(options.dropout() >= 0 && options.dropout() < 1, "dropout must be in [0, 1)", options.dropout());
  for (const auto& [path, kept] : options.kept()) {
    require(
        static_cast<int64_t>(kept.size()) == options.init_rank(),
        ("kept of '" + path + "' must have init_rank = " + std::to_string(options.init_rank()) + " entries")
            .c_str(),
        kept.size());
  }
  problems.raise("AdaLoraOptions");
}

/// Why a site cannot take AdaLoRA, or an empty string.
inline std::string refusal(const AdaLoraOptions&, const SiteInfo& site) {
  const auto name = "a " + site.layer;
  if (site.fan_in.empty()) return name + " has no low-rank form";
  if (site.lookup) return name + " takes no AdaLoRA: its input is indices (hint: LoRA has a form for it)";
  if (site.groups > 1) return name + " of " + std::to_string(site.groups) + " groups takes no AdaLoRA";
  return {};
}

inline std::shared_ptr<PieceImpl> make_piece(const AdaLoraOptions& options, const SiteInfo& site) {
  return std::make_shared<AdaLoraImpl>(options, site);
}

inline AdaLoraImpl::AdaLoraImpl(AdaLoraOptions settings, const SiteInfo& site)
    : Piece(AdaLoraOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "AdaLora: '", site.path, "': ", why);
  if (const auto saved = options.kept().find(site.path); saved != options.kept().end()) kept = saved->second;
  for (size_t row = 0; row < static_cast<size_t>(options.init_rank()); ++row) {
    if (kept.empty() || kept[row]) rows.push_back(row);
  }
  const auto rank = static_cast<int64_t>(rows.size());
  const auto inputs =
      std::accumulate(site.fan_in.begin(), site.fan_in.end(), int64_t{1}, std::multiplies<>());
  lora_A = register_parameter("lora_A", torch::empty({rank, inputs}));
  lora_E = register_parameter("lora_E", torch::empty({rank, 1}));
  lora_B = register_parameter("lora_B", torch::empty({site.fan_out, rank}));
}

}  // namespace peft
