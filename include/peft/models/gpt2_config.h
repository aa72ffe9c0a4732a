// GPT2Config: a GPT-2's settings, from C++ or from config.json.
#pragma once

#include "peft/io/config_json.h"
#include "peft/models/encoder.h"
#include "peft/models/model_type.h"

#include <torch/arg.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace peft::models {

/// A GPT-2's sizes and settings, named as in Hugging Face's `config.json`.
///
/// Example:
/// ```
/// auto config = GPT2Config().vocab_size(1000).n_positions(128).n_embd(64).n_layer(2).n_head(4);
/// ```
struct GPT2Config {
  TORCH_ARG(int64_t, vocab_size) = 50257;
  /// Rows of the position table: the longest text, virtual tokens included.
  TORCH_ARG(int64_t, n_positions) = 1024;
  TORCH_ARG(int64_t, n_embd) = 768;
  TORCH_ARG(int64_t, n_layer) = 12;
  TORCH_ARG(int64_t, n_head) = 12;
  /// Width of the feed-forward network; without one, 4 · `n_embd`.
  TORCH_ARG(std::optional<int64_t>, n_inner);
  /// A name `activation_function` knows.
  TORCH_ARG(std::string, activation_function) = "gelu_new";
  TORCH_ARG(double, resid_pdrop) = 0.1;
  TORCH_ARG(double, embd_pdrop) = 0.1;
  TORCH_ARG(double, attn_pdrop) = 0.1;
  TORCH_ARG(double, layer_norm_epsilon) = 1e-5;
  TORCH_ARG(double, initializer_range) = 0.02;
  /// Whether scores are divided by sqrt(head width).
  TORCH_ARG(bool, scale_attn_weights) = true;
  /// Whether scores are also divided by the layer's number, counted from 1.
  TORCH_ARG(bool, scale_attn_by_inverse_layer_idx) = false;
  TORCH_ARG(std::optional<int64_t>, bos_token_id) = 50256;
  /// Tokens that end a generated text.
  TORCH_ARG(std::vector<int64_t>, eos_token_id) = {50256};
  TORCH_ARG(std::optional<int64_t>, pad_token_id);
  /// Whether the language model's head is the word vectors.
  TORCH_ARG(bool, tie_word_embeddings) = true;

 public:
  int64_t inner() const { return n_inner_.value_or(4 * n_embd_); }
  /// Replaces every dropout probability.
  GPT2Config& dropout(double probability) {
    resid_pdrop_ = embd_pdrop_ = attn_pdrop_ = probability;
    return *this;
  }

  /// Reads a `config.json`. Absent keys have transformers' defaults.
  /// Throws: c10::ValueError naming the file and every key whose value will not do.
  static GPT2Config read(const std::filesystem::path& path) {
    ConfigReader reader(path);
    const GPT2Config standard;
    const auto size = [&reader](const char* key, const char* other, int64_t absent, int64_t least = 1,
                                int64_t most = std::numeric_limits<int32_t>::max()) {
      const auto& json = reader.json();
      const bool by_other = !json.contains(key) && json.contains(other);
      if (json.contains(key) && json.contains(other) && json[key] != json[other])
        reader.complain(key, "must be the same as '" + std::string(other) + "', its other name");
      return reader.integer(by_other ? other : key, absent, least, most);
    };
    const auto probability = [&reader](const char* key) { return reader.number(key, 0.1, 0.0, 1.0); };
    GPT2Config config;
    peft::internal::check_model_type(reader, "GPT2");
    config.vocab_size(reader.integer("vocab_size", standard.vocab_size(), 1));
    config.n_positions(size("n_positions", "max_position_embeddings", standard.n_positions()));
    config.n_embd(size("n_embd", "hidden_size", standard.n_embd()));
    config.n_layer(size("n_layer", "num_hidden_layers", standard.n_layer(), 0, 10'000));
    config.n_head(size("n_head", "num_attention_heads", standard.n_head()));
    if (reader.has("n_inner")) config.n_inner(reader.integer("n_inner", 1, 1));
    config.activation_function(reader.string("activation_function", standard.activation_function()));
    config.resid_pdrop(probability("resid_pdrop"));
    config.embd_pdrop(probability("embd_pdrop"));
    config.attn_pdrop(probability("attn_pdrop"));
    config.layer_norm_epsilon(reader.number("layer_norm_epsilon", standard.layer_norm_epsilon(), 0.0, 1.0));
    config.initializer_range(reader.number("initializer_range", standard.initializer_range(), 0.0, 100.0));
    config.scale_attn_weights(reader.boolean("scale_attn_weights", true));
    config.scale_attn_by_inverse_layer_idx(reader.boolean("scale_attn_by_inverse_layer_idx", false));
    config.tie_word_embeddings(reader.boolean("tie_word_embeddings", true));
    config.bos_token_id(token(reader, "bos_token_id", standard.bos_token_id()));
    config.pad_token_id(token(reader, "pad_token_id", standard.pad_token_id()));
    config.eos_token_id(eos_tokens(reader));
    if (reader.boolean("add_cross_attention", false)) {
      reader.complain("add_cross_attention", "must be false: only decoders without an encoder are read");
    }
    if (config.n_embd() % config.n_head() != 0) {
      reader.complain("n_embd", "must be a multiple of 'n_head', " + std::to_string(config.n_head()));
    }
    if (!activation_functions().count(config.activation_function())) {
      std::string names;
      for (const auto& [name, function] : activation_functions()) names += (names.empty() ? "" : ", ") + name;
      reader.complain("activation_function", "must be one of " + names);
    }
    reader.finish();
    return config;
  }

  /// The same as a `config.json`.
  nlohmann::ordered_json json() const {
    nlohmann::ordered_json json{{"model_type", "gpt2"},
                                {"vocab_size", vocab_size_},
                                {"n_positions", n_positions_},
                                {"n_embd", n_embd_},
                                {"n_layer", n_layer_},
                                {"n_head", n_head_},
                                {"activation_function", activation_function_},
                                {"resid_pdrop", resid_pdrop_},
                                {"embd_pdrop", embd_pdrop_},
                                {"attn_pdrop", attn_pdrop_},
                                {"layer_norm_epsilon", layer_norm_epsilon_},
                                {"initializer_range", initializer_range_},
                                {"scale_attn_weights", scale_attn_weights_},
                                {"scale_attn_by_inverse_layer_idx", scale_attn_by_inverse_layer_idx_},
                                {"tie_word_embeddings", tie_word_embeddings_}};
    const auto put = [&json](const char* key, const std::optional<int64_t>& value) {
      json[key] = nullptr;
      if (value) json[key] = *value;
    };
    put("n_inner", n_inner_);
    put("bos_token_id", bos_token_id_);
    put("pad_token_id", pad_token_id_);
    json["eos_token_id"] = nullptr;
    if (eos_token_id_.size() == 1) json["eos_token_id"] = eos_token_id_.front();
    if (eos_token_id_.size() > 1) json["eos_token_id"] = eos_token_id_;
    return json;
  }

 private:
  static std::optional<int64_t> token(ConfigReader& reader, const char* key, std::optional<int64_t> absent) {
    if (!reader.json().contains(key)) return absent;
    if (!reader.has(key)) return std::nullopt;
    return reader.integer(key, 0, 0);
  }
  static std::vector<int64_t> eos_tokens(ConfigReader& reader) {
    const char* key = "eos_token_id";
    if (!reader.json().contains(key)) return GPT2Config().eos_token_id();
    if (!reader.has(key)) return {};
    const auto& value = reader.json()[key];
    if (!value.is_array()) return {reader.integer(key, 0, 0)};
    std::vector<int64_t> tokens;
    for (const auto& item : value) {
      if (item.is_number_integer() && item.get<int64_t>() >= 0) tokens.push_back(item.get<int64_t>());
    }
    if (tokens.size() != value.size()) reader.complain(key, "must be a token or a list of tokens");
    return tokens;
  }
};

}  // namespace peft::models
