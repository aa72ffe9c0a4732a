// LoRA: adds a trained low-rank product to a frozen weight.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/core/piece.h"

namespace peft {

/// How A and B start. The names are Hugging Face's `init_lora_weights`.
enum class LoraInit {
  kaiming,   ///< `true`: A ~ U(±1/√fan_in), B = 0. Microsoft's and Hugging Face's code; the paper says
             ///< Gaussian
  gaussian,  ///< "gaussian": A ~ N(0, 1/r) (standard deviation 1/r), B = 0
  random,    ///< `false`: A and B both as a default layer's weights; changes the output at once
};

/// Settings of `Lora`. Defaults are Hugging Face's.
struct LoraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "lora";

  explicit LoraOptions(int64_t rank = 8) : rank_(rank) {}

  /// Rank r of the update, at least 1.
  TORCH_ARG(int64_t, rank);
  /// α; the product is scaled by α / r.
  TORCH_ARG(double, alpha) = 8.0;
  /// Rate of dropout on the adapter's input, in [0, 1). Not applied on embeddings, as in the reference.
  TORCH_ARG(double, dropout) = 0.0;
  /// Scale by α / √r instead (arXiv 2312.03732).
  TORCH_ARG(bool, rslora) = false;
  /// A bias on B, inside the scaled term, zero at the start. Needs a bias in the base to be merged.
  TORCH_ARG(bool, lora_bias) = false;
  TORCH_ARG(LoraInit, init) = LoraInit::kaiming;
  /// Other ranks for some layers: the first regular expression that matches the path, or what follows a dot
  /// in it.
  TORCH_ARG(std::vector<Pattern<int64_t>>, rank_pattern) = {};
  /// Other α for some layers, likewise.
  TORCH_ARG(std::vector<Pattern<double>>, alpha_pattern) = {};
  /// For a linear layer that stacks several projections (q, k, v): which of its equal blocks of rows to
  /// adapt, each with its own rank-r factors. Empty: the layer is one. As loralib's
  /// `MergedLinear(enable_lora)`.
  TORCH_ARG(std::vector<bool>, enable) = {};
};

/// LoRA: y = F(x) + s · B A dropout(x), s = α / r, for every layer kind with a low-rank form.
/// Formula: W′ = W + s · fold(B A).
/// Shapes: lora_A: (rank, *fan_in); lora_B: (fan_out, rank / groups, *ones); lora_B_bias: (fan_out).
/// With `enable` of n blocks, k of them on: lora_A: (k · rank, in); lora_B: (k · out / n, rank).
/// Trains: lora_A, lora_B, lora_B_bias. Count for a linear layer: r (in + out) [+ out].
/// Throws: c10::ValueError for options out of range; c10::Error on merging a grouped convolution.
/// Paper: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, equation 3.
class LoraImpl : public Piece<LoraImpl, LoraOptions> {
 public:
  LoraImpl(LoraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    const auto y = layer.forward(x);
    auto input = x;
    if (!site().lookup) {
      if (input.scalar_type() != lora_A.scalar_type()) input = input.to(lora_A.scalar_type());
      if (is_training() && options.dropout() > 0) input = torch::dropout(input, options.dropout(), true);
    }
    auto update = layer.low_rank(input, lora_A, full_B());
    if (lora_B_bias.defined()) update = update + per_channel(lora_B_bias);
    return y + update * scaling();
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto why = not_mergeable();
    TORCH_CHECK(why.empty(), "'", site().path, "': ", why);
    // Half types on the CPU are multiplied in float32 and rounded once, as the reference does.
    const bool widen = lora_A.is_cpu() && lora_A.element_size() < 4;
    const auto type = widen ? torch::kFloat32 : lora_A.scalar_type();
    const auto BA = at::mm(full_B().flatten(1).to(type), lora_A.flatten(1).to(type)) * scaling();
    auto weight = weights.weight + layer.fold(BA).to(weights.weight.scalar_type());
    if (!lora_B_bias.defined()) return {weight, weights.bias};
    return {weight, weights.bias + (lora_B_bias * scaling()).to(weights.bias.scalar_type())};
  }

  std::string not_mergeable() const override {
    if (site().groups > 1)
      return "LoRA on a convolution of several groups cannot be merged: A sees all channels";
    if (lora_B_bias.defined() && !site().has_bias())
      return "LoRA with lora_bias cannot be merged: the layer has no bias";
    return {};
  }

  /// Draws as the reference does, the discarded draws of its default-constructed layers included, so that one
  /// seed gives one start in both languages.
  void initialize(const LayerView&) override;

  Changed changed() const override {
    auto result = Piece::changed();
    if (!options.enable().empty()) result.weight = lora_B.size(0) * lora_A.size(1);
    if (lora_B_bias.defined()) result.bias = lora_B_bias.numel();
    return result;
  }
  bool scalable() const override { return true; }
  void set_scale(double factor) override { factor_ = factor; }
  double scale() const { return factor_; }
  /// s, with the adapter's `scale` in it.
  double scaling() const {
    const auto r = static_cast<double>(rank);
    return factor_ * alpha / (options.rslora() ? std::sqrt(r) : r);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Lora(rank=" << rank << ", alpha=" << alpha << ", dropout=" << options.dropout() << ")";
  }
  void copy_state(const LoraImpl& other) {
    rank = other.rank;
    alpha = other.alpha;
    factor_ = other.factor_;
  }

  /// B with a row for every output: with `enable`, block-diagonal in the enabled blocks, zero rows elsewhere.
  Tensor full_B() const;

  int64_t rank;
  double alpha;
  Tensor lora_A, lora_B, lora_B_bias;

 private:
  Tensor per_channel(const Tensor& bias) const {
    std::vector<int64_t> shape{bias.size(0)};
    shape.resize(std::max<size_t>(1, site().fan_in.size()), 1);
    return bias.view(shape);
  }
  double factor_ = 1.0;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const LoraOptions& options) {
  TORCH_CHECK_VALUE(options.rank() > 0, "LoraOptions: rank must be positive, but got ", options.rank());
  TORCH_CHECK_VALUE(std::isfinite(options.alpha()), "LoraOptions: alpha must be finite, but got ",
                    options.alpha());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "LoraOptions: dropout must be in [0, 1), but got ", options.dropout());
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(rank > 0, "LoraOptions: rank_pattern of '", pattern, "' must be positive, but got ",
                      rank);
    internal::check_pattern("LoraOptions: rank_pattern", pattern);
  }
  for (const auto& [pattern, alpha] : options.alpha_pattern()) {
    TORCH_CHECK_VALUE(std::isfinite(alpha), "LoraOptions: alpha_pattern of '", pattern,
                      "' must be finite, but got ", alpha);
    internal::check_pattern("LoraOptions: alpha_pattern", pattern);
  }
  const auto& enable = options.enable();
  TORCH_CHECK_VALUE(enable.empty() || std::find(enable.begin(), enable.end(), true) != enable.end(),
                    "LoraOptions: enable must switch on at least one block, but got ", enable.size(),
                    " times false");
}

/// Why a site cannot take LoRA, or an empty string.
inline std::string refusal(const LoraOptions& options, const SiteInfo& site) {
  const auto name = "a " + site.layer;
  if (site.fan_in.empty()) return name + " has no low-rank form (hint: a `Replace` piece trains all of it)";
  const auto rank = internal::first_match(options.rank_pattern(), site.path, options.rank());
  if (rank % site.groups != 0) {
    return name + " of " + std::to_string(site.groups) +
           " groups needs a rank that is a multiple of it, but got rank " + std::to_string(rank);
  }
  if (options.lora_bias() && site.lookup) return name + " takes no lora_bias";
  if (const auto blocks = static_cast<int64_t>(options.enable().size()); blocks > 0) {
    if (site.layer != "Linear") return name + " has no blocks of rows to enable";
    if (site.fan_out % blocks != 0) {
      return name + " of " + std::to_string(site.fan_out) + " outputs cannot be cut into " +
             std::to_string(blocks) + " equal blocks (enable)";
    }
    if (options.lora_bias()) return "lora_bias cannot be combined with enable";
  }
  return {};
}

inline std::shared_ptr<PieceImpl> make_piece(const LoraOptions& options, const SiteInfo& site) {
  return std::make_shared<LoraImpl>(options, site);
}

inline LoraImpl::LoraImpl(LoraOptions settings, const SiteInfo& site)
    : Piece(LoraOptions::method, std::move(settings), site),
      rank(internal::first_match(options.rank_pattern(), site.path, options.rank())),
      alpha(internal::first_match(options.alpha_pattern(), site.path, options.alpha())) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Lora: '", site.path, "': ", why);
  const auto blocks = static_cast<int64_t>(options.enable().size());
  const auto enabled = blocks ? std::count(options.enable().begin(), options.enable().end(), true) : 1;
  std::vector<int64_t> shape_A{enabled * rank};
  shape_A.insert(shape_A.end(), site.fan_in.begin(), site.fan_in.end());
  std::vector<int64_t> shape_B{blocks ? enabled * site.fan_out / blocks : site.fan_out, rank / site.groups};
  shape_B.resize(site.fan_in.size() + 1, 1);
  lora_A = register_parameter("lora_A", torch::empty(shape_A));
  lora_B = register_parameter("lora_B", torch::empty(shape_B));
  if (options.lora_bias()) lora_B_bias = register_parameter("lora_B_bias", torch::empty({site.fan_out}));
}

inline void LoraImpl::initialize(const LayerView&) {
  torch::NoGradGuard no_grad;
  const auto like_default_layer = [](Tensor& weight) { nn::init::kaiming_uniform_(weight, std::sqrt(5.0)); };
  if (site().lookup) {
    lora_A.copy_(torch::randn(lora_A.sizes()));
    lora_B.copy_(torch::randn(lora_B.sizes()));
    if (options.init() == LoraInit::random) return;
    lora_A.zero_();
    lora_B.normal_();
    return;
  }
  const bool stacked = !options.enable().empty();  // loralib draws A once
  if (!stacked) {
    like_default_layer(lora_A);
    like_default_layer(lora_B);
    if (lora_B_bias.defined()) {
      const auto inputs =
          std::accumulate(lora_B.sizes().begin() + 1, lora_B.sizes().end(), int64_t{1}, std::multiplies<>());
      const auto bound = 1.0 / std::sqrt(static_cast<double>(inputs));
      lora_B_bias.uniform_(-bound, bound);
    }
    if (options.init() == LoraInit::random) return;
  }
  switch (options.init()) {
    case LoraInit::kaiming:
      like_default_layer(lora_A);
      break;
    case LoraInit::gaussian:
      lora_A.normal_(0.0, 1.0 / static_cast<double>(rank));
      break;
    case LoraInit::random:
      like_default_layer(lora_A);
      like_default_layer(lora_B);
      return;
  }
  lora_B.zero_();
  if (lora_B_bias.defined()) lora_B_bias.zero_();
}

inline Tensor LoraImpl::full_B() const {
  if (options.enable().empty()) return lora_B;
  const auto blocks = static_cast<int64_t>(options.enable().size());
  const auto rows = site().fan_out / blocks;
  std::vector<Tensor> stack;
  int64_t taken = 0;
  for (const bool on : options.enable()) {
    if (!on) {
      stack.push_back(torch::zeros({rows, lora_A.size(0)}, lora_B.options().requires_grad(false)));
      continue;
    }
    const auto block = lora_B.narrow(0, taken * rows, rows);
    const auto right = lora_A.size(0) - (taken + 1) * rank;
    stack.push_back(torch::constant_pad_nd(block, {taken * rank, right}));
    ++taken;
  }
  return torch::cat(stack);
}

}  // namespace peft
