// AdaLoraFormat: AdaLoRA in Hugging Face PEFT's files (peft_type ADALORA).
#pragma once

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/peft_format.h"
#include "peft/methods/adalora.h"

namespace peft::internal {

/// Once ranks have been masked, the config's `rank_pattern` says which of the initial ranks of each layer are
/// left, and the tensors hold those only; the scale keeps the initial rank.
class AdaLoraFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "ADALORA"; }
  std::string title() const override { return "AdaLoRA"; }
  nlohmann::json defaults() const override {
    auto json = lora_defaults();
    json.update(nlohmann::json::parse(R"({
      "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": null,
      "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": null})"));
    return json;
  }
  std::string bias_of_targets() const override { return "lora_only"; }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const AdaLoraImpl*>(&piece) != nullptr;
  }

  std::set<std::string> unknown_layers() const override { return {"Conv1d", "Conv3d"}; }

  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& adalora = static_cast<const AdaLoraImpl&>(piece);
    auto A = adalora.lora_A, B = adalora.lora_B, E = adalora.lora_E;
    std::vector<int64_t> left;
    for (size_t k = 0; k < adalora.rows.size(); ++k) {
      if (adalora.kept.empty() || adalora.kept[adalora.rows[k]]) left.push_back(static_cast<int64_t>(k));
    }
    if (left.size() < adalora.rows.size()) {
      const auto index = torch::tensor(left, torch::TensorOptions(torch::kLong).device(A.device()));
      A = A.detach().index_select(0, index);
      E = E.detach().index_select(0, index);
      B = B.detach().index_select(1, index);
    }
    return {{"lora_A", A}, {"lora_B", B}, {"lora_E", E}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    const auto& options = adalora(entries.front()).options;
    const auto differs = [&](const AdaLoraOptions& other) {
      const auto said = [](const AdaLoraOptions& o) {
        return std::tuple(o.init_rank(), o.target_rank(), o.tinit(), o.tfinal(), o.delta_t(), o.total_step(),
                          o.beta1(), o.beta2(), o.orth_reg_weight(), o.alpha(), o.dropout(), o.init());
      };
      return said(other) != said(options);
    };
    for (const auto& entry : entries) {
      if (differs(adalora(entry).options)) {
        problems.add("'" + entry.site->path() + "' must have the same options as '" +
                     entries.front().site->path() +
                     "', for one config holds both (hint: make them two adapters)");
      }
      if (adalora(entry).scale() != 1.0) {
        notes.emplace_back(scale_note);
        break;
      }
    }
    json["init_r"] = options.init_rank();
    json["target_r"] = options.target_rank();
    json["tinit"] = options.tinit();
    json["tfinal"] = options.tfinal();
    json["deltaT"] = options.delta_t();
    json["total_step"] = options.total_step();
    json["beta1"] = options.beta1();
    json["beta2"] = options.beta2();
    json["orth_reg_weight"] = options.orth_reg_weight();
    // Where it is not positive Python takes the rank, and that of the ranks that are left.
    json["lora_alpha"] =
        plain_number(options.alpha() > 0 ? options.alpha() : static_cast<double>(options.init_rank()));
    json["lora_dropout"] = options.dropout();
    if (!options.init()) json["init_lora_weights"] = false;
    for (const auto& entry : entries) {
      if (!adalora(entry).kept.empty())
        json["rank_pattern"][entry.site->path() + suffix] = adalora(entry).kept;
    }
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    AdaLoraOptions options(fields.integer("total_step", 1, 1));
    const auto fraction = [](double value) { return value > 0 && value < 1; };
    const auto finite = [](double value) { return std::isfinite(value); };
    options.init_rank(fields.integer("init_r", 12, 1))
        .target_rank(fields.integer("target_r", 8, 0))
        .tinit(fields.integer("tinit", 0, 0))
        .tfinal(fields.integer("tfinal", 0, 0))
        .delta_t(fields.integer("deltaT", 1, 1))
        .beta1(fields.number("beta1", 0.85, fraction, "must be a number in (0, 1)"))
        .beta2(fields.number("beta2", 0.85, fraction, "must be a number in (0, 1)"))
        .alpha(fields.number("lora_alpha", 8.0, finite, "must be a finite number"))
        .init(reads_as_true(fields, "init_lora_weights"));
    options.orth_reg_weight(fields.number(
        "orth_reg_weight", 0.5, [](double value) { return value >= 0 && std::isfinite(value); },
        "must be a number of at least 0"));
    options.dropout(fields.rate("lora_dropout"));
    if (!fields.has("total_step")) fields.complain("total_step", "must be an integer of at least 1");
    fields.boolean("fan_in_fan_out");  // the layer knows
    read_ranks(fields, options);
    fields.refuse_features({"use_dora", "use_qalora", "use_bdlora", "loftq_config", "layer_replication",
                            "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
                            "arrow_config", "kasa_config", "velora_config", "monteclora_config",
                            "megatron_config", "ensure_weight_tying", "lora_bias"});
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    if (model_type == "t5") return {"q", "k", "v", "o", "wi", "wo"};
    if (model_type == "mt5") return {"q", "k", "v", "o", "wi_0", "wi_1", "wo"};
    if (model_type == "bart" || model_type == "opt") {
      return {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"};
    }
    if (model_type == "roberta") return {"query", "key", "value", "dense"};
    if (model_type == "deberta-v2") return {"query_proj", "key_proj", "value_proj", "dense"};
    const std::vector<std::string> as_lora{
        "bert",  "deberta", "gpt2",  "gpt_bigcode", "gptj",        "gpt_neo", "gpt_neox", "bloom",
        "llama", "llama4",  "gemma", "gemma2",      "gemma3_text", "qwen2",   "qwen3",    "nemotron_h"};
    const bool listed = std::find(as_lora.begin(), as_lora.end(), model_type) != as_lora.end();
    return listed ? default_lora_targets(model_type) : std::vector<std::string>{};
  }

  void complete(const Entries& entries) const override {
    for (const auto& [path, kept] : adalora(entries.front()).options.kept()) {
      const bool there = std::any_of(entries.begin(), entries.end(),
                                     [&p = path](const auto& entry) { return entry.site->path() == p; });
      TORCH_CHECK(there, config_file_name, ": 'rank_pattern' names '", path, suffix,
                  "', but the adapter has no such layer");
    }
  }

 private:
  static constexpr const char* suffix = ".lora_E";

  static const AdaLoraImpl& adalora(const Adapter::Entry& entry) {
    return static_cast<const AdaLoraImpl&>(*entry.piece);
  }

  /// Python asks no more of the value.
  static bool reads_as_true(ConfigFields& fields, const char* key) {
    const bool text = fields.has(key) && fields.value(key).is_string();
    return text ? !fields.string(key).empty() : fields.boolean(key, true);
  }

  static void read_ranks(ConfigFields& fields, AdaLoraOptions& options) {
    if (!fields.has("rank_pattern")) return;
    const auto& map = fields.value("rank_pattern");
    const auto length = static_cast<size_t>(options.init_rank());
    KeptRanks kept;
    bool fits = map.is_object();
    for (const auto& [key, list] : map.items()) {
      fits = fits && key.ends_with(suffix) && list.is_array() && list.size() == length &&
             std::all_of(list.begin(), list.end(), [](const auto& item) { return item.is_boolean(); });
      if (!fits) break;
      kept.emplace(key.substr(0, key.size() - std::string(suffix).size()),
                   list.template get<std::vector<bool>>());
    }
    if (!fits) {
      return fields.complain("rank_pattern", "must map '<layer>.lora_E' to lists of init_r = " +
                                                 std::to_string(length) + " true and false");
    }
    options.kept(std::move(kept));
  }
};

}  // namespace peft::internal
