// DebertaV2Config: a DeBERTa-v2's or -v3's settings, from C++ or from config.json.
#pragma once

#include "peft/io/config_json.h"
#include "peft/models/bert_config.h"
#include "peft/models/encoder.h"
#include "peft/models/model_type.h"

#include <torch/arg.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// A DeBERTa's sizes and settings, named as in Hugging Face's `config.json`; versions 2 and 3 differ in their
/// settings only.
///
/// Example:
/// ```
/// auto config =
/// DebertaV2Config().vocab_size(1000).hidden_size(64).num_hidden_layers(2).num_attention_heads(4)
///                   .relative_attention(true).pos_att_type({"p2c", "c2p"}).share_att_key(true)
///                   .position_buckets(32);
/// ```
struct DebertaV2Config {
  TORCH_ARG(int64_t, vocab_size) = 128100;
  TORCH_ARG(int64_t, hidden_size) = 1536;
  TORCH_ARG(int64_t, num_hidden_layers) = 24;
  TORCH_ARG(int64_t, num_attention_heads) = 24;
  TORCH_ARG(int64_t, intermediate_size) = 6144;
  /// Of the word vectors, which a projection brings to `hidden_size`; without one, they have it.
  TORCH_ARG(std::optional<int64_t>, embedding_size);
  /// A name `activation_function` knows.
  TORCH_ARG(std::string, hidden_act) = "gelu";
  TORCH_ARG(double, hidden_dropout_prob) = 0.1;
  TORCH_ARG(double, attention_probs_dropout_prob) = 0.1;
  TORCH_ARG(int64_t, max_position_embeddings) = 512;
  /// 0: tokens have no types.
  TORCH_ARG(int64_t, type_vocab_size) = 0;
  TORCH_ARG(double, layer_norm_eps) = 1e-7;
  TORCH_ARG(double, initializer_range) = 0.02;
  TORCH_ARG(std::optional<int64_t>, pad_token_id) = 0;

  /// Whether absolute positions are added to the word vectors.
  TORCH_ARG(bool, position_biased_input) = true;
  /// Whether attention sees the distance of query and key.
  TORCH_ARG(bool, relative_attention) = false;
  /// The farthest distance that is told from others; below 1, `max_position_embeddings`.
  TORCH_ARG(int64_t, max_relative_positions) = -1;
  /// Of each direction, the distances up to half of it are told apart, those beyond in logarithmic steps;
  /// below 1, all are.
  TORCH_ARG(int64_t, position_buckets) = -1;
  /// Which terms attention has beside content to content: "c2p" (a query's content to a key's position),
  /// "p2c".
  TORCH_ARG(std::vector<std::string>, pos_att_type);
  /// Whether positions go through the projections of queries and keys, and not through their own.
  TORCH_ARG(bool, share_att_key) = false;
  /// "layer_norm": the vectors of distances are normed; "none".
  TORCH_ARG(std::string, norm_rel_ebd) = "none";

  /// Odd; of the convolution beside the first block. 0: there is none.
  TORCH_ARG(int64_t, conv_kernel_size) = 0;
  TORCH_ARG(int64_t, conv_groups) = 1;
  TORCH_ARG(std::string, conv_act) = "tanh";

  /// Before the pooler.
  TORCH_ARG(double, pooler_dropout) = 0.0;
  TORCH_ARG(std::string, pooler_hidden_act) = "gelu";
  /// Before the classifier of texts; without one, `hidden_dropout_prob`.
  TORCH_ARG(std::optional<double>, cls_dropout);
  /// Which head a masked language model has: `cls.predictions`, or `lm_predictions.lm_head`.
  TORCH_ARG(bool, legacy) = true;
  /// Whether a masked language model's output layer is the word vectors.
  TORCH_ARG(bool, tie_word_embeddings) = true;
  /// Names of the classifier's labels, in the order of their ids.
  TORCH_ARG(std::vector<std::string>, labels) = {"LABEL_0", "LABEL_1"};
  TORCH_ARG(ProblemType, problem_type) = ProblemType::automatic;

 public:
  int64_t num_labels() const { return static_cast<int64_t>(labels_.size()); }
  /// "LABEL_0" …, where there are not as many labels already.
  DebertaV2Config& num_labels(int64_t count) {
    TORCH_CHECK_VALUE(count > 0, "DebertaV2Config: num_labels must be positive, but got ", count);
    if (count == num_labels()) return *this;
    labels_.clear();
    for (int64_t i = 0; i < count; ++i) labels_.push_back("LABEL_" + std::to_string(i));
    return *this;
  }
  /// Replaces every dropout probability.
  DebertaV2Config& dropout(double probability) {
    hidden_dropout_prob_ = attention_probs_dropout_prob_ = pooler_dropout_ = probability;
    cls_dropout_ = probability;
    return *this;
  }

  /// Whether attention has a term: "c2p" or "p2c".
  bool attends(const char* term) const {
    return std::find(pos_att_type_.begin(), pos_att_type_.end(), term) != pos_att_type_.end();
  }
  /// The farthest distance that is told from others.
  int64_t farthest() const {
    return max_relative_positions_ < 1 ? max_position_embeddings_ : max_relative_positions_;
  }
  /// Vectors of distances in each direction.
  int64_t position_span() const { return position_buckets_ > 0 ? position_buckets_ : farthest(); }
  /// Of a word vector.
  int64_t word_width() const { return embedding_size_.value_or(hidden_size_); }

  /// The settings of the parts that are a BERT's: what follows attention in a block.
  BertConfig of_blocks() const {
    return BertConfig()
        .hidden_size(hidden_size_)
        .intermediate_size(intermediate_size_)
        .hidden_act(hidden_act_)
        .hidden_dropout_prob(hidden_dropout_prob_)
        .layer_norm_eps(layer_norm_eps_);
  }

  /// Reads a `config.json`. Absent keys have transformers' defaults.
  /// Throws: c10::ValueError naming the file and every key whose value will not do.
  static DebertaV2Config read(const std::filesystem::path& path) {
    ConfigReader reader(path);
    const DebertaV2Config standard;
    const auto size = [&reader](const char* key, int64_t absent) { return reader.integer(key, absent, 1); };
    const auto count = [&reader](const char* key, int64_t absent) { return reader.integer(key, absent, 0); };
    const auto probability = [&reader](const char* key, double absent) {
      return reader.number(key, absent, 0.0, 1.0);
    };
    DebertaV2Config config;
    peft::internal::check_model_type(reader, "DebertaV2");
    config.vocab_size(size("vocab_size", standard.vocab_size()));
    config.hidden_size(size("hidden_size", standard.hidden_size()));
    config.num_hidden_layers(reader.integer("num_hidden_layers", standard.num_hidden_layers(), 0, 10'000));
    config.num_attention_heads(size("num_attention_heads", standard.num_attention_heads()));
    config.intermediate_size(size("intermediate_size", standard.intermediate_size()));
    if (reader.has("embedding_size")) config.embedding_size(size("embedding_size", 1));
    config.hidden_act(reader.string("hidden_act", standard.hidden_act()));
    config.hidden_dropout_prob(probability("hidden_dropout_prob", standard.hidden_dropout_prob()));
    config.attention_probs_dropout_prob(
        probability("attention_probs_dropout_prob", standard.attention_probs_dropout_prob()));
    config.max_position_embeddings(size("max_position_embeddings", standard.max_position_embeddings()));
    config.type_vocab_size(count("type_vocab_size", standard.type_vocab_size()));
    config.layer_norm_eps(reader.number("layer_norm_eps", standard.layer_norm_eps(), 0.0, 1.0));
    config.initializer_range(reader.number("initializer_range", standard.initializer_range(), 0.0, 100.0));
    const auto last = config.vocab_size() - 1;
    config.pad_token_id(reader.has("pad_token_id") || !reader.json().contains("pad_token_id")
                            ? std::optional(reader.integer("pad_token_id", 0, -config.vocab_size(), last))
                            : std::nullopt);
    config.read_positions(reader);
    config.conv_kernel_size(count("conv_kernel_size", 0));
    config.conv_groups(size("conv_groups", standard.conv_groups()));
    config.conv_act(reader.string("conv_act", standard.conv_act()));
    config.pooler_dropout(probability("pooler_dropout", standard.pooler_dropout()));
    config.pooler_hidden_act(reader.string("pooler_hidden_act", standard.pooler_hidden_act()));
    if (reader.has("cls_dropout")) config.cls_dropout(probability("cls_dropout", 0.0));
    config.legacy(reader.boolean("legacy", standard.legacy()));
    // The other head has no matrix of its own.
    config.tie_word_embeddings(reader.boolean("tie_word_embeddings", true) || !config.legacy());
    config.labels(peft::internal::read_labels(reader));
    config.problem_type(peft::internal::read_problem_type(reader));
    config.check(reader);
    reader.finish();
    return config;
  }

  /// The same as a `config.json`.
  nlohmann::ordered_json json() const {
    nlohmann::ordered_json json{{"model_type", "deberta-v2"},
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
                                {"position_biased_input", position_biased_input_},
                                {"relative_attention", relative_attention_},
                                {"max_relative_positions", max_relative_positions_},
                                {"position_buckets", position_buckets_},
                                {"pos_att_type", pos_att_type_},
                                {"share_att_key", share_att_key_},
                                {"norm_rel_ebd", norm_rel_ebd_},
                                {"pooler_dropout", pooler_dropout_},
                                {"pooler_hidden_act", pooler_hidden_act_},
                                {"pooler_hidden_size", hidden_size_},
                                {"legacy", legacy_},
                                {"tie_word_embeddings", tie_word_embeddings_}};
    json["pad_token_id"] = nullptr;
    if (pad_token_id_) json["pad_token_id"] = *pad_token_id_;
    if (embedding_size_) json["embedding_size"] = *embedding_size_;
    if (cls_dropout_) json["cls_dropout"] = *cls_dropout_;
    if (conv_kernel_size_ > 0) {
      json["conv_kernel_size"] = conv_kernel_size_;
      json["conv_groups"] = conv_groups_;
      json["conv_act"] = conv_act_;
    }
    peft::internal::write_labels(json, labels_, problem_type_);
    return json;
  }

 private:
  void read_positions(ConfigReader& reader) {
    constexpr int64_t none = -1;
    position_biased_input_ = reader.boolean("position_biased_input", true);
    relative_attention_ = reader.boolean("relative_attention", false);
    max_relative_positions_ = reader.integer("max_relative_positions", none, none);
    position_buckets_ = reader.integer("position_buckets", none, none);
    share_att_key_ = reader.boolean("share_att_key", false);
    norm_rel_ebd_ = reader.string("norm_rel_ebd", "none");
    if (norm_rel_ebd_ != "none" && norm_rel_ebd_ != "layer_norm") {
      reader.complain("norm_rel_ebd", "must be \"layer_norm\" or \"none\"");
    }
    if (!reader.has("pos_att_type")) return;
    const auto& value = reader.json()["pos_att_type"];
    if (value.is_string()) {
      std::istringstream terms(value.get<std::string>());
      for (std::string term; std::getline(terms, term, '|');) {
        std::erase_if(term, [](unsigned char letter) { return std::isspace(letter); });
        std::transform(term.begin(), term.end(), term.begin(),
                       [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
        pos_att_type_.push_back(term);
      }
    } else if (value.is_array()) {
      for (const auto& term : value) pos_att_type_.push_back(term.is_string() ? term.get<std::string>() : "");
    }
    const bool known = std::all_of(pos_att_type_.begin(), pos_att_type_.end(),
                                   [](const std::string& term) { return term == "c2p" || term == "p2c"; });
    if (!known || !(value.is_string() || value.is_array())) {
      reader.complain("pos_att_type", R"(must hold "c2p", "p2c" or both, as a list or as "p2c|c2p")");
    }
  }

  /// What keys must be to each other.
  void check(ConfigReader& reader) const {
    const auto must = [&reader](bool holds, const char* key, const std::string& text) {
      if (!holds) reader.complain(key, "must be " + text);
    };
    must(hidden_size_ % num_attention_heads_ == 0, "hidden_size",
         "a multiple of 'num_attention_heads', " + std::to_string(num_attention_heads_));
    const auto head = hidden_size_ / num_attention_heads_;
    must(reader.integer("attention_head_size", head, 1) == head, "attention_head_size",
         "'hidden_size' over 'num_attention_heads', " + std::to_string(head));
    must(reader.integer("pooler_hidden_size", hidden_size_, 1) == hidden_size_, "pooler_hidden_size",
         "'hidden_size', " + std::to_string(hidden_size_));
    must(position_buckets_ < 1 || (position_buckets_ > 1 && farthest() > position_buckets_ / 2 + 1),
         "position_buckets",
         "2 or more, and half of them less than the farthest relative position, " +
             std::to_string(farthest() - 1));
    must(conv_kernel_size_ == 0 || conv_kernel_size_ % 2 == 1, "conv_kernel_size", "odd, or 0");
    must(hidden_size_ % conv_groups_ == 0, "conv_groups",
         "a divisor of 'hidden_size', " + std::to_string(hidden_size_));
    std::string names;
    for (const auto& [name, function] : activation_functions()) names += (names.empty() ? "" : ", ") + name;
    for (const auto& [key, name] : std::initializer_list<std::pair<const char*, const std::string&>>{
             {"hidden_act", hidden_act_},
             {"conv_act", conv_act_},
             {"pooler_hidden_act", pooler_hidden_act_}}) {
      must(activation_functions().count(name) > 0, key, "one of " + names);
    }
  }
};

}  // namespace peft::models
