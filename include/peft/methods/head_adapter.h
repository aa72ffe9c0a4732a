// Head adapters: a small network beside, or after, each head of a frozen attention.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation_function.h"
#include "peft/core/attention.h"

namespace peft {

/// What a head adapter reads.
enum class HeadInput : std::uint8_t {
  query,   ///< the head's query, (batch, heads, queries, head_width)
  hidden,  ///< what the queries were projected from, (batch, queries, width)
  output,  ///< the head's own output
};

/// Settings of `HeadAdapter`.
struct HeadAdapterOptions {
  static constexpr Needs needs = Needs::attention;
  static constexpr const char* method = "head_adapter";

  /// `size` r: channels of the bottleneck of each head, at least 1.
  explicit HeadAdapterOptions(int64_t size) : size_(size) {}
  TORCH_ARG(int64_t, size);
  /// f: one of `activation_functions`, or "softmax" over the channels, of products scaled as attention's.
  TORCH_ARG(std::string, form) = "relu";
  TORCH_ARG(HeadInput, reads) = HeadInput::query;
  /// Factor s of what is added; finite.
  TORCH_ARG(double, scaling) = 1.0;
  /// A factor that trains, in place of `scaling`; it starts at 1.
  TORCH_ARG(bool, trained_scaling) = false;
  /// h ← (1 − λ) h + λ Δh in place of h + s Δh, λ the share of attention the channels would get among the
  /// keys: what prefix tuning does. With "softmax" on queries.
  TORCH_ARG(bool, convex) = false;
  /// Layers (from 0) without, by their index in their stack.
  TORCH_ARG(std::vector<int64_t>, leave_out) = {};
};

/// Throws c10::ValueError, naming the option, if one is out of range or two contradict each other.
inline void check(const HeadAdapterOptions& options) {
  TORCH_CHECK_VALUE(options.size() > 0, "HeadAdapterOptions: size must be positive, but got ",
                    options.size());
  if (options.form() != "softmax") activation_function(options.form());
  TORCH_CHECK_VALUE(std::isfinite(options.scaling()), "HeadAdapterOptions: scaling must be finite, but got ",
                    options.scaling());
  TORCH_CHECK_VALUE(!options.trained_scaling() || options.scaling() == 1.0,
                    "HeadAdapterOptions: a trained scaling starts at 1, so scaling must be 1, but got ",
                    options.scaling());
  TORCH_CHECK_VALUE(!options.convex() || (options.form() == "softmax" && options.reads() == HeadInput::query),
                    "HeadAdapterOptions: convex needs form softmax on queries, but got form ",
                    options.form());
  TORCH_CHECK_VALUE(!options.convex() || (options.scaling() == 1.0 && !options.trained_scaling()),
                    "HeadAdapterOptions: convex has its own weight λ, so expected no scaling");
  for (const auto layer : options.leave_out()) {
    TORCH_CHECK_VALUE(layer >= 0, "HeadAdapterOptions: leave_out must hold indices of layers, but got ",
                      layer);
  }
}

/// Why a site cannot take head adapters, or an empty string.
inline std::string refusal(const HeadAdapterOptions& options, const SiteInfo& site) {
  if (!site.attention) return "a " + site.layer + " is no attention";
  const auto& out = options.leave_out();
  if (std::find(out.begin(), out.end(), site.attention->layer()) == out.end()) return {};
  return "layer " + std::to_string(site.attention->layer()) + " is left out (leave_out)";
}

/// Every attention that is not left out.
inline bool goes_to(const HeadAdapterOptions& options, const SiteInfo& site) {
  return refusal(options, site).empty();
}

/// Head adapters: Δh = f(x Dᵀ) U for each head, h ← h + s Δh, or (1 − λ) h + λ Δh. With `convex` they are
/// prefix tuning: D the prefix's keys, U its values; written out here, where `Prefix` puts them before the
/// real ones. Shapes: down: (heads, size, width of what is read); up: (heads, size, head_width); scale: (1).
/// Trains: all of them. D starts as nn::Linear's weight, U at 0, so that h does not change; with `convex`
/// both N(0, 1). Throws: c10::ValueError for options out of range. Paper: Towards a Unified View of
/// Parameter-Efficient Transfer Learning, arXiv 2110.04366, equations 6 to 8 and table 1 (multi-head parallel
/// adapter).
class HeadAdapterImpl : public Piece<HeadAdapterImpl, HeadAdapterOptions, AttentionPieceImpl> {
 public:
  HeadAdapterImpl(HeadAdapterOptions settings, const SiteInfo& site)
      : Piece(HeadAdapterOptions::method, std::move(settings), site) {
    check(options);
    const auto why = refusal(options, site);
    TORCH_CHECK_VALUE(why.empty(), "HeadAdapter: '", site.path, "': ", why);
    if (options.form() != "softmax") activation_ = activation_function(options.form());
    const auto heads = site.attention->heads(), width = site.attention->head_width();
    const auto in = options.reads() == HeadInput::hidden ? heads * width : width;
    down = register_parameter("down", torch::empty({heads, options.size(), in}));
    up = register_parameter("up", torch::empty({heads, options.size(), width}));
    if (options.trained_scaling()) scale = register_parameter("scale", torch::ones({1}));
  }

  Tensor heads(const Tensor& outputs, const AttentionInputs& in) override {
    const auto type = down.scalar_type();
    const auto x = read(outputs, in).to(type);
    auto products = at::matmul(x, down.transpose(-2, -1));
    if (!activation_) products = products / std::sqrt(static_cast<double>(site().attention->head_width()));
    const auto f = activation_ ? activation_(products) : products.softmax(-1);
    const auto change = at::matmul(f, up);
    if (options.convex()) {
      const auto share = (products.logsumexp(-1, /*keepdim=*/true) - real_logits(in)).sigmoid();
      return ((1 - share) * outputs + share * change).to(outputs.scalar_type());
    }
    const auto scaled = scale.defined() ? change * scale : change * options.scaling();
    return outputs + scaled.to(outputs.scalar_type());
  }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    if (options.convex()) {
      down.normal_();
      up.normal_();
      return;
    }
    const auto bound = 1.0 / std::sqrt(static_cast<double>(down.size(2)));
    down.uniform_(-bound, bound);
    up.zero_();
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::HeadAdapter(size=" << options.size() << ", " << options.form()
           << (options.convex() ? ", convex" : "") << ")";
  }

  Tensor down, up;
  Tensor scale;  ///< undefined unless it trains

 private:
  Tensor read(const Tensor& outputs, const AttentionInputs& in) const {
    switch (options.reads()) {
      case HeadInput::query:
        return in.q;
      case HeadInput::output:
        return outputs;
      case HeadInput::hidden:
        break;
    }
    TORCH_CHECK(in.hidden.defined(), "HeadAdapter: '", site().path,
                "' reads hidden states, but the model does not hand them to Attention::forward");
    return in.hidden.unsqueeze(1);
  }

  /// log Σ exp of the attention's own products, (batch, heads, queries, 1).
  Tensor real_logits(const AttentionInputs& in) const {
    const auto& attention = *site().attention;
    const auto k = internal::for_each_query_head(in.k, attention);
    auto products =
        at::matmul(in.q, k.transpose(-2, -1)) / std::sqrt(static_cast<double>(attention.head_width()));
    const auto bias = internal::whole_bias(in, attention);
    if (bias.defined()) products = products + bias;
    return products.logsumexp(-1, /*keepdim=*/true).to(down.scalar_type());
  }
  ActivationFunction activation_ = nullptr;  ///< without "softmax"
};

inline std::shared_ptr<PieceImpl> make_piece(const HeadAdapterOptions& options, const SiteInfo& site) {
  return std::make_shared<HeadAdapterImpl>(options, site);
}

}  // namespace peft
