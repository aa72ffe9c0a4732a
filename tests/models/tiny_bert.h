// A tiny BERT with weights from a formula, and its folder, for the tests of models/.
#pragma once

#include "models/pretrained_folder.h"
#include "peft/models/bert.h"

#include <filesystem>
#include <functional>
#include <string>

namespace peft_test {

using peft::models::BertConfig;
using peft::models::BertForSequenceClassification;
using peft::models::EncoderInputs;

inline BertConfig tiny() {
  return BertConfig()
      .vocab_size(20)
      .hidden_size(8)
      .num_hidden_layers(2)
      .num_attention_heads(2)
      .intermediate_size(12)
      .hidden_act("gelu_new")
      .max_position_embeddings(10)
      .layer_norm_eps(1e-6)
      .num_labels(3);
}

inline Json tiny_json() {
  return {{"architectures", {"BertForSequenceClassification"}},
          {"model_type", "bert"},
          {"vocab_size", 20},
          {"hidden_size", 8},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 2},
          {"intermediate_size", 12},
          {"hidden_act", "gelu_new"},
          {"max_position_embeddings", 10},
          {"layer_norm_eps", 1e-6},
          {"id2label", {{"0", "red"}, {"1", "green"}, {"2", "blue"}}},
          {"transformers_version", "5.23.0"}};
}

/// The formula of tests/reference/bert_values.py.
inline void fill(torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  double k = 0;
  for (auto& item : model.named_parameters()) {
    auto values = 0.15 * (0.7 * torch::arange(item.value().numel(), torch::kFloat64) + k++).sin();
    const std::string norm = "LayerNorm.weight";
    if (item.key().size() > norm.size() && item.key().ends_with(norm)) values += 1;
    item.value().copy_(values.reshape(item.value().sizes()));
  }
}

inline BertForSequenceClassification filled_classifier() {
  BertForSequenceClassification model(tiny());
  fill(*model);
  model->eval();
  return model;
}

inline EncoderInputs batch() {
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {1, 2, 0, 0}});
  inputs.attention_mask = torch::tensor({{1, 1, 1, 1}, {1, 1, 0, 0}});
  inputs.token_type_ids = torch::tensor({{0, 0, 1, 1}, {0, 0, 0, 0}});
  return inputs;
}

inline void write_model(const std::filesystem::path& folder, const Tensors& tensors,
                        const Json& config = tiny_json()) {
  write_pretrained(folder, tensors, config);
}

inline Tensors renamed(const Tensors& tensors, const std::function<std::string(std::string)>& rename) {
  Tensors result;
  for (const auto& [name, tensor] : tensors) result.emplace(rename(name), tensor);
  return result;
}

inline std::string without(std::string text, const std::string& prefix) {
  return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

}  // namespace peft_test
