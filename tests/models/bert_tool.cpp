// A program around models/bert.h, driven by tests/reference/compare_bert.py.
//
//   bert_tool texts|tokens|encoder MODEL INPUTS.safetensors OUTPUTS.safetensors [LABELS SEED]
//
// Runs the batches b0, b1, … of INPUTS through a folder's model: a classifier of texts or of tokens (a
// missing head is drawn from SEED), or the encoder.
#include "peft/io/safetensors.h"
#include "peft/models/bert.h"

#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using Tensors = std::vector<std::pair<std::string, torch::Tensor>>;

void add(Tensors& tensors, const std::string& name, const torch::Tensor& tensor) {
  if (tensor.defined()) tensors.emplace_back(name, tensor);
}

template <class Model>
void run_batches(Model& model, const std::string& in, const std::string& out) {
  const torch::NoGradGuard no_grad;
  const auto inputs = peft::load_safetensors(in);
  Tensors outputs;
  for (int i = 0;; ++i) {
    const auto prefix = "b" + std::to_string(i) + ".";
    const auto given = [&](const char* name) {
      const auto found = inputs.find(prefix + name);
      return found == inputs.end() ? torch::Tensor() : found->second;
    };
    peft::models::EncoderInputs batch;
    batch.input_ids = given("input_ids");
    batch.inputs_embeds = given("inputs_embeds");
    batch.attention_mask = given("attention_mask");
    batch.token_type_ids = given("token_type_ids");
    batch.position_ids = given("position_ids");
    batch.labels = given("labels");
    batch.output_hidden_states = true;
    if (!batch.input_ids.defined() && !batch.inputs_embeds.defined()) break;
    const auto output = model->forward(batch);
    add(outputs, prefix + "last_hidden_state", output.last_hidden_state);
    add(outputs, prefix + "pooler_output", output.pooler_output);
    add(outputs, prefix + "logits", output.logits);
    add(outputs, prefix + "loss", output.loss);
    add(outputs, prefix + "embedding", peft::models::embed(output.last_hidden_state, batch.attention_mask));
    for (size_t layer = 0; layer < output.hidden_states.size(); ++layer) {
      add(outputs, prefix + "hidden_states." + std::to_string(layer), output.hidden_states[layer]);
    }
  }
  peft::save_safetensors(out, outputs);
}

void run(int count, char** words) {
  using namespace peft::models;
  const std::string kind = words[1], folder = words[2];
  const auto labels = count > 5 ? std::optional<int64_t>(std::stoll(words[5])) : std::nullopt;
  if (count > 6) torch::manual_seed(static_cast<uint64_t>(std::stoll(words[6])));
  if (kind == "texts") {
    auto model = BertForSequenceClassification::from_pretrained(folder, labels);
    run_batches(model, words[3], words[4]);
  } else if (kind == "tokens") {
    auto model = BertForTokenClassification::from_pretrained(folder, labels);
    run_batches(model, words[3], words[4]);
  } else {
    auto model = BertModel::from_pretrained(folder);
    run_batches(model, words[3], words[4]);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count < 5 || count > 7) {
    std::cerr << "usage: bert_tool texts|tokens|encoder MODEL INPUTS.safetensors OUTPUTS.safetensors [LABELS "
                 "SEED]\n";
    return 2;
  }
  try {
    run(count, words);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "bert_tool: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "bert_tool: " << error.what() << "\n";
  }
  return 1;
}
