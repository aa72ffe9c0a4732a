// TrainableTokensFormat: trainable tokens in Hugging Face PEFT's files (peft_type TRAINABLE_TOKENS).
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/peft_format.h"
#include "peft/io/peft_places.h"
#include "peft/methods/trainable_tokens.h"

namespace peft::internal {

/// The name of a base's input embedding, by its `model_type`; what Python falls back on for others.
inline std::string input_embedding_name(const std::string& model_type) {
  struct Row {
    std::vector<const char*> types;
    const char* name;
  };
  static const std::vector<Row> table{
      {{"bert", "roberta", "xlm-roberta", "electra", "layoutlm", "deberta", "deberta-v2", "bloom"},
       "word_embeddings"},
      {{"gpt2", "gpt_bigcode", "gptj", "gpt_neo", "codegen", "mpt"}, "wte"},
      {{"t5", "mt5", "bart"}, "shared"},
      {{"gpt_neox"}, "embed_in"},
  };
  for (const auto& row : table) {
    if (std::find(row.types.begin(), row.types.end(), model_type) != row.types.end()) return row.name;
  }
  return "embed_tokens";
}

/// Reads a list of tokens. What is wrong is complained about under `key`.
inline std::vector<int64_t> read_tokens(ConfigFields& fields, const std::string& key,
                                        const nlohmann::ordered_json& list) {
  std::vector<int64_t> tokens;
  std::set<int64_t> seen;
  bool fits = list.is_array() && !list.empty();
  for (const auto& item : list) {
    fits = fits && item.is_number_integer() && item >= 0 && item <= std::numeric_limits<int32_t>::max() &&
           seen.insert(item.get<int64_t>()).second;
    if (fits) tokens.push_back(item.get<int64_t>());
  }
  if (!fits) fields.complain(key, "must hold lists of different tokens, each an integer of at least 0");
  return tokens;
}

class TrainableTokensFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "TRAINABLE_TOKENS"; }
  std::string title() const override { return "trainable tokens"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({"init_weights": true, "target_modules": null, "token_indices": []})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const TrainableTokensImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    return {
        {"trainable_tokens_delta", static_cast<const TrainableTokensImpl&>(piece).trainable_tokens_delta}};
  }
  /// Of a tied embedding Python writes them once more, under its head.
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    std::vector<DiskTensor> repeated;
    for (const auto& entry : entries) {
      for (const auto& head : entry.site->info().tied) {
        repeated.push_back({std::string(model_prefix) + head + ".trainable_tokens_delta",
                            tensors(*entry.piece).front().tensor});
      }
    }
    return repeated;
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems& problems) const override {
    const auto options = [](const Adapter::Entry& entry) -> const TrainableTokensOptions& {
      return static_cast<const TrainableTokensImpl&>(*entry.piece).options;
    };
    const auto& first = entries.front();
    for (const auto& entry : entries) {
      if (options(entry).indices() == options(first).indices()) continue;
      problems.add("'" + entry.site->path() + "' must train the same tokens as '" + first.site->path() +
                   "', for one config holds one list of them (hint: make them two adapters)");
    }
    json["token_indices"] = options(first).indices();
    json["init_weights"] = options(first).init();
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const char* key = "token_indices";
    const auto tokens = read_tokens(fields, key, fields.value(key));
    const bool init = fields.boolean("init_weights", true);
    return [tokens, init](Target target) {
      return on(TrainableTokensOptions(tokens).init(init), std::move(target));
    };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return {input_embedding_name(model_type)};
  }
};

}  // namespace peft::internal
