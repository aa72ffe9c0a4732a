// LoRA: adds a trained low-rank product to a frozen weight.
#pragma once

#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/piece.h"
#include "peft/core/problems.h"
#include "peft/kernels/low_rank_sum.h"
#include "peft/kernels/shadow.h"
#include "peft/methods/draws.h"
#include "peft/methods/lora_options.h"

namespace peft {

/// LoRA: y = F(x) + s · B A dropout(x), s = α / r, for every layer kind with a low-rank form.
/// Formula: W′ = W + s · fold(B A); with a start taken out of the base (see `LoraInit`) W + s · (B A − B₀
/// A₀). Shapes: lora_A, lora_A_0: (rank, *fan_in); lora_B, lora_B_0: (fan_out, rank / groups, *ones);
/// lora_B_bias: (fan_out); loftq_weight: as the layer's weight.
/// With `enable` of n blocks, k of them on: lora_A: (k · rank, in); lora_B: (k · out / n, rank).
/// On a stack of e matrices, each with its own: lora_A: (e · rank, in), the expert the slowest axis; lora_B:
/// (out, rank · e), the expert the fastest.
/// With `gating`: gate_weight: (1, in); gate_bias: (1).
/// Trains: lora_A, lora_B (not with `LoraInit::mica`), lora_B_bias, the gate. Count for a linear layer: r (in
/// + out) [+ out] [+ in + 1]. Throws: c10::ValueError for options out of range; c10::Error on merging a
/// grouped convolution. Paper: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685,
/// equation 3.
class LoraImpl : public Piece<LoraImpl, LoraOptions> {
 public:
  LoraImpl(LoraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    if (const auto fused = fused_forward(x, layer)) return *fused;
    const auto y = start_forward(x, layer);
    const auto input = cast(x);
    if (gate_weight.defined()) return y + gated(input, layer);
    if (!drops()) return y + update(input, layer);
    const auto dropped = torch::dropout(input, options.dropout(), true);
    return y + (lora_A_0.defined() ? update(dropped, layer) + undropped(input, dropped, layer)
                                   : update(dropped, layer));
  }

  bool mixes_tokens() const override { return gate_weight.defined(); }

  std::optional<LowRankTerm> low_rank() const override {
    if (gate_weight.defined() || lora_B_bias.defined() || loftq_weight.defined()) return {};
    if (lora_A_0.defined() && drops()) return {};  // A₀ is not dropped
    auto A = full_A(), B = full_B();
    if (const auto base = site().dtype; internal::wants_shadows(A, base)) {
      A = shadow_A_.of(A, base);
      B = shadow_B_.of(B, base);
    }
    return LowRankTerm{A, B, {}, scaling(), drops() ? options.dropout() : 0.0, {}};
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto why = not_mergeable();
    TORCH_CHECK(why.empty(), "'", site().path, "': ", why);
    const auto start = start_weights(weights, layer);
    const auto [weight, finite] = with_delta(start.weight, layer);
    if (!lora_B_bias.defined()) return {weight, weights.bias, finite};
    const auto own = (lora_B_bias * scaling()).to(weights.weight.scalar_type());
    return {weight, weights.bias.defined() ? weights.bias + own : own, finite};
  }

  std::string not_mergeable() const override {
    if (gate_weight.defined()) return "LoRA with gating cannot be merged: the gate depends on the input";
    if (site().groups > 1)
      return "LoRA on a convolution of several groups cannot be merged: A sees all channels";
    if (lora_B_bias.defined() && !site().has_bias())
      return "LoRA with lora_bias cannot be merged: the layer has no bias";
    return {};
  }

  /// Draws as the reference does, the discarded draws of its default-constructed layers included, so that one
  /// seed gives one start in both languages.
  void initialize(const LayerView& base) override;
  /// Starts from these factors, rounded to the base's type; of some starts also A₀ and B₀.
  void start_from(const internal::StartFactors& factors);
  /// Takes another rank and α; A and B begin anew.
  void resize(int64_t new_rank, double new_alpha, const LayerView& base);
  /// LoftQ's weight stays in the base's type.
  void place() override {
    Piece::place();
    if (loftq_weight.defined()) loftq_weight.set_data(loftq_weight.to(site().dtype));
  }

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

  /// All of the low-rank form: ΔW = s · full_B full_A. A₀ and −B₀ come last where there are any; with
  /// `enable`, B is block-diagonal in the enabled blocks, with zero rows elsewhere.
  Tensor full_A() const { return lora_A_0.defined() ? torch::cat({lora_A, lora_A_0}) : lora_A; }
  Tensor full_B() const;

  // What DoRA is made of, which scales the layer's output and the update together.

  /// The layer with the weight the adapter runs on: LoftQ's, or the layer's own.
  Tensor start_forward(const Tensor& x, const LayerView& layer) const {
    return loftq_weight.defined() ? layer.apply(x, start_weights(layer.weights(), layer)) : layer.forward(x);
  }
  Weights start_weights(const Weights& weights, const LayerView& layer) const {
    if (!loftq_weight.defined()) return weights;
    const auto base = layer.base().weights().weight;
    if (weights.weight.is_same(base)) return {loftq_weight, weights.bias};
    return {weights.weight + (loftq_weight - base), weights.bias};
  }
  /// x in the factors' type.
  Tensor cast(const Tensor& x) const {
    return site().lookup || x.scalar_type() == lora_A.scalar_type() ? x : x.to(lora_A.scalar_type());
  }
  bool drops() const { return is_training() && options.dropout() > 0 && !site().lookup; }
  /// s · (x (B A − B₀ A₀)ᵀ + bias).
  Tensor update(const Tensor& x, const LayerView& layer) const {
    auto result = layer.low_rank(x, full_A(), full_B());
    if (lora_B_bias.defined()) result = result + per_channel(lora_B_bias);
    return result * scaling();
  }
  /// What turns `update(dropped)` into s · (dropped Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ), for the base is not dropped.
  Tensor undropped(const Tensor& x, const Tensor& dropped, const LayerView& layer) const {
    return layer.low_rank(dropped - x, lora_A_0, lora_B_0) * scaling();
  }
  /// ΔW in the factors' type and the layout the layer stores its weight in.
  Tensor delta(const LayerView& layer) const {
    // Half types on the CPU are multiplied in float32 and rounded once, as the reference does.
    const bool widen = lora_A.is_cpu() && lora_A.element_size() < 4;
    const auto type = widen ? torch::kFloat32 : lora_A.scalar_type();
    return layer.fold(product(full_A().flatten(1).to(type), full_B().flatten(1).to(type)) * scaling());
  }
  /// W + ΔW, in one pass over W where ΔW is a plain product in W's layout and type.
  internal::LowRankSum with_delta(const Tensor& W, const LayerView& layer) const {
    const bool is_product = site().fan_in.size() == 1 && !site().lookup && !site().weights_only;
    if (!is_product || W.scalar_type() != lora_A.scalar_type() || lora_A.element_size() < 4) {
      return {W + delta(layer).to(W.scalar_type())};
    }
    const auto A = full_A(), B = full_B();
    return site().fan_in_fan_out ? internal::low_rank_sum(W, A.t(), B.t(), scaling())
                                 : internal::low_rank_sum(W, B, A, scaling());
  }
  /// One value an output, shaped to meet the layer's output.
  Tensor per_channel(const Tensor& values) const {
    std::vector<int64_t> shape{values.numel()};
    shape.resize(std::max<size_t>(1, site().fan_in.size()), 1);
    return values.view(shape);
  }

  int64_t rank;
  double alpha;
  Tensor lora_A, lora_B, lora_B_bias;
  Tensor gate_weight, gate_bias;  ///< undefined without gating
  Tensor lora_A_0, lora_B_0;      ///< the start that is taken out of the base; undefined where there is none
  Tensor loftq_weight;            ///< LoftQ's quantised weight, read back; undefined without

 private:
  Tensor product(const Tensor& A, const Tensor& B) const {
    const auto experts = site().experts;
    if (experts == 1) return at::mm(B, A);
    return at::bmm(B.view({B.size(0), rank, experts}).permute({2, 0, 1}), A.view({experts, rank, A.size(1)}));
  }
  /// g · x (B A)ᵀ, the gate on what is not dropped.
  Tensor gated(const Tensor& x, const LayerView& layer) const {
    TORCH_CHECK_VALUE(x.dim() == 3, "Lora: '", site().path,
                      "': a gate needs inputs (batch, time, in), but got ", internal::shape_text(x.sizes()));
    const auto open = at::sigmoid(at::linear(x, gate_weight, gate_bias)).mean(1, /*keepdim=*/true);
    const auto input = drops() ? torch::dropout(x, options.dropout(), true) : x;
    return layer.low_rank(input, full_A(), full_B()) * open * factor_;
  }
  void draw_factors(const LayerView& base);

  double factor_ = 1.0;
  internal::Shadow shadow_A_, shadow_B_;  ///< in the type of a layer in half precision
};

inline std::shared_ptr<PieceImpl> make_piece(const LoraOptions& options, const SiteInfo& site) {
  return std::make_shared<LoraImpl>(options, site);
}

inline LoraImpl::LoraImpl(LoraOptions settings, const SiteInfo& site)
    : Piece(LoraOptions::method, std::move(settings), site),
      rank(internal::first_match(options.rank_pattern(), site.target(), options.rank())),
      alpha(internal::first_match(options.alpha_pattern(), site.target(), options.alpha())) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Lora: '", site.path, "': ", why);
  const auto blocks = static_cast<int64_t>(options.enable().size());
  const auto enabled = blocks ? std::count(options.enable().begin(), options.enable().end(), true) : 1;
  const auto fan_in = site.experts > 1 ? std::vector<int64_t>{site.expert_in} : site.fan_in;
  std::vector<int64_t> shape_A{enabled * rank * site.experts};
  shape_A.insert(shape_A.end(), fan_in.begin(), fan_in.end());
  std::vector<int64_t> shape_B{blocks ? enabled * site.fan_out / blocks : site.fan_out,
                               rank * site.experts / site.groups};
  shape_B.resize(fan_in.size() + 1, 1);
  lora_A = register_parameter("lora_A", torch::empty(shape_A));
  lora_B = options.init() == LoraInit::mica ? register_buffer("lora_B", torch::empty(shape_B))
                                            : register_parameter("lora_B", torch::empty(shape_B));
  if (options.lora_bias()) lora_B_bias = register_parameter("lora_B_bias", torch::empty({site.fan_out}));
  if (options.gating()) {
    gate_weight = register_parameter("gate_weight", torch::empty({1, site.fan_in[0]}));
    gate_bias = register_parameter("gate_bias", torch::empty({1}));
  }
  if (internal::subtracts_start(options.init(), site)) {
    lora_A_0 = register_buffer("lora_A_0", torch::zeros(shape_A));
    lora_B_0 = register_buffer("lora_B_0", torch::zeros(shape_B));
  }
  if (options.init() == LoraInit::loftq && !site.lookup) {
    loftq_weight = register_buffer("loftq_weight", torch::zeros(site.weight_shape));
  }
}

inline void LoraImpl::initialize(const LayerView& base) {
  torch::NoGradGuard no_grad;
  draw_factors(base);
  if (gate_weight.defined()) internal::draw_gate(gate_weight, gate_bias);
}

inline void LoraImpl::draw_factors(const LayerView& base) {
  const auto weight = [&] {
    const auto W = base.weights().weight.detach().to(torch::kCPU, torch::kFloat32);
    return site().lookup || site().fan_in_fan_out ? W.t() : W;
  };
  const auto like_default_layer = [](Tensor& factor) { nn::init::kaiming_uniform_(factor, std::sqrt(5.0)); };
  if (!site().drawn_before.empty()) {
    auto A = torch::empty({rank, site().drawn_before.at(1)});
    auto B = torch::empty({site().drawn_before.at(0), rank});
    like_default_layer(A);
    like_default_layer(B);
    if (options.lora_bias()) torch::empty({B.size(0)}).uniform_();
    if (options.init() == LoraInit::kaiming) like_default_layer(A);
    if (options.init() == LoraInit::gaussian) A.normal_();
  }
  if (site().lookup) {
    lora_A.copy_(torch::randn(lora_A.sizes()));
    lora_B.copy_(torch::randn(lora_B.sizes()));
    if (options.init() == LoraInit::random) return;
    lora_A.zero_();
    lora_B.normal_();
    if (options.init() == LoraInit::mica) lora_B.copy_(internal::minor_left_vectors(weight(), rank));
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
  if (lora_B_bias.defined()) lora_B_bias.zero_();
  switch (options.init()) {
    case LoraInit::random:
      like_default_layer(lora_A);
      like_default_layer(lora_B);
      return;
    case LoraInit::kaiming:
    case LoraInit::corda:
    case LoraInit::lora_ga:
      like_default_layer(lora_A);
      break;
    case LoraInit::gaussian:
      lora_A.normal_(0.0, 1.0 / static_cast<double>(rank));
      break;
    case LoraInit::eva:
      break;
    case LoraInit::mica:
      lora_A.zero_();
      lora_B.copy_(internal::minor_left_vectors(weight(), rank));
      return;
    case LoraInit::orthogonal:
      return start_from(internal::orthogonal(rank, site().fan_in[0], site().fan_out));
    case LoraInit::pissa:
      return start_from(internal::pissa(weight(), rank, scaling()));
    case LoraInit::pissa_niter:
      return start_from(internal::pissa_niter(weight(), rank, scaling(), options.niter()));
    case LoraInit::olora:
      return start_from(internal::olora(weight(), rank));
    case LoraInit::loftq: {
      const auto start = internal::loftq(weight(), rank, options.loftq_bits(), options.loftq_iter());
      loftq_weight.copy_(site().fan_in_fan_out ? start.quantized.t() : start.quantized);
      return start_from(start.factors);
    }
  }
  lora_B.zero_();
}

inline void LoraImpl::start_from(const internal::StartFactors& factors) {
  torch::NoGradGuard no_grad;
  const auto put = [&](Tensor& into, const Tensor& value) {
    if (into.defined()) into.copy_(value.to(site().dtype));
  };
  put(lora_A, factors.A);
  put(lora_B, factors.B);
  put(lora_A_0, factors.A);
  put(lora_B_0, factors.B);
}

inline void LoraImpl::resize(int64_t new_rank, double new_alpha, const LayerView& base) {
  torch::NoGradGuard no_grad;
  rank = new_rank;
  alpha = new_alpha;
  lora_A.set_data(torch::empty({rank, lora_A.size(1)}));
  lora_B.set_data(torch::empty({lora_B.size(0), rank}));
  initialize(base);
  place();
}

inline Tensor LoraImpl::full_B() const {
  if (lora_B_0.defined()) return torch::cat({lora_B, lora_B_0.neg()}, 1);
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
