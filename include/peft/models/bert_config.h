// BertConfig: the settings of a BERT or a RoBERTa, from C++ or from config.json.
#pragma once

#include "peft/io/config_json.h"
#include "peft/models/encoder.h"
#include "peft/models/model_type.h"

#include <torch/arg.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace peft::models {

/// The sizes and settings of a BERT, or of a RoBERTa (see `RobertaConfig`), named as in Hugging Face's
/// `config.json`.
///
/// Example:
/// ```
/// auto config = BertConfig().vocab_size(1000).hidden_size(64).num_hidden_layers(2).num_attention_heads(4);
/// ```
struct BertConfig {
  /// "bert", or one of RoBERTa's.
  TORCH_ARG(std::string, model_type) = "bert";
  TORCH_ARG(int64_t, vocab_size) = 30522;
  TORCH_ARG(int64_t, hidden_size) = 768;
  TORCH_ARG(int64_t, num_hidden_layers) = 12;
  TORCH_ARG(int64_t, num_attention_heads) = 12;
  TORCH_ARG(int64_t, intermediate_size) = 3072;
  /// A name `activation_function` knows.
  TORCH_ARG(std::string, hidden_act) = "gelu";
  TORCH_ARG(double, hidden_dropout_prob) = 0.1;
  TORCH_ARG(double, attention_probs_dropout_prob) = 0.1;
  /// Before the classifier; without one, `hidden_dropout_prob`.
  TORCH_ARG(std::optional<double>, classifier_dropout);
  TORCH_ARG(int64_t, max_position_embeddings) = 512;
  TORCH_ARG(int64_t, type_vocab_size) = 2;
  TORCH_ARG(double, layer_norm_eps) = 1e-12;
  TORCH_ARG(double, initializer_range) = 0.02;
  TORCH_ARG(std::optional<int64_t>, pad_token_id) = 0;
  /// Names of the classifier's labels, in the order of their ids.
  TORCH_ARG(std::vector<std::string>, labels) = {"LABEL_0", "LABEL_1"};
  TORCH_ARG(ProblemType, problem_type) = ProblemType::automatic;
  /// Whether a masked language model's output layer is the word vectors.
  TORCH_ARG(bool, tie_word_embeddings) = true;

 public:
  /// RoBERTa counts positions from the one after the padding's, which is `pad_token_id`, and gives none to
  /// padding.
  bool counts_from_padding() const { return model_type_ != "bert"; }
  /// Tokens that the position table has room for.
  int64_t positions() const {
    return max_position_embeddings_ - (counts_from_padding() ? pad_token_id_.value_or(0) + 1 : 0);
  }
  int64_t num_labels() const { return static_cast<int64_t>(labels_.size()); }
  /// "LABEL_0" …, where there are not as many labels already.
  BertConfig& num_labels(int64_t count) {
    TORCH_CHECK_VALUE(count > 0, "BertConfig: num_labels must be positive, but got ", count);
    if (count == num_labels()) return *this;
    labels_.clear();
    for (int64_t i = 0; i < count; ++i) labels_.push_back("LABEL_" + std::to_string(i));
    return *this;
  }
  /// Replaces every dropout probability.
  BertConfig& dropout(double probability) {
    hidden_dropout_prob_ = attention_probs_dropout_prob_ = probability;
    classifier_dropout_ = probability;
    return *this;
  }

  /// Reads a `config.json`. Absent keys have transformers' defaults.
  /// Throws: c10::ValueError naming the file and every key whose value will not do.
  static BertConfig read(const std::filesystem::path& path) {
    ConfigReader reader(path);
    peft::internal::check_model_type(reader, "Bert");
    return read(reader, BertConfig());
  }
  /// The same with other defaults. Throws what the reader has to complain of, too.
  static BertConfig read(ConfigReader& reader, const BertConfig& standard) {
    const auto size = [&reader](const char* key, int64_t absent) { return reader.integer(key, absent, 1); };
    const auto probability = [&reader](const char* key, double absent) {
      return reader.number(key, absent, 0.0, 1.0);
    };
    auto config = standard;
    config.vocab_size(size("vocab_size", standard.vocab_size()));
    config.hidden_size(size("hidden_size", standard.hidden_size()));
    config.num_hidden_layers(reader.integer("num_hidden_layers", standard.num_hidden_layers(), 0, 10'000));
    config.num_attention_heads(size("num_attention_heads", standard.num_attention_heads()));
    config.intermediate_size(size("intermediate_size", standard.intermediate_size()));
    config.hidden_act(reader.string("hidden_act", standard.hidden_act()));
    config.hidden_dropout_prob(probability("hidden_dropout_prob", standard.hidden_dropout_prob()));
    config.attention_probs_dropout_prob(
        probability("attention_probs_dropout_prob", standard.attention_probs_dropout_prob()));
    if (reader.has("classifier_dropout")) config.classifier_dropout(probability("classifier_dropout", 0.0));
    config.max_position_embeddings(size("max_position_embeddings", standard.max_position_embeddings()));
    config.type_vocab_size(size("type_vocab_size", standard.type_vocab_size()));
    config.layer_norm_eps(reader.number("layer_norm_eps", standard.layer_norm_eps(), 0.0, 1.0));
    config.initializer_range(reader.number("initializer_range", standard.initializer_range(), 0.0, 100.0));
    const auto last = config.vocab_size() - 1;
    if (config.counts_from_padding()) {
      config.pad_token_id(reader.integer("pad_token_id", *standard.pad_token_id(), 0, last));
      if (config.positions() < 1) {
        reader.complain("max_position_embeddings", "must have room for a token after the padding, " +
                                                       std::to_string(*config.pad_token_id()));
      }
    } else if (reader.json().contains("pad_token_id") && !reader.has("pad_token_id")) {
      config.pad_token_id(std::nullopt);
    } else {
      config.pad_token_id(
          reader.integer("pad_token_id", *standard.pad_token_id(), -config.vocab_size(), last));
    }
    config.tie_word_embeddings(reader.boolean("tie_word_embeddings", standard.tie_word_embeddings()));
    config.labels(peft::internal::read_labels(reader));
    config.problem_type(peft::internal::read_problem_type(reader));
    if (reader.string("position_embedding_type", "absolute") != "absolute") {
      reader.complain("position_embedding_type", "must be \"absolute\"");
    }
    for (const char* key : {"is_decoder", "add_cross_attention"}) {
      if (reader.boolean(key, false)) reader.complain(key, "must be false: only encoders are read");
    }
    if (config.hidden_size() % config.num_attention_heads() != 0) {
      reader.complain("hidden_size", "must be a multiple of 'num_attention_heads', " +
                                         std::to_string(config.num_attention_heads()));
    }
    if (!activation_functions().count(config.hidden_act())) {
      std::string names;
      for (const auto& [name, function] : activation_functions()) names += (names.empty() ? "" : ", ") + name;
      reader.complain("hidden_act", "must be one of " + names);
    }
    reader.finish();
    return config;
  }

  /// The same as a `config.json`.
  nlohmann::ordered_json json() const {
    nlohmann::ordered_json json{{"model_type", model_type_},
                                {"vocab_size", vocab_size_},
                                {"hidden_size", hidden_size_},
                                {"num_hidden_layers", num_hidden_layers_},
                                {"num_attention_heads", num_attention_heads_},
                                {"intermediate_size", intermediate_size_},
                                {"hidden_act", hidden_act_},
                                {"hidden_dropout_prob", hidden_dropout_prob_},
                                {"attention_probs_dropout_prob", attention_probs_dropout_prob_},
                                {"max_position_embeddings", max_position_embeddings_},
                                {"type_vocab_size", type_vocab_size_},
                                {"layer_norm_eps", layer_norm_eps_},
                                {"initializer_range", initializer_range_},
                                {"tie_word_embeddings", tie_word_embeddings_}};
    json["classifier_dropout"] = json["pad_token_id"] = nullptr;
    if (classifier_dropout_) json["classifier_dropout"] = *classifier_dropout_;
    if (pad_token_id_) json["pad_token_id"] = *pad_token_id_;
    peft::internal::write_labels(json, labels_, problem_type_);
    return json;
  }
};

/// A `BertConfig` with RoBERTa's defaults. It has no settings of its own, so nothing is lost where a chain
/// gives a `BertConfig`.
struct RobertaConfig : BertConfig {
  /// `kind`: "roberta", or one of those that are built like it, "xlm-roberta" and "camembert".
  explicit RobertaConfig(const std::string& kind = "roberta") {
    model_type(kind).pad_token_id(1);
    if (kind == "roberta") vocab_size(50265);
  }

  /// Reads a `config.json`, as `BertConfig::read` does.
  static BertConfig read(const std::filesystem::path& path) {
    ConfigReader reader(path);
    peft::internal::check_model_type(reader, "Roberta");
    return BertConfig::read(reader, RobertaConfig(reader.string("model_type", "roberta")));
  }
};

}  // namespace peft::models
