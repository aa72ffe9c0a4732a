// Prefix tuning: trained keys and values before those of the tokens, in every layer; P-tuning v2 is one.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/attention.h"
#include "peft/core/input.h"
#include "peft/core/shared.h"
#include "peft/methods/draws.h"
#include "peft/methods/prefix_table.h"
#include "peft/methods/probes.h"

namespace peft {

/// Prefix tuning: attention over [P_k; K] and [P_v; V], P_k and P_v of the adapter's `PrefixTable`. Every
/// query sees the prefix; a cache holds it. With gates: P_k · mean(σ(h G₀ᵀ + b₀)) and P_v · mean(σ(h G₁ᵀ +
/// b₁)) over the time of the hidden states h. Grouped-query layers get a prefix of their kv_heads.
/// Shapes: gate_weight: (gates, width of h); gate_bias: (gates).
/// Trains: the table (or its vectors and network) and the gates. Count: V · layers · 2 · kv_heads ·
/// head_width; with a network V d + (d h + h) + (h n + n), n = layers · 2 · kv_heads · head_width; gates
/// layers · gates · (width + 1).
/// Throws: c10::ValueError for options out of range, and for layers of different shapes.
/// Paper: Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190, §4. References:
/// Hugging Face PEFT, AdapterHub (`PrefixOptions::adapterhub`), the authors' code of P-tuning v2.
class PrefixImpl : public Piece<PrefixImpl, PrefixOptions, AttentionPieceImpl> {
 public:
  PrefixImpl(PrefixOptions settings, const SiteInfo& site);

  void extend(AttentionInputs& in) override {
    const auto batch = in.k.size(0);
    const auto all = table().keys_and_values(batch, in.k.scalar_type());
    auto k = all[static_cast<size_t>(2 * index)], v = all[static_cast<size_t>(2 * index + 1)];
    if (gate_weight.defined()) {
      TORCH_CHECK(in.hidden.defined(), "Prefix: '", site().path,
                  "' has gates, but the model does not hand its hidden states to Attention::forward");
      const auto h = in.hidden.to(gate_weight.scalar_type());
      const auto gate = at::linear(h, gate_weight, gate_bias).sigmoid().mean(1).to(k.scalar_type());
      k = k * gate.select(1, 0).view({-1, 1, 1, 1});
      v = v * gate.select(1, -1).view({-1, 1, 1, 1});
    }
    in.k = torch::cat({k.expand({batch, -1, -1, -1}), in.k}, 2);
    in.v = torch::cat({v.expand({batch, -1, -1, -1}), in.v}, 2);
  }

  bool lengthens() const override { return true; }

  /// Numbers the layers of each role, in the model's order.
  std::shared_ptr<SharedImpl> make_shared_part(
      const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override;

  void initialize(const LayerView&) override {
    if (!gate_weight.defined()) return;
    torch::NoGradGuard no_grad;
    internal::draw_gate(gate_weight, gate_bias);
  }

  void place() override { internal::place_in_float32(*this, site()); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Prefix(length=" << options.length() << ", layer=" << index << ")";
  }
  void copy_state(const PrefixImpl& other) { index = other.index; }

  /// The table this layer reads.
  PrefixTable& table() const {
    TORCH_CHECK(shared() != nullptr, "Prefix: '", site().path,
                "' has no table, as after Module::clone (hint: copy models with peft::clone)");
    return *static_cast<const PrefixTables&>(*shared()).at(site().attention->role());
  }

  int64_t index = 0;  ///< of this layer in its table
  Tensor gate_weight, gate_bias;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const PrefixOptions& options) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    TORCH_CHECK_VALUE(value >= least, "PrefixOptions: ", name, " must be at least ", least, ", but got ",
                      value);
  };
  at_least("length", options.length(), 1);
  at_least("hidden_width", options.hidden_width(), 0);
  at_least("vector_width", options.vector_width(), 0);
  for (const auto layer : options.leave_out()) at_least("leave_out", layer, 0);
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "PrefixOptions: dropout must be in [0, 1), but got ", options.dropout());
  TORCH_CHECK_VALUE(options.gates() >= 0 && options.gates() <= 2,
                    "PrefixOptions: gates must be 0, 1 or 2, but got ", options.gates());
  TORCH_CHECK_VALUE(options.projection() || !options.folded(),
                    "PrefixOptions: folded is for a prefix with projection, but got one without");
  activation_function(options.activation());
}

/// Why a site cannot take a prefix, or an empty string.
inline std::string refusal(const PrefixOptions& options, const SiteInfo& site) {
  if (!site.attention) return "a " + site.layer + " is no attention, which a prefix is for";
  const auto& out = options.leave_out();
  if (std::find(out.begin(), out.end(), site.attention->layer()) == out.end()) return {};
  return "layer " + std::to_string(site.attention->layer()) + " is left out (leave_out)";
}

/// Every attention that is not left out.
inline bool goes_to(const PrefixOptions& options, const SiteInfo& site) {
  return refusal(options, site).empty();
}

inline std::shared_ptr<PieceImpl> make_piece(const PrefixOptions& options, const SiteInfo& site) {
  return std::make_shared<PrefixImpl>(options, site);
}

inline PrefixImpl::PrefixImpl(PrefixOptions settings, const SiteInfo& site)
    : Piece(PrefixOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Prefix: '", site.path, "': ", why);
  if (options.gates() == 0) return;
  const auto width = site.attention->heads() * site.attention->head_width();
  gate_weight = register_parameter("gate_weight", torch::empty({options.gates(), width}));
  gate_bias = register_parameter("gate_bias", torch::empty({options.gates()}));
}

inline std::shared_ptr<SharedImpl> PrefixImpl::make_shared_part(
    const std::vector<std::shared_ptr<PieceImpl>>& pieces) const {
  struct Group {
    const PrefixImpl* first;
    int64_t layers = 0;
  };
  std::map<AttentionRole, Group> groups;
  for (const auto& piece : pieces) {
    auto& prefix = static_cast<PrefixImpl&>(*piece);
    auto& group = groups.emplace(prefix.site().attention->role(), Group{&prefix}).first->second;
    const auto &one = *group.first->site().attention, &other = *prefix.site().attention;
    TORCH_CHECK_VALUE(one.kv_heads() == other.kv_heads() && one.head_width() == other.head_width(),
                      "the layers of a prefix must have keys of one shape, but '", group.first->site().path,
                      "' has ", one.kv_heads(), " heads of ", one.head_width(), " and '", prefix.site().path,
                      "' ", other.kv_heads(), " of ", other.head_width(), " (hint: make them two adapters)");
    prefix.index = group.layers++;
  }
  auto tables = std::make_shared<PrefixTables>();
  for (const auto& [role, group] : groups) tables->add(options, *group.first->site().attention, group.layers);
  return tables;
}

/// Settings of what a prefix puts where tokens enter, so that their positions begin after it.
struct PrefixPositionsOptions {
  static constexpr Needs needs = Needs::input;
  static constexpr const char* method = "prefix_positions";

  explicit PrefixPositionsOptions(int64_t length) : length_(length) {}
  /// Of the prefix.
  TORCH_ARG(int64_t, length);
  /// The prefix's.
  TORCH_ARG(bool, keeps_types) = false;
};

/// Moves the positions of the tokens by a prefix's length, as Hugging Face's models do for its keys. Types
/// are dropped unless something keeps them (`PrefixOptions::keeps_types`).
class PrefixPositionsImpl : public Piece<PrefixPositionsImpl, PrefixPositionsOptions, InputPieceImpl> {
 public:
  PrefixPositionsImpl(PrefixPositionsOptions settings, const SiteInfo& site)
      : Piece(PrefixPositionsOptions::method, std::move(settings), site) {}

  Embedded embed(Embedded in) override {
    const auto V = options.length();
    const auto padding = site().input ? site().input->padding_position() : std::nullopt;
    if (!options.keeps_types() && !(site().input && site().input->keeps_types())) in.types = Tensor();
    if (in.positions.defined() && padding) {  // which stays where it is
      in.positions = torch::where(in.positions == *padding, in.positions, in.positions + V);
    } else if (in.positions.defined()) {
      in.positions = in.positions + V;
    } else if (in.past == 0) {  // later the model counts on from the cache, which holds the prefix
      const auto first = padding ? *padding + 1 : V;  // such models count vectors without what is cached
      const auto ids = torch::TensorOptions(torch::kLong).device(in.values.device());
      in.positions = torch::arange(first, first + in.values.size(1), ids).unsqueeze(0);
    }
    return in;
  }
  void initialize(const LayerView&) override {}
};

/// What a prefix puts elsewhere, if it does.
inline std::optional<PrefixPositionsOptions> companion(const PrefixOptions& options) {
  if (!options.shift_positions()) return std::nullopt;
  return PrefixPositionsOptions(options.length()).keeps_types(options.keeps_types());
}

/// Why a site is not where positions are given, or an empty string.
inline std::string refusal(const PrefixPositionsOptions&, const SiteInfo& site) {
  if (site.input && !site.input->embedded()) return {};
  return "a " + site.layer + " comes after the positions, or has none";
}

inline std::shared_ptr<PieceImpl> make_piece(const PrefixPositionsOptions& options, const SiteInfo& site) {
  return std::make_shared<PrefixPositionsImpl>(options, site);
}

/// Starts a prefix from the keys and values that the model itself, without any adapter, gives real tokens.
/// `run` runs it on one text of as many tokens as the prefix is long. Paper: arXiv 2101.00190, §7.4, where it
/// is better on little data.
/// Throws: c10::ValueError for an adapter without a plain prefix; c10::Error for a text of another length.
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::PrefixOptions(3), "table");
/// peft::initialize_prefix(*model, adapter, [&] { model->forward({ids_of_three_words}); });
/// ```
inline void initialize_prefix(nn::Module& model, const Adapter& adapter, const std::function<void()>& run) {
  class Recorder final : public AttentionPieceImpl {
   public:
    Recorder(SiteInfo site, AttentionInputs& seen)
        : AttentionPieceImpl("probe", std::move(site)), seen_(seen) {}
    void extend(AttentionInputs& in) override { seen_ = in; }
    void initialize(const LayerView&) override {}
    std::shared_ptr<PieceImpl> copy() const override { return std::make_shared<Recorder>(site(), seen_); }

   private:
    AttentionInputs& seen_;
  };
  torch::NoGradGuard no_grad;
  const auto layers = adapter.layers<PrefixImpl>();
  TORCH_CHECK_VALUE(!layers.empty() && !layers.front()->options.projection(), "initialize_prefix: '",
                    adapter.name(),
                    "' must have a prefix without projection, whose keys and values train as they are");
  std::vector<AttentionInputs> seen(layers.size());
  {
    internal::Probes probes(model, /*training=*/false);
    size_t next = 0;
    for (const auto& entry : adapter.entries()) {
      if (!std::dynamic_pointer_cast<PrefixImpl>(entry.piece)) continue;
      probes.add(entry.site, std::make_shared<Recorder>(entry.site->info(), seen[next++]));
    }
    run();
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& table = layers[i]->table();
    const std::vector<int64_t> expected{1, table.attention.kv_heads(), table.options.length(),
                                        table.attention.head_width()};
    TORCH_CHECK(seen[i].k.defined() && seen[i].k.sizes() == c10::IntArrayRef(expected),
                "initialize_prefix: the text must have ", table.options.length(),
                " tokens, one for each of the prefix, but '", layers[i]->site().path, "' saw keys of ",
                seen[i].k.defined() ? internal::shape_text(seen[i].k.sizes()) : "no text");
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& table = layers[i]->table();
    const auto keys = seen[i].k[0].transpose(0, 1), values = seen[i].v[0].transpose(0, 1);  // (V, H, D)
    const auto rows = table.embedding.view({keys.size(0), table.layers, 2, keys.size(1), keys.size(2)})
                          .select(1, layers[i]->index);
    rows.select(1, 0).copy_(keys);
    rows.select(1, 1).copy_(values);
  }
  adapter.accept_changes();
}

}  // namespace peft
