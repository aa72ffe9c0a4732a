// HubPromptFormat: prompt tuning in AdapterHub's files (architecture "prompt_tuning").
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_format.h"
#include "peft/methods/prompt.h"

namespace peft::internal {

/// Prompts after the embeddings. Not every family of Python's takes them.
class HubPromptFormat final : public HubFormat {
 public:
  std::string title() const override { return "prompt"; }
  bool reads(const ConfigFields& fields) const override {
    return fields.value("architecture") == "prompt_tuning";
  }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "architecture": "prompt_tuning", "combine": "prefix", "init_weights_seed": null,
      "prompt_init": "random_uniform", "prompt_init_text": null, "prompt_length": 10})");
  }

  std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const override {
    const auto combine = read_choice(fields, "combine", "prefix", {"prefix", "prefix_after_bos"});
    read_choice(fields, "prompt_init", "random_uniform", {"random_uniform", "from_string"});
    const auto options = PromptOptions(fields.integer("prompt_length", 10, 1))
                             .init(PromptInit::uniform)
                             .after_embedding(true)
                             .after_first(combine == "prefix_after_bos");
    if (!places.family().prompts_differ.empty()) fields.note(places.family().prompts_differ);
    if (!fields.usable()) return {};
    return {{[options](Target target) { return on(options, std::move(target)); },
             places.of({HubRole::embeddings})}};
  }

  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const PromptImpl*>(&piece) != nullptr;
  }
  std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places,
                               std::vector<std::string>& notes, Problems& problems) const override {
    auto json = defaults();
    for (const auto& entry : entries) {
      const auto* place = places.of(*entry.site);
      if (!place || place->role != HubRole::embeddings) {
        problems.add("'" + entry.site->path() +
                     "' is before positions and norm, and AdapterHub's prompts come after them (hint: "
                     "PromptOptions::after_embedding)");
      }
    }
    if (!places.family().has_prompts) {
      problems.add("AdapterHub's '" + places.family().model_type + "' takes no prompts");
    }
    if (places.word_width() != places.width()) {
      problems.add("AdapterHub's prompts are as wide as the words' vectors, " +
                   std::to_string(places.word_width()) + ", and this model's after them, " +
                   std::to_string(places.width()));
    }
    if (!places.of({HubRole::convolution}).empty()) {
      problems.add("AdapterHub's '" + places.family().model_type +
                   "' takes no prompts where it has a convolution");
    }
    if (!places.family().prompts_differ.empty()) notes.push_back(places.family().prompts_differ);
    const auto& options = prompt_of(entries.front()).options;
    json["prompt_length"] = options.num_virtual_tokens();
    json["combine"] = options.after_first() ? "prefix_after_bos" : "prefix";
    return {{json, entries}};
  }

  std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                 const std::string& name) const override {
    return {{places.prefix() + "prompt_tuning.prompt_tunings." + name + ".prompt_embedding.weight",
             prompt_of(config.entries.front()).prompt_embeddings}};
  }

 private:
  static const PromptImpl& prompt_of(const Adapter::Entry& entry) {
    return static_cast<const PromptImpl&>(*entry.piece);
  }
};

}  // namespace peft::internal
