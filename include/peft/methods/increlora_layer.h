// IncreLoRA, the layer: options, chunks of rank, and the score of its gradient.
#pragma once

#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/core/piece.h"

namespace peft {

/// Settings of `IncreLora`, under the names of the author's code and with its defaults. Steps are the
/// optimizer's, counted from 0.
struct IncreLoraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "increlora";

  explicit IncreLoraOptions(int64_t target_rank = 16) : target_rank_(target_rank) {}

  /// Mean rank of the matrices at the end, at least `rank`.
  TORCH_ARG(int64_t, target_rank);
  /// Sum of the ranks at the end, instead of `target_rank` times the number of layers.
  TORCH_ARG(std::optional<int64_t>, target_total_rank) = {};
  /// Rank of every matrix at the start (`lora_r`), at least 1.
  TORCH_ARG(int64_t, rank) = 1;
  /// α; 0: the rank at the start. Published runs: 16 or 32.
  TORCH_ARG(double, alpha) = 16.0;
  /// Rate of dropout on the adapter's input, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// Layers that grow at once, at least 1; all of them where there are fewer.
  TORCH_ARG(int64_t, top_h) = 10;
  /// δ, ranks a layer grows by, at least 1. By default 1, 2, 3, 4 for a `target_rank` of 2, 4, 6, 8; to be
  /// given for any other. With more than 1, the last growth can overshoot the target, as published runs did.
  TORCH_ARG(std::optional<int64_t>, incre_rank_num) = {};
  /// Steps before the first growth, which is at the first multiple of `incre_interval` above it.
  TORCH_ARG(int64_t, init_warmup) = 4500;
  /// Steps from one growth to the next.
  TORCH_ARG(int64_t, incre_interval) = 10;
  /// Reserve A and B train before they are activated.
  TORCH_ARG(bool, advance_learn) = true;
  /// Each growth begins the learning rate's schedule anew, with the steps that are left; else it keeps the
  /// optimizer's full rate to the end.
  TORCH_ARG(bool, multi_lr) = true;
  /// Weight λ of the orthogonality penalty. Published runs: 0.1 or 0.3.
  TORCH_ARG(double, reg_orth_coef) = 0.0;
  /// The penalty couples the chunks of a layer, as the author's trainer does; else every chunk is to be
  /// orthogonal by itself, as in his library.
  TORCH_ARG(bool, couple_chunks) = true;
  /// Decay of the smoothed score, in (0, 1).
  TORCH_ARG(double, beta1) = 0.85;
  /// Decay of the smoothed uncertainty, in (0, 1).
  TORCH_ARG(double, beta2) = 0.85;
  /// False: where a model also calls an adapted layer on relative positions (`forward_positions`: DeBERTa's
  /// shared projections), those see the base alone.
  TORCH_ARG(bool, adapt_positions) = true;
};

namespace internal {

/// δ where none is given; 0: there is no default.
inline int64_t default_growth(int64_t target_rank) {
  return target_rank % 2 == 0 && target_rank >= 2 && target_rank <= 8 ? target_rank / 2 : 0;
}

/// The identity on a tensor whose backward leaves s = Σ |ΔW ⊙ G| / √(in·out) in `score`, G = ∂loss/∂ΔW.
/// `value`: ΔW, with `input` undefined and G its gradient; or x ΔWᵀ, with `input` x and G = gradientᵀ x. So
/// neither ΔW nor G outlives its layer's backward, and the forward needs no ΔW at all.
struct ScoreProbe : torch::autograd::Function<ScoreProbe> {
  /// `factors`: input, A ⊙ E, B.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& value,
                        const torch::autograd::variable_list& factors, double scaling, const Tensor& score) {
    context->save_for_backward(factors);
    context->saved_data["scaling"] = scaling;
    context->saved_data["score"] = score;
    return value;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &A = saved[1], &B = saved[2];
    torch::NoGradGuard no_grad;
    auto G = gradients[0].to(A.scalar_type());
    if (input.defined()) {
      G = at::mm(G.reshape({-1, B.size(0)}).t(), input.reshape({-1, A.size(1)}).to(A.scalar_type()));
    }
    const double factor = context->saved_data["scaling"].toDouble() / std::sqrt(G.numel());
    context->saved_data["score"].toTensor().copy_(at::mm(B, A).mul_(G).abs_().sum().mul_(std::abs(factor)));
    return {gradients[0], {}, {}, {}};
  }
};

}  // namespace internal

/// IncreLoRA: y = F(x) + s · B (A ⊙ E) dropout(x), s = α / (r + 1e-5), r the active rank; for linear layers.
/// A, E and B are concatenations of chunks: the first of the rank at the start, later ones of rank 1. The
/// last chunks may be a reserve: they do not count in r, their E is frozen (1e-5, or 0 without
/// `advance_learn`).
/// Formula: W′ = W + s · B (A ⊙ E), reserve included.
/// Shapes: lora_A[i]: (ρᵢ, in); lora_E[i]: (ρᵢ, 1); lora_B[i]: (out, ρᵢ).
/// Trains: all chunks but the reserve's E, and its A and B without `advance_learn`. Count: r (in + out + 1);
/// the reserve is in none, as in the author's count (who leaves E out).
/// Throws: c10::ValueError for options out of range; c10::Error when an optimizer left the controller out.
/// Paper: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning,
/// arXiv 2308.12043; numbers and order as in the author's code (github.com/FeiyuZhang98/IncreLoRA).
class IncreLoraImpl : public Piece<IncreLoraImpl, IncreLoraOptions> {
 public:
  IncreLoraImpl(IncreLoraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    guard_.check(*this, {lora_A[0], lora_E[0], lora_B[0]});
    if (const auto fused = fused_forward(x, layer)) return *fused;
    const auto y = layer.forward(x);
    auto input = x.scalar_type() == lora_A[0].scalar_type() ? x : x.to(lora_A[0].scalar_type());
    if (is_training() && options.dropout() > 0) input = torch::dropout(input, options.dropout(), true);
    const auto A = all_A(), B = all_B();
    return y + probed(layer.low_rank(input, A, B) * scaling(), input, A, B);
  }

  std::optional<LowRankTerm> low_rank() const override {
    guard_.check(*this, {lora_A[0], lora_E[0], lora_B[0]});
    const bool one = chunks() == 1;
    LowRankTerm term{one ? lora_A[0] : torch::cat(lora_A),    one ? lora_B[0] : torch::cat(lora_B, 1),
                     one ? lora_E[0] : torch::cat(lora_E),    scaling(),
                     is_training() ? options.dropout() : 0.0, {}};
    if (scored && torch::GradMode::is_enabled()) term.score = score_for(lora_A[0]);
    return term;
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto A = all_A(), B = all_B();
    const auto delta = layer.fold(probed(at::mm(B, A) * scaling(), {}, A, B));
    return {weights.weight + delta.to(weights.weight.scalar_type()), weights.bias};
  }
  std::string not_mergeable() const override {
    return options.adapt_positions() ? ""
                                     : "IncreLoRA with adapt_positions(false) cannot be merged: relative "
                                       "positions need the base alone";
  }
  bool adapts_positions() const override { return options.adapt_positions(); }

  /// A, then B ~ N(0, 0.02); E = 0.
  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    lora_E[0].zero_();
    lora_A[0].normal_(0.0, 0.02);
    lora_B[0].normal_(0.0, 0.02);
  }

  /// Appends `count` reserve chunks, drawn on the CPU as the reference does: for each A, then B.
  void reserve(int64_t count);
  /// Takes `count` ranks of the reserve into use: their E trains from now on.
  void activate(int64_t count) { resize(chunks(), rank_ + count); }
  /// Makes it so many chunks and so much active rank; new chunks are not filled.
  void resize(int64_t chunks, int64_t rank);

  /// Active rank: the divisor of α.
  int64_t rank() const { return rank_; }
  int64_t chunks() const { return static_cast<int64_t>(lora_E.size()); }
  /// A ⊙ E of all chunks: (ranks, in).
  Tensor all_A() const { return torch::cat(lora_A) * torch::cat(lora_E); }
  /// B of all chunks: (out, ranks).
  Tensor all_B() const { return torch::cat(lora_B, 1); }

  bool needs_controller() const override { return true; }
  int64_t trainable() const override {
    return lora_A[0].requires_grad() ? rank_ * (lora_A[0].size(1) + lora_B[0].size(0) + 1) : 0;
  }
  void mark() const override { guard_.mark({lora_A[0], lora_E[0], lora_B[0]}); }
  bool scalable() const override { return true; }
  void set_scale(double factor) override { factor_ = factor; }
  double scale() const { return factor_; }
  /// s, with the adapter's `scale` in it.
  double scaling() const {
    const double alpha = options.alpha() > 0 ? options.alpha() : static_cast<double>(options.rank());
    return factor_ * alpha / (static_cast<double>(rank_) + 1e-5);
  }

  /// Archives hold how much the piece had grown; reading one makes it grow as much.
  void save(torch::serialize::OutputArchive& archive) const override {
    Piece::save(archive);
    archive.write("chunks", c10::IValue(chunks()));
    archive.write("rank", c10::IValue(rank_));
  }
  void load(torch::serialize::InputArchive& archive) override {
    c10::IValue chunks, rank;
    archive.read("chunks", chunks);
    archive.read("rank", rank);
    resize(chunks.toInt(), rank.toInt());
    Piece::load(archive);
    mark();
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "peft::IncreLora(rank=" << rank_ << " of " << chunks() - 1 + options.rank()
           << ", alpha=" << options.alpha() << ", dropout=" << options.dropout() << ")";
  }
  void copy_state(const IncreLoraImpl& other) {
    resize(other.chunks(), other.rank_);
    factor_ = other.factor_;
  }

  std::vector<Tensor> lora_A, lora_E, lora_B;
  bool scored = false;   ///< whether backward records the score
  mutable Tensor score;  ///< of the last backward, a scalar on the piece's device; undefined before

 private:
  Tensor probed(const Tensor& value, const Tensor& input, const Tensor& A, const Tensor& B) const {
    if (!scored || !value.requires_grad()) return value;
    const torch::autograd::variable_list factors{input.defined() ? input.detach() : input, A.detach(),
                                                 B.detach()};
    return internal::ScoreProbe::apply(value, factors, scaling(), score_for(A));
  }
  /// Where a backward leaves the score.
  const Tensor& score_for(const Tensor& like) const {
    if (!score.defined() || score.device() != like.device()) {
      score = torch::zeros({}, like.options().requires_grad(false));
    }
    return score;
  }

  StepGuard guard_;
  int64_t rank_;
  double factor_ = 1.0;
};

/// Throws c10::ValueError, naming the options, if some are out of range.
inline void check(const IncreLoraOptions& options) {
  internal::Problems problems;
  const auto require = [&](bool fits, const std::string& must, auto value) {
    if (!fits) problems.add(must + ", but got " + c10::str(value));
  };
  require(options.rank() > 0, "rank must be positive", options.rank());
  const auto total = options.target_total_rank();
  require(total || options.target_rank() >= options.rank(),
          "target_rank must be at least rank, which is " + std::to_string(options.rank()),
          options.target_rank());
  require(!total || *total > 0, "target_total_rank must be positive", total.value_or(0));
  require(std::isfinite(options.alpha()) && options.alpha() >= 0,
          "alpha must be at least 0 (0: the rank at the start)", options.alpha());
  require(options.dropout() >= 0 && options.dropout() < 1, "dropout must be in [0, 1)", options.dropout());
  require(options.top_h() > 0, "top_h must be positive", options.top_h());
  const auto delta = options.incre_rank_num();
  require(!delta || *delta > 0, "incre_rank_num must be positive", delta.value_or(0));
  if (!delta && internal::default_growth(options.target_rank()) == 0) {
    problems.add("incre_rank_num must be given unless target_rank is 2, 4, 6 or 8, but target_rank is " +
                 std::to_string(options.target_rank()));
  }
  require(options.init_warmup() >= 0, "init_warmup must be at least 0 steps", options.init_warmup());
  require(options.incre_interval() > 0, "incre_interval must be positive", options.incre_interval());
  require(std::isfinite(options.reg_orth_coef()) && options.reg_orth_coef() >= 0,
          "reg_orth_coef must be at least 0", options.reg_orth_coef());
  require(options.beta1() > 0 && options.beta1() < 1, "beta1 must be in (0, 1)", options.beta1());
  require(options.beta2() > 0 && options.beta2() < 1, "beta2 must be in (0, 1)", options.beta2());
  problems.raise("IncreLoraOptions");
}

/// Why a site cannot take IncreLoRA, or an empty string.
inline std::string refusal(const IncreLoraOptions&, const SiteInfo& site) {
  if (site.fan_in.size() == 1 && !site.lookup && site.groups == 1) return {};
  return "a " + site.layer + " takes no IncreLoRA, which is for linear layers";
}

inline std::shared_ptr<PieceImpl> make_piece(const IncreLoraOptions& options, const SiteInfo& site) {
  return std::make_shared<IncreLoraImpl>(options, site);
}

inline IncreLoraImpl::IncreLoraImpl(IncreLoraOptions settings, const SiteInfo& site)
    : Piece(IncreLoraOptions::method, std::move(settings), site), rank_(options.rank()) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "IncreLora: '", site.path, "': ", why);
  lora_A = {register_parameter("lora_A_0", torch::empty({rank_, site.fan_in[0]}))};
  lora_E = {register_parameter("lora_E_0", torch::empty({rank_, 1}))};
  lora_B = {register_parameter("lora_B_0", torch::empty({site.fan_out, rank_}))};
}

inline void IncreLoraImpl::resize(int64_t chunks, int64_t rank) {
  TORCH_CHECK(chunks > 0 && rank >= options.rank() && rank - options.rank() < chunks, "'", site().path,
              "': IncreLoRA expected at least one chunk for each rank, but got ", chunks, " chunks and rank ",
              rank);
  // Chunk by chunk, so that the order of the parameters does not depend on how a piece came to its size.
  for (auto i = this->chunks(); i < chunks; ++i) {
    const auto add = [&](std::vector<Tensor>& list, const char* name, std::vector<int64_t> shape) {
      const auto like = list[0].options().requires_grad(false);
      list.push_back(register_parameter(name + std::to_string(i), torch::empty(shape, like)));
    };
    add(lora_A, "lora_A_", {1, site().fan_in[0]});
    add(lora_E, "lora_E_", {1, 1});
    add(lora_B, "lora_B_", {site().fan_out, 1});
  }
  for (auto i = this->chunks() - 1; i >= chunks; --i) {
    for (const char* name : {"lora_A_", "lora_E_", "lora_B_"}) parameters_.erase(name + std::to_string(i));
    for (auto* list : {&lora_A, &lora_E, &lora_B}) list->pop_back();
  }
  rank_ = rank;
  for (size_t i = 1; i < lora_E.size(); ++i) {
    const bool trains = lora_A[0].requires_grad();
    const bool active = static_cast<int64_t>(i) <= rank - options.rank();
    lora_E[i].set_requires_grad(trains && active);
    for (auto* list : {&lora_A, &lora_B}) {
      (*list)[i].set_requires_grad(trains && (active || options.advance_learn()));
    }
  }
}

inline void IncreLoraImpl::reserve(int64_t count) {
  torch::NoGradGuard no_grad;
  const auto first = static_cast<size_t>(chunks());
  resize(chunks() + count, rank_);
  for (size_t i = first; i < lora_E.size(); ++i) {
    lora_E[i].fill_(options.advance_learn() ? 1e-5 : 0.0);
    for (const auto& tensor : {lora_A[i], lora_B[i]}) {
      const auto drawn = torch::empty(tensor.sizes(), tensor.scalar_type()).normal_(0.0, 0.02);
      Tensor(tensor).copy_(drawn);
    }
  }
}

}  // namespace peft
