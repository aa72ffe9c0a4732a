// PromptTuningFormat: prompts in Hugging Face PEFT's files (peft_type PROMPT_TUNING).
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/prompt_settings.h"
#include "peft/methods/prompt.h"

namespace peft::internal {

/// The keys that say how a prompt began, beside those of every prompt.
inline nlohmann::json prompt_start_defaults() {
  return nlohmann::json::parse(R"({
    "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": null, "tokenizer_kwargs": null,
    "tokenizer_name_or_path": null})");
}

/// Writes them. Python asks for text and tokenizer where it reads "TEXT", and knows no other starts: those
/// are "RANDOM", which decides nothing in a file that has the vectors.
inline void write_prompt_start(const PromptOptions& options, nlohmann::json& json) {
  if (options.init() == PromptInit::vocabulary) json["prompt_tuning_init"] = "SAMPLE_VOCAB";
  if (options.text().empty() || options.tokenizer().empty()) return;
  json["prompt_tuning_init"] = "TEXT";
  json["prompt_tuning_init_text"] = options.text();
  json["tokenizer_name_or_path"] = options.tokenizer();
}

/// Reads them, and the length. `starts`: the names this method has.
inline PromptOptions read_prompt_start(ConfigFields& fields, int64_t length,
                                       const std::vector<std::string>& starts) {
  PromptOptions options(length);
  const auto start = fields.string("prompt_tuning_init");
  if (fields.has("prompt_tuning_init") && std::find(starts.begin(), starts.end(), start) == starts.end()) {
    std::string names;
    for (const auto& name : starts) names += (names.empty() ? "" : ", ") + name;
    fields.complain("prompt_tuning_init", "must be one of " + names, /*decides_shapes=*/false);
  }
  if (start == "SAMPLE_VOCAB") options.init(PromptInit::vocabulary);
  const auto text = fields.string("prompt_tuning_init_text"),
             tokenizer = fields.string("tokenizer_name_or_path");
  if (start == "TEXT") options.text(text).tokenizer(tokenizer);
  if (fields.has("tokenizer_kwargs")) fields.note("'tokenizer_kwargs' is not kept: the prompt has begun");
  return options;
}

class PromptTuningFormat final : public PromptFormat {
 public:
  std::string peft_type() const override { return "PROMPT_TUNING"; }
  std::string title() const override { return "prompt"; }
  nlohmann::json defaults() const override {
    auto json = prompt_defaults();
    json.update(prompt_start_defaults());
    return json;
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const PromptImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    return {{"prompt_embeddings", static_cast<const PromptImpl&>(*entries.front().piece).prompt_embeddings}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems& problems) const override {
    write_prompt(entries, json, problems);
    write_prompt_start(static_cast<const PromptImpl&>(*entries.front().piece).options, json);
  }
  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto options = read_prompt_start(fields, read_prompt(fields), {"RANDOM", "SAMPLE_VOCAB", "TEXT"});
    return [options](Target target) { return on(options, std::move(target)); };
  }
};

}  // namespace peft::internal
