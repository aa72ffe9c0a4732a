// A small BERT for the tests of prompts, and the comparison with what tests/reference/prompt_values.py
// prints.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "methods/reference_values.h"
#include "models/tiny_bert.h"
#include "peft/core/input.h"
#include "peft/io/peft_directory.h"

namespace suite {

using peft_test::BertForSequenceClassification;

/// The tiny BERT with weights from the formula, in double precision; its input: a batch with padding.
inline LayerCase bert_case() {
  return {"BERT",
          [] {
            auto model = peft_test::filled_classifier();
            model->to(torch::kFloat64);
            return std::static_pointer_cast<nn::Module>(model.ptr());
          },
          [](nn::Module& module, const Tensor& ids) {
            auto inputs = peft_test::batch();
            inputs.input_ids = ids;
            return module.as<peft::models::BertForSequenceClassificationImpl>()->forward(inputs).logits;
          },
          peft_test::batch().input_ids};
}

/// What `case` of tests/reference/prompt_values.py prints.
struct PromptReference {
  std::vector<double> start, logits, without_types, losses, trained;
};

/// Adds a prompt as `case` does and compares. `start`: the vectors of the prompt.
template <class Options, class Start>
void check_prompt(const std::string& name, const Options& options, const PromptReference& reference,
                  const Start& start) {
  INFO(name);
  auto model = peft_test::filled_classifier();
  torch::manual_seed(0);
  const auto adapter = peft::add_adapter(*model, options, peft::all());
  check_values(start(adapter), reference.start, 1e-7);

  model->to(torch::kFloat64);
  auto inputs = peft_test::batch();
  const auto logits = [&] { return model->forward(inputs).logits; };
  check_values(logits(), reference.logits);
  inputs.token_type_ids = Tensor();
  check_values(logits(), reference.without_types);
  inputs = peft_test::batch();
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  std::vector<Tensor> losses;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto loss = at::cross_entropy_loss(logits(), torch::tensor({2, 0}));
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
  }
  check_values(torch::stack(losses), reference.losses, 1e-8);
  check_values(logits(), reference.trained, 1e-8);
}

/// Writes an adapter of the small BERT and reads it into another; both give the same logits. Returns the
/// config and the names of the tensors, sorted.
inline std::pair<nlohmann::json, std::vector<std::string>> check_prompt_files(
    const std::vector<peft::Part>& parts) {
  auto model = peft_test::filled_classifier(), other = peft_test::filled_classifier();
  torch::manual_seed(0);
  const auto adapter = peft::add_adapter(*model, parts);
  shake(adapter);
  const peft_test::TemporaryFolder folder;
  peft::save_adapter(adapter, folder / "one");
  const auto loaded = peft::load_adapter(*other, folder / "one");
  CHECK(largest(model->forward(peft_test::batch()).logits, other->forward(peft_test::batch()).logits) < 1e-6);
  peft::save_adapter(loaded, folder / "two");
  const auto config = [&](const char* name) {
    return nlohmann::json::parse(std::ifstream(folder / name / "adapter_config.json"));
  };
  CHECK(config("one") == config("two"));
  std::vector<std::string> names;
  for (const auto& [key, tensor] : peft::load_safetensors(folder / "two" / "adapter_model.safetensors"))
    names.push_back(key);
  return {config("one"), names};
}

}  // namespace suite
