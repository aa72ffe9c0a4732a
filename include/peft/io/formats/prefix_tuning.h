// PrefixTuningFormat: prefixes in Hugging Face PEFT's files (peft_type PREFIX_TUNING): the keys and values
// alone.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/prompt_settings.h"
#include "peft/methods/prefix.h"

namespace peft::internal {

class PrefixTuningFormat final : public PromptFormat {
 public:
  std::string peft_type() const override { return "PREFIX_TUNING"; }
  std::string title() const override { return "prefix"; }
  nlohmann::json defaults() const override {
    auto json = prompt_defaults();
    json.update(nlohmann::json::parse(
        R"({"encoder_hidden_size": null, "init_weights": null, "prefix_projection": false})"));
    return json;
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const PrefixImpl*>(&piece) || dynamic_cast<const PrefixPositionsImpl*>(&piece);
  }
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    torch::NoGradGuard no_grad;
    return {{"prompt_embeddings", layers_of(entries).front()->table().matrix()}};
  }
  std::string untrainable(const Entries& entries) const override {
    if (!layers_of(entries).front()->options.folded()) return {};
    return "the file has the keys and values of a prefix without the network that made them, so it cannot "
           "train on (hint: the checkpoint of a run keeps the network)";
  }

  std::string unusable(const std::string& model_type) const override {
    if (model_type != "deberta-v2") return {};
    return "Python PEFT has no prefixes for DeBERTa, whose model there takes no past keys: the file is for "
           "this "
           "library";
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    const auto layers = layers_of(entries);
    const auto& first = *layers.front();
    const auto& options = first.options;
    const auto& table = first.table();
    const auto keys = table.attention.kv_heads() * table.attention.head_width();
    const auto refuse = [&](bool does, const std::string& what) {
      if (does) problems.add("the prefix " + what + ", which Hugging Face PEFT's do not");
    };
    refuse(options.gates() > 0, "has gates");
    refuse(!options.shift_positions(), "takes no positions (shift_positions)");
    bool everywhere = true;
    for (size_t i = 0; i < layers.size(); ++i) {
      everywhere = everywhere && layers[i]->site().attention->layer() == static_cast<int64_t>(i);
    }
    for (const auto& entry : entries) {
      const auto& input = entry.piece->site().input;
      everywhere = everywhere && (!input || input->layers() == 0 || input->layers() == table.layers);
    }
    refuse(!everywhere, "leaves layers out");
    if (options.dropout() > 0) notes.emplace_back("the prefix's dropout is not written: loaded, it is 0");
    if (options.projection() && !options.folded()) {
      notes.emplace_back("the network that makes the prefix is not written: loaded, it is for inference");
    }
    json["num_virtual_tokens"] = options.length();
    json["token_dim"] = keys;
    json["num_attention_heads"] = table.attention.kv_heads();
    json["num_layers"] = table.layers;
    json["prefix_projection"] = options.projection();
    json["encoder_hidden_size"] = options.hidden_width() > 0 ? options.hidden_width() : keys;
    if (options.init() == PrefixInit::zero) json["init_weights"] = "zero";
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    PrefixOptions options(read_prompt(fields));
    if (fields.has("init_weights")) {
      if (fields.string("init_weights") == "zero") {
        options.init(PrefixInit::zero);
      } else {
        fields.complain("init_weights", "must be \"zero\" or null", /*decides_shapes=*/false);
      }
    }
    if (fields.has("encoder_hidden_size")) options.hidden_width(fields.integer("encoder_hidden_size", 0, 1));
    if (fields.boolean("prefix_projection")) options.projection(true).folded(true);
    const auto heads = fields.has("num_attention_heads") ? fields.integer("num_attention_heads", 0, 1) : 0;
    return [options, heads](Target target) {
      auto part = on(options, std::move(target));
      // Of the same width, keys of other heads would fit, and mean something else.
      part.make = [options, heads](const SiteInfo& site) {
        const auto own = site.attention->kv_heads();
        TORCH_CHECK(heads == 0 || heads == own, "the prefix must have ", own, " heads, but got ", heads,
                    " (num_attention_heads; hint: another base model?)");
        return make_piece(options, site);
      };
      return part;
    };
  }

 private:
  static std::vector<const PrefixImpl*> layers_of(const Entries& entries) {
    std::vector<const PrefixImpl*> layers;
    for (const auto& entry : entries) {
      if (const auto* layer = dynamic_cast<const PrefixImpl*>(entry.piece.get())) layers.push_back(layer);
    }
    return layers;
  }
};

}  // namespace peft::internal
