// MultitaskPromptTuningFormat: prompts of several tasks in Hugging Face PEFT's files (peft_type
// MULTITASK_PROMPT_TUNING).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/prompt_tuning.h"
#include "peft/methods/multitask_prompt.h"

namespace peft::internal {

class MultitaskPromptTuningFormat final : public PromptFormat {
 public:
  std::string peft_type() const override { return "MULTITASK_PROMPT_TUNING"; }
  std::string title() const override { return "multitask prompt"; }
  nlohmann::json defaults() const override {
    auto json = prompt_defaults();
    json.update(prompt_start_defaults());
    json.update(nlohmann::json::parse(R"({
      "num_ranks": 1, "num_tasks": 1, "prompt_tuning_init_state_dict_path": null,
      "prompt_tuning_init_task": 0})"));
    return json;
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const MultitaskPromptImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    const auto& piece = piece_of(entries);
    return {{"prefix_task_cols", piece.prefix_task_cols},
            {"prefix_task_rows", piece.prefix_task_rows},
            {"prompt_embeddings", piece.prompt_embeddings}};
  }

  /// A start from a source is "RANDOM": Python would read the source's file again.
  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems& problems) const override {
    write_prompt(entries, json, problems);
    const auto& options = piece_of(entries).options;
    write_prompt_start(options.prompt(), json);
    json["num_ranks"] = options.rank();
    json["num_tasks"] = options.tasks();
  }
  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto prompt = read_prompt_start(fields, read_prompt(fields),
                                          {"RANDOM", "SAMPLE_VOCAB", "TEXT", "AVERAGE_SOURCE_TASKS",
                                           "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"});
    const auto options = MultitaskPromptOptions(prompt, fields.integer("num_tasks", 1, 1))
                             .rank(fields.integer("num_ranks", 1, 1));
    return [options](Target target) { return on(options, std::move(target)); };
  }

 private:
  static const MultitaskPromptImpl& piece_of(const Entries& entries) {
    return static_cast<const MultitaskPromptImpl&>(*entries.front().piece);
  }
};

}  // namespace peft::internal
