// Tiny encoders of every family with weights from a formula, for the tests of their tasks.
#pragma once

#include "models/tiny_bert.h"
#include "peft/models/deberta_v2_config.h"
#include "peft/models/roberta.h"

#include <string>

namespace peft_test {

using peft::models::DebertaV2Config;
using peft::models::RobertaConfig;

/// The sizes of every tiny encoder here.
template <class Config>
auto tiny_encoder() {
  return Config()
      .vocab_size(20)
      .hidden_size(8)
      .num_hidden_layers(2)
      .num_attention_heads(2)
      .intermediate_size(12)
      .max_position_embeddings(12)
      .num_labels(3);
}

inline BertConfig tiny_roberta() {
  return tiny_encoder<RobertaConfig>().type_vocab_size(1).layer_norm_eps(1e-5);
}

inline DebertaV2Config tiny_deberta_v2() {
  return tiny_encoder<DebertaV2Config>().layer_norm_eps(1e-6).relative_attention(true).pos_att_type(
      {"p2c", "c2p"});
}

/// As version 3 is.
inline DebertaV2Config tiny_deberta_v3() {
  return tiny_deberta_v2()
      .position_buckets(4)
      .share_att_key(true)
      .norm_rel_ebd("layer_norm")
      .position_biased_input(false);
}

/// What the formula of tests/reference/encoder_values.py gives a parameter of this name.
inline torch::Tensor named_values(const std::string& name, torch::IntArrayRef sizes) {
  int k = 0;
  for (const char letter : name) k += letter;
  auto values = 0.15 * (0.7 * torch::arange(c10::multiply_integers(sizes), torch::kFloat64) + k % 31).sin();
  if (name.ends_with("LayerNorm.weight") || name.ends_with("layer_norm.weight")) values += 1;
  return values.reshape(sizes).to(torch::kFloat32);
}

/// Every parameter by that formula.
inline void fill_by_name(torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  for (auto& item : model.named_parameters()) {
    if (item.key().ends_with("decoder.weight")) continue;  // it is the words'
    item.value().copy_(named_values(item.key(), item.value().sizes()));
  }
}

/// A model of that formula, in evaluation mode.
template <class Model>
Model filled_by_name(const BertConfig& config) {
  Model model(config);
  fill_by_name(*model);
  model->eval();
  return model;
}

/// A batch with a RoBERTa's padding.
inline EncoderInputs roberta_batch() {
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {0, 2, 1, 1}});
  inputs.attention_mask = torch::tensor({{1, 1, 1, 1}, {1, 1, 0, 0}});
  return inputs;
}

}  // namespace peft_test
