// TokenizerJson: a WordPiece tokenizer as Hugging Face's tokenizer.json describes it, read strictly.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "bert_text.h"
#include "strict_json.h"

namespace text {

/// One piece of a post-processing template: the first or the second text, or fixed ids.
struct TemplatePiece {
  /// What stands here.
  enum class Kind { kFirst, kSecond, kFixed };
  Kind kind = Kind::kFixed;
  /// The ids of a fixed piece.
  std::vector<std::int64_t> ids;
  /// The type id of every position of the piece.
  std::int64_t type_id = 0;
};

/// What a tokenizer.json says. Its truncation and padding are the caller's business and not kept, but for
/// the id of the padding token.
struct TokenizerJson {
  BertNormalizer normalizer;
  /// In the file's order.
  std::vector<AddedToken> added_tokens;
  std::string unk_token;
  std::string continuing_subword_prefix;
  std::int64_t max_input_chars_per_word = 0;
  std::unordered_map<std::string, std::int64_t> vocabulary;
  /// The template of one text, and of two.
  std::vector<TemplatePiece> single, pair;
  std::optional<std::int64_t> pad_id;
};

namespace internal {

/// Reads one file; see `read_tokenizer_json`.
class TokenizerJsonReader : private StrictJson {
 public:
  explicit TokenizerJsonReader(std::filesystem::path path) : StrictJson(std::move(path)) {}

  TokenizerJson read() {
    const Json root = parse();
    TokenizerJson result;
    if (expect_object(root, "")) {
      if (root.contains("version") && root["version"] != "1.0") {
        problem("version", fmt::format("must be \"1.0\", but got {}", shown(root["version"])));
      }
      read_normalizer(root, result.normalizer);
      if (const Json* pre_tokenizer = object(root, "pre_tokenizer")) {
        kind(*pre_tokenizer, "pre_tokenizer", {"BertPreTokenizer"});
      }
      read_model(root, result);
      read_added_tokens(root, result);
      read_post_processor(root, result);
      if (root.contains("padding") && root["padding"].is_object()) {
        result.pad_id = integer(root["padding"], "padding", "pad_id");
      } else if (const auto pad = result.vocabulary.find("[PAD]"); pad != result.vocabulary.end()) {
        result.pad_id = pad->second;
      }
    }
    finish();
    return result;
  }

 private:
  void read_normalizer(const Json& root, BertNormalizer& normalizer) {
    const std::string key = "normalizer";
    const Json* part = object(root, key);
    if (part == nullptr || kind(*part, key, {"BertNormalizer"}).empty()) return;
    normalizer.clean_text = boolean(*part, key, "clean_text");
    normalizer.handle_chinese_chars = boolean(*part, key, "handle_chinese_chars");
    normalizer.lowercase = boolean(*part, key, "lowercase");
    if (part->contains("strip_accents") && !(*part)["strip_accents"].is_null()) {
      normalizer.strip_accents = boolean(*part, key, "strip_accents");
    }
  }

  void read_model(const Json& root, TokenizerJson& result) {
    const std::string key = "model";
    const Json* model = object(root, key);
    // The oldest files do not name the model's type.
    if (model == nullptr || (model->contains("type") && kind(*model, key, {"WordPiece"}).empty())) return;
    result.unk_token = string(*model, key, "unk_token");
    result.continuing_subword_prefix = string(*model, key, "continuing_subword_prefix");
    result.max_input_chars_per_word = integer(*model, key, "max_input_chars_per_word");
    if (!model->contains("vocab")) return problem("model.vocab", "is missing");
    const Json& vocabulary = (*model)["vocab"];
    if (!expect_object(vocabulary, "model.vocab")) return;
    if (vocabulary.empty()) return problem("model.vocab", "must hold tokens, but is empty");
    std::unordered_map<std::int64_t, std::string> by_id;
    for (const auto& [token, id] : vocabulary.items()) {
      if (!is_id(id)) {
        problem("model.vocab." + token,
                fmt::format("must be a whole number from 0 to {}, but got {}", largest_id, shown(id)));
        continue;
      }
      const auto [other, fresh] = by_id.emplace(id.get<std::int64_t>(), token);
      if (!fresh) {
        problem("model.vocab." + token,
                fmt::format("must have an id of its own, but got {}, which '{}' has too", id.dump(),
                            other->second));
      }
      result.vocabulary.emplace(token, id.get<std::int64_t>());
    }
    if (model->contains("unk_token") && result.vocabulary.count(result.unk_token) == 0) {
      problem(
          "model.unk_token",
          fmt::format("must be a token of model.vocab, but got '{}', which is not in it", result.unk_token));
    }
  }

  void read_added_tokens(const Json& root, TokenizerJson& result) {
    if (!root.contains("added_tokens")) return;
    const Json& tokens = root["added_tokens"];
    if (!tokens.is_array()) {
      return problem("added_tokens", fmt::format("must be a list, but got {}", shown(tokens)));
    }
    // A token the vocabulary lacks gets the next free id, whatever the file says: the two must agree.
    auto next_id = static_cast<std::int64_t>(result.vocabulary.size());
    std::set<std::string> contents;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::string key = fmt::format("added_tokens[{}]", i);
      if (!expect_object(tokens[i], key)) continue;
      AddedToken token;
      token.id = integer(tokens[i], key, "id");
      token.content = string(tokens[i], key, "content");
      token.single_word = boolean(tokens[i], key, "single_word");
      token.lstrip = boolean(tokens[i], key, "lstrip");
      token.rstrip = boolean(tokens[i], key, "rstrip");
      token.normalized = boolean(tokens[i], key, "normalized");
      boolean(tokens[i], key, "special");
      if (!tokens[i].contains("content") || !tokens[i].contains("id")) continue;
      if (token.content.empty()) problem(key + ".content", "must not be empty");
      if (!contents.insert(token.content).second) {
        problem(key + ".content",
                fmt::format("must be listed once, but '{}' is listed before", token.content));
        continue;
      }
      const auto known = result.vocabulary.find(token.content);
      const std::int64_t id = known != result.vocabulary.end() ? known->second : next_id++;
      if (token.id != id) {
        problem(key + ".id", fmt::format("must be {} for '{}', but got {}", id, token.content, token.id));
      }
      result.added_tokens.push_back(std::move(token));
    }
  }

  void read_post_processor(const Json& root, TokenizerJson& result) {
    const std::string key = "post_processor";
    const Json* part = object(root, key);
    if (part == nullptr) return;
    const std::string type = kind(*part, key, {"TemplateProcessing", "BertProcessing"});
    using Kind = TemplatePiece::Kind;
    if (type == "BertProcessing") {
      const std::int64_t cls = token_pair(*part, "cls");
      const std::int64_t sep = token_pair(*part, "sep");
      result.single = {{Kind::kFixed, {cls}, 0}, {Kind::kFirst, {}, 0}, {Kind::kFixed, {sep}, 0}};
      result.pair = result.single;
      result.pair.push_back({Kind::kSecond, {}, 1});
      result.pair.push_back({Kind::kFixed, {sep}, 1});
    } else if (type == "TemplateProcessing") {
      result.single = read_template(*part, "single", false);
      result.pair = read_template(*part, "pair", true);
    }
  }

  /// BertProcessing's `["[SEP]", 102]`.
  std::int64_t token_pair(const Json& part, const std::string& name) {
    const std::string key = "post_processor." + name;
    if (!part.contains(name)) {
      problem(key, "is missing");
    } else if (const Json& pair = part[name];
               !pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !is_id(pair[1])) {
      problem(key, fmt::format("must be [token, id], but got {}", shown(pair)));
    } else {
      return pair[1].get<std::int64_t>();
    }
    return 0;
  }

  std::vector<TemplatePiece> read_template(const Json& part, const std::string& name, bool pair) {
    const std::string key = "post_processor." + name;
    std::vector<TemplatePiece> pieces;
    if (!part.contains(name) || !part[name].is_array()) {
      problem(key, part.contains(name) ? "must be a list, but got " + shown(part[name]) : "is missing");
      return pieces;
    }
    for (std::size_t i = 0; i < part[name].size(); ++i) {
      const std::string here = fmt::format("{}[{}]", key, i);
      const Json& entry = part[name][i];
      const std::string tag = entry.is_object() && entry.size() == 1 ? entry.begin().key() : "";
      if ((tag != "Sequence" && tag != "SpecialToken") || !entry[tag].is_object()) {
        problem(here, fmt::format("must be a Sequence or a SpecialToken, but got {}", shown(entry)));
        continue;
      }
      TemplatePiece piece;
      piece.type_id = integer(entry[tag], here, "type_id");
      const std::string id = string(entry[tag], here, "id");
      if (tag == "SpecialToken") {
        piece.ids = special_token(part, id);
      } else if (id == "A" || (pair && id == "B")) {
        piece.kind = id == "A" ? TemplatePiece::Kind::kFirst : TemplatePiece::Kind::kSecond;
      } else {
        problem(here + ".id", fmt::format("must be {}, but got '{}'", pair ? "A or B" : "A", id));
      }
      pieces.push_back(std::move(piece));
    }
    return pieces;
  }

  std::vector<std::int64_t> special_token(const Json& part, const std::string& id) {
    const std::string key = fmt::format("post_processor.special_tokens.{}", id);
    const auto tokens = part.find("special_tokens");
    if (tokens == part.end() || !tokens->is_object() || !tokens->contains(id)) {
      problem(key, "is missing, but a template uses it");
      return {};
    }
    const Json& token = (*tokens)[id];
    const bool good = token.is_object() && token.contains("ids") && token["ids"].is_array() &&
                      std::all_of(token["ids"].begin(), token["ids"].end(), is_id);
    if (!good) {
      problem(key + ".ids", fmt::format("must be a list of ids, but got {}", shown(token)));
      return {};
    }
    return token["ids"].get<std::vector<std::int64_t>>();
  }
};

}  // namespace internal

/// Reads a tokenizer.json with BertNormalizer, BertPreTokenizer, WordPiece and TemplateProcessing or
/// BertProcessing.
/// Throws: std::runtime_error naming the file and every key that is missing, unsupported or wrong.
inline TokenizerJson read_tokenizer_json(const std::filesystem::path& path) {
  return internal::TokenizerJsonReader(path).read();
}

}  // namespace text
