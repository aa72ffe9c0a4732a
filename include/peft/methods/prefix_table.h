// PrefixTable: the keys and values that prefix tuning puts before those of the tokens, of all layers at once.
#pragma once

#include <torch/arg.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/activation_function.h"
#include "peft/core/attention_options.h"
#include "peft/core/shared.h"
#include "peft/methods/draws.h"

namespace peft {

/// How a prefix starts.
enum class PrefixInit : std::uint8_t {
  normal,  ///< as PyTorch's layers do: vectors N(0, 1), a network's layers U(±1/√in)
  small,   ///< as transformers fills what a checkpoint lacks: N(0, 0.02²), biases 0
  zero,    ///< the same draws as `normal`, then keys and values of 0; the attention still shifts to them
};

/// Settings of `Prefix`. Defaults are Hugging Face PEFT's; `p_tuning_v2` and `adapterhub` make others.
struct PrefixOptions {
  static constexpr Needs needs = Needs::attention;
  static constexpr const char* method = "prefix";

  /// `length` V: keys and values a layer gets, at least 1.
  explicit PrefixOptions(int64_t length) : length_(length) {}
  TORCH_ARG(int64_t, length);
  /// Make the keys and values from V vectors by a network, Linear, activation, Linear, instead of training
  /// them as they are.
  TORCH_ARG(bool, projection) = false;
  /// Between the network's layers; 0: as wide as a layer's keys (kv_heads · head_width).
  TORCH_ARG(int64_t, hidden_width) = 0;
  /// Of the vectors the network starts from; 0: as wide as a layer's keys.
  TORCH_ARG(int64_t, vector_width) = 0;
  /// The network's, one of `activation_functions`.
  TORCH_ARG(std::string, activation) = "tanh";
  TORCH_ARG(PrefixInit, init) = PrefixInit::normal;
  /// Rate of dropout on all keys and values at once, drawn for every text on its own, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// Trained gates in [0, 1] at each layer, from the mean over what it attends to, padding included
  /// (UniPELT): 0, 1 for both keys and values, or 2. A gate looks at the tokens after a query too.
  TORCH_ARG(int64_t, gates) = 0;
  /// Layers (from 0) that get no prefix, by their index in their stack.
  TORCH_ARG(std::vector<int64_t>, leave_out) = {};
  /// Count the prefix as positions: the first real token is at V.
  TORCH_ARG(bool, shift_positions) = true;
  /// Whether token types stay as they are; else they are dropped where the model has no task that keeps them
  /// (`InputOptions::keeps_types`), as Hugging Face PEFT does.
  TORCH_ARG(bool, keeps_types) = false;
  /// The table a network has made, without the network: what PEFT's files hold. For inference.
  TORCH_ARG(bool, folded) = false;

 public:
  /// P-tuning v2 as its authors train it. Paper: P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning
  /// Universally Across Scales and Tasks, arXiv 2110.07602. With a network: `.projection(true)`.
  static PrefixOptions p_tuning_v2(int64_t length = 4) {
    return PrefixOptions(length).hidden_width(512).init(PrefixInit::small).dropout(0.1).keeps_types(true);
  }
  /// AdapterHub's `PrefixTuningConfig`; its `flat` is `.projection(false)`.
  static PrefixOptions adapterhub(int64_t length = 30) {
    return PrefixOptions(length).projection(true).hidden_width(512).shift_positions(false);
  }
};

/// The keys and values of the attentions of one role. Row v of its matrix holds token v's, of layer after
/// layer: keys of all heads, then values. Shapes: embedding (V, layers · 2 · kv_heads · head_width); with a
/// network (V, vector_width), first (hidden_width, vector_width), second (layers · 2 · kv_heads · head_width,
/// hidden_width), each with a bias.
class PrefixTable : public nn::Module {
 public:
  PrefixTable(PrefixOptions settings, AttentionOptions shape, int64_t layers_at_role)
      : nn::Module("PrefixTable"),
        options(std::move(settings)),
        attention(shape),
        layers(layers_at_role),
        activation_(activation_function(options.activation())) {
    const auto keys = attention.kv_heads() * attention.head_width(), width = layers * 2 * keys;
    const auto or_keys = [keys](int64_t given) { return given > 0 ? given : keys; };
    if (options.folded() || !options.projection()) {
      const auto table = torch::empty({options.length(), width});
      embedding =
          options.folded() ? register_buffer("embedding", table) : register_parameter("embedding", table);
      return;
    }
    const auto hidden = or_keys(options.hidden_width()), in = or_keys(options.vector_width());
    embedding = register_parameter("embedding", torch::empty({options.length(), in}));
    first = register_parameter("first", torch::empty({hidden, in}));
    first_bias = register_parameter("first_bias", torch::empty({hidden}));
    second = register_parameter("second", torch::empty({width, hidden}));
    second_bias = register_parameter("second_bias", torch::empty({width}));
  }

  /// All keys and values, (V, layers · 2 · kv_heads · head_width).
  Tensor matrix() const {
    if (!first.defined()) return embedding;
    return at::linear(activation_(at::linear(embedding, first, first_bias)), second, second_bias);
  }

  /// Keys of layer 0, its values, keys of layer 1, …; each (1, kv_heads, V, head_width), or one a text where
  /// dropout makes them differ. Made once a forward.
  std::vector<Tensor> keys_and_values(int64_t batch, torch::ScalarType type) const {
    const bool drops = is_training() && options.dropout() > 0;
    return ForwardScope::once(this, drops ? batch : 1, [&] {
      auto all = matrix().to(type).view(
          {1, options.length(), layers * 2, attention.kv_heads(), attention.head_width()});
      if (drops) all = torch::dropout(all.expand({batch, -1, -1, -1, -1}), options.dropout(), true);
      return all.permute({2, 0, 3, 1, 4}).unbind(0);
    });
  }

  void initialize() {
    const bool small = options.init() == PrefixInit::small;
    const auto draw_layer = [small](Tensor weight, Tensor bias) {
      if (!small) return internal::draw_linear(weight, bias);
      weight.normal_(0, 0.02);
      bias.zero_();
    };
    embedding.normal_(0, small ? 0.02 : 1);
    if (first.defined()) {
      draw_layer(first, first_bias);
      draw_layer(second, second_bias);
    }
    if (options.init() != PrefixInit::zero) return;
    (first.defined() ? second : embedding).zero_();
    if (first.defined()) second_bias.zero_();
  }

  PrefixOptions options;
  AttentionOptions attention;  ///< of any layer: what they have in common
  int64_t layers;
  Tensor embedding, first, first_bias, second, second_bias;

 private:
  ActivationFunction activation_;
};

/// The tables of an adapter, one for each role its attentions have.
class PrefixTables : public SharedImpl {
 public:
  PrefixTables() : SharedImpl("PrefixTables") {}

  void add(const PrefixOptions& options, const AttentionOptions& attention, int64_t layers) {
    auto& table = tables_.at(static_cast<size_t>(attention.role()));
    table = register_module(names.at(static_cast<size_t>(attention.role())),
                            std::make_shared<PrefixTable>(options, attention, layers));
  }
  /// The one of a role, or nullptr.
  const std::shared_ptr<PrefixTable>& at(AttentionRole role) const {
    return tables_.at(static_cast<size_t>(role));
  }
  /// Those there are.
  std::vector<std::shared_ptr<PrefixTable>> all() const {
    std::vector<std::shared_ptr<PrefixTable>> found;
    for (const auto& table : tables_) {
      if (table) found.push_back(table);
    }
    return found;
  }

  /// After the gates, as AdapterHub draws.
  int turn() const override { return 1; }
  void initialize() override {
    torch::NoGradGuard no_grad;
    for (const auto& table : all()) table->initialize();
  }

  /// float32 as in the references, whatever the base's half type; float64 in a model of that.
  void place(const SiteInfo& site) override { internal::place_in_float32(*this, site); }

  std::shared_ptr<SharedImpl> copy() const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<PrefixTables>();
    for (const auto& table : all()) result->add(table->options, table->attention, table->layers);
    internal::copy_tensors(*this, *result);
    result->train(is_training());
    return result;
  }

 private:
  static constexpr std::array<const char*, 3> names{"encoder", "decoder", "cross"};
  std::array<std::shared_ptr<PrefixTable>, 3> tables_;
};

}  // namespace peft
