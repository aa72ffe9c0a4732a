// DoRA: learns the length of each row of W + ΔW apart from its direction.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/arg.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/piece.h"
#include "peft/kernels/kept.h"
#include "peft/kernels/row_norms.h"
#include "peft/kernels/scale_columns.h"
#include "peft/methods/lora.h"

namespace peft {

/// Settings of `Dora`: those of the LoRA it learns directions with.
///
/// Example:
/// ```
/// peft::add_adapter(*model, peft::DoraOptions(peft::LoraOptions(8).alpha(16)), peft::named({"query"}));
/// ```
struct DoraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "dora";

  explicit DoraOptions(int64_t rank = 8) : lora_(rank) {}
  explicit DoraOptions(LoraOptions lora) : lora_(std::move(lora)) {}

  /// `lora_bias`, `gating` and `LoraInit::mica` are refused.
  TORCH_ARG(LoraOptions, lora);
};

/// DoRA: W′ = m / ‖V‖ ⊙ V, V = W + s · B A, a norm for each output, m as long as W's at the start.
/// Formula: y = F(x) + (c − 1) ⊙ (F(x) − b) + c ⊙ s B A x, c = m / ‖V‖. The norm, always of the untouched
/// base with this adapter, is a constant to the gradient (§4.3 of the paper). Where LoRA's dropout is active,
/// the term F(x) − b is W dropout(x), with the untouched W: as Hugging Face's code has it. `Adapter::scale`
/// changes s, as there, so a scale of 0 leaves m / ‖W‖ ⊙ W. Shapes: lora_magnitude_vector: (fan_out), for a
/// convolution (1, fan_out, *ones); `lora`: see `LoraImpl`. Trains: lora_magnitude_vector, lora.lora_A,
/// lora.lora_B. Count for a linear layer: r (in + out) + out. Throws: c10::ValueError for options out of
/// range; c10::Error in a batch of mixed adapters (`RowAdapters`). Paper: DoRA: Weight-Decomposed Low-Rank
/// Adaptation, arXiv 2402.09353, equations 5 and 11.
class DoraImpl : public Piece<DoraImpl, DoraOptions> {
 public:
  DoraImpl(DoraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    TORCH_CHECK(!RowAdapters::current(), "RowAdapters: '", site().path,
                "' carries DoRA, which cannot take part in a batch of mixed adapters (hint: merge it, or one "
                "adapter a batch)");
    if (const auto fused = fused_forward(x, layer)) return *fused;
    const auto y = lora->start_forward(x, layer);
    const auto input = lora->cast(x);
    const auto c = lora->per_channel(ratio(kept_norm(layer.base())));
    if (lora->drops()) {
      const auto dropped = torch::dropout(input, options.lora().dropout(), true);
      const auto W = start_weight(layer.base()).to(dropped.scalar_type());
      const auto product = layer.base().apply(dropped, {W, {}});
      const auto result = y + ((c - 1) * product + c * lora->update(dropped, layer));
      return lora->lora_A_0.defined() ? result + lora->undropped(input, dropped, layer) : result;
    }
    const auto bias = site().has_bias() ? layer.weights().bias : Tensor();
    const auto product = bias.defined() ? y - lora->per_channel(bias) : y;
    return y + ((c - 1) * product + c * lora->update(input, layer));
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto start = lora->start_weights(weights, layer);
    auto c = ratio(norm(layer.base()));
    if (outputs_last()) {
      c = c.view({1, -1});
    } else {
      std::vector<int64_t> shape(site().weight_shape.size(), 1);
      shape[0] = -1;
      c = c.view(shape);
    }
    return {(c * (start.weight + lora->delta(layer))).to(start.weight.scalar_type()), weights.bias};
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    lora->initialize(base);
    // In the type of W or a wider one, so that c is 1 to the last bit where that is possible.
    lora_magnitude_vector.set_data(norm(base).view(lora_magnitude_vector.sizes()));
  }
  void place() override {
    Piece::place();
    lora->place();
  }

  bool scalable() const override { return true; }
  void set_scale(double factor) override { lora->set_scale(factor); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Dora(rank=" << lora->rank << ", alpha=" << lora->alpha
           << ", dropout=" << options.lora().dropout() << ")";
  }
  void copy_state(const DoraImpl& other) { lora->copy_state(*other.lora); }

  std::shared_ptr<LoraImpl> lora;
  Tensor lora_magnitude_vector;

 private:
  /// True if the weight is stored with its outputs along the second dimension.
  bool outputs_last() const { return site().lookup || site().fan_in_fan_out; }
  Tensor start_weight(const LayerView& base) const {
    return lora->start_weights(base.weights(), base).weight;
  }

  /// ‖W + ΔW‖ for each output, of the untouched W.
  Tensor norm(const LayerView& base) const {
    torch::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // it may be kept
    const auto W = start_weight(base);
    const auto V = W + lora->delta(base).to(W.device());
    std::vector<int64_t> inputs;
    for (int64_t i = 0; i < V.dim(); ++i) {
      if (i != (outputs_last() ? 1 : 0)) inputs.push_back(i);
    }
    return torch::norm(V, 2, inputs);
  }
  /// The same, kept while neither W nor the factors nor s change.
  Tensor kept_norm(const LayerView& base) const {
    if (!FastPaths::enabled()) return norm(base);
    const auto W = start_weight(base);
    const std::vector<Tensor> sources{W, lora->lora_A, lora->lora_B, lora->lora_A_0, lora->lora_B_0};
    return norm_.of(sources, lora->scaling(), [&] {
      const auto linear = base.plain_linear();
      const auto A = lora->full_A(), B = lora->full_B();
      if (!linear || lora->loftq_weight.defined() || !row_norms_.fits(linear->weight, A, B))
        return norm(base);
      return row_norms_.of(linear->weight, A, B, lora->scaling());
    });
  }
  /// c.
  Tensor ratio(const Tensor& length) const { return lora_magnitude_vector.view(-1) / length; }

  /// y = c ⊙ (W + s B A) x + b on a linear layer, in nodes with gradients of their own; nothing where they do
  /// not fit. Under dropout y = (W (x − dropout(x)) + b) + c ⊙ (W + s B A) dropout(x).
  std::optional<Tensor> fused_forward(const Tensor& x, const LayerView& layer) const {
    auto linear = FastPaths::enabled() ? layer.plain_linear() : std::nullopt;
    auto term = linear ? lora->low_rank() : std::nullopt;
    if (!term) return {};
    const auto bias = linear->bias;
    const PlainLinear product{linear->weight, {}};
    const bool drops = std::exchange(term->dropout, 0.0) > 0;
    const std::vector<internal::LowRankLinear> layers{{product, std::move(term)}};
    if (!internal::low_rank_linear_fits(x, layers)) return {};
    const auto c = ratio(kept_norm(layer.base()));
    const auto run = [&](const Tensor& input, const Tensor& rest) {
      const auto P = internal::low_rank_linear(input, layers)->front();
      return internal::scaled_columns(P, c, rest).to(x.scalar_type());
    };
    if (!drops) return run(x, bias);
    const auto dropped = torch::dropout(x, options.lora().dropout(), true);
    return run(dropped, at::linear(x - dropped, linear->weight, bias));
  }

  internal::RowNorms row_norms_;
  internal::Kept norm_;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const DoraOptions& options) {
  check(options.lora());
  TORCH_CHECK_VALUE(!options.lora().lora_bias(), "DoraOptions: lora_bias must be false, but got true");
  TORCH_CHECK_VALUE(!options.lora().gating(), "DoraOptions: gating must be false, but got true");
  TORCH_CHECK_VALUE(options.lora().init() != LoraInit::mica,
                    "DoraOptions: init must not be mica, whose B is frozen, but got mica");
}

/// Why a site cannot take DoRA, or an empty string.
inline std::string refusal(const DoraOptions& options, const SiteInfo& site) {
  if (site.groups > 1) {
    return "a " + site.layer + " of " + std::to_string(site.groups) +
           " groups has no DoRA: the product B A has not the weight's shape (hint: LoRA)";
  }
  if (site.bare) return "a " + site.layer + " without a layer has no DoRA (hint: LoRA)";
  return refusal(options.lora(), site);
}

inline std::shared_ptr<PieceImpl> make_piece(const DoraOptions& options, const SiteInfo& site) {
  return std::make_shared<DoraImpl>(options, site);
}

inline DoraImpl::DoraImpl(DoraOptions settings, const SiteInfo& site)
    : Piece(DoraOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Dora: '", site.path, "': ", why);
  lora = register_module("lora", std::make_shared<LoraImpl>(options.lora(), site));
  std::vector<int64_t> shape{site.fan_out};
  if (site.fan_in.size() > 1) {
    shape.assign(site.weight_shape.size(), 1);
    shape[1] = site.fan_out;
  }
  lora_magnitude_vector = register_parameter("lora_magnitude_vector", torch::empty(shape));
}

}  // namespace peft
