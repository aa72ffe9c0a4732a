// PromptFormat: what the rows of prompts have in common. Python keeps them beside the model, not on its
// layers.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "peft/core/input.h"
#include "peft/io/peft_format.h"
#include "peft/io/peft_places.h"

namespace peft::internal {

/// A method that goes where it fits, has no targets in its config, and tensors under keys without a path.
class PromptFormat : public PeftFormat {
 public:
  bool wraps_layers() const override { return false; }
  std::vector<DiskTensor> tensors(const PieceImpl&) const override { return {}; }
  bool is_targeted(const Adapter::Entry&) const override { return false; }
  std::vector<Part> further_parts(ConfigFields&, const std::function<Part(Target)>& part) const override {
    return {part(all())};
  }
  /// The reader puts the usual prefix before a key that has none.
  std::string current_key(const std::string& key) const override {
    if (!key.starts_with(model_prefix)) return key;
    const auto rest = key.substr(model_prefix.size());
    return rest.find('.') == std::string::npos ? rest : "base_model." + rest;
  }

 protected:
  static nlohmann::json prompt_defaults() {
    return nlohmann::json::parse(R"({
      "modules_to_save": null, "num_attention_heads": null, "num_layers": null,
      "num_transformer_submodules": 1, "num_virtual_tokens": null, "token_dim": null})");
  }
  /// Of prompts among the inputs: one, where Python has its own.
  static void write_prompt(const Entries& entries, nlohmann::json& json, Problems& problems) {
    for (size_t i = 1; i < entries.size(); ++i) {
      problems.add("'" + entries[i].site->path() + "' has a second prompt beside that of '" +
                   entries.front().site->path() +
                   "', but one config holds one (hint: make them two adapters)");
    }
    const auto& piece = static_cast<const PromptPieceImpl&>(*entries.front().piece);
    const auto& input = piece.site().input;
    if ((input && input->embedded()) || piece.after_first()) {
      problems.add("'" + entries.front().site->path() +
                   "' has a prompt in a place of AdapterHub's, which Hugging Face PEFT does not have");
    }
    json["num_virtual_tokens"] = piece.num_virtual_tokens();
    json["token_dim"] = piece.site().width;
    if (input && input->layers() > 0) json["num_layers"] = input->layers();
    if (input && input->heads() > 0) json["num_attention_heads"] = input->heads();
  }
  /// The length of the prompt.
  static int64_t read_prompt(ConfigFields& fields) {
    if (!fields.has("num_virtual_tokens")) {
      fields.complain("num_virtual_tokens", "must be an integer of at least 1");
      return 1;
    }
    if (fields.has("num_transformer_submodules") && fields.integer("num_transformer_submodules", 1, 1) != 1) {
      fields.complain("num_transformer_submodules",
                      "must be 1: models of an encoder and a decoder are not read");
    }
    return fields.integer("num_virtual_tokens", 1, 1);
  }
};

}  // namespace peft::internal
