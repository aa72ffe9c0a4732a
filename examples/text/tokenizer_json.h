// TokenizerJson: a WordPiece or byte-level BPE tokenizer as Hugging Face's tokenizer.json describes it, read
// strictly.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "added_tokens.h"
#include "bert_text.h"
#include "byte_level.h"
#include "strict_json.h"
#include "template_json.h"

namespace text {

/// Ids by token.
using Vocabulary = std::unordered_map<std::string, std::int64_t>;

/// What a file with WordPiece says of its model.
struct WordPieceSettings {
  BertNormalizer normalizer;
  std::string unk_token;
  std::string continuing_subword_prefix;
  std::int64_t max_input_chars_per_word = 0;
};

/// What a file with byte-level BPE says of its model.
struct BpeSettings {
  /// Puts a blank before each text, and behind each added token, where there is none.
  bool add_prefix_space = false;
  /// Cuts into GPT-2's words; else a text is one word.
  bool use_regex = true;
  /// A word that is a token is not built by merges.
  bool ignore_merges = false;
  /// Pairs of tokens that join, the first ones first.
  std::vector<std::pair<std::string, std::string>> merges;
};

/// What a tokenizer.json says. Its truncation and padding are the caller's business and not kept, but for
/// the id of the padding token.
struct TokenizerJson {
  std::variant<WordPieceSettings, BpeSettings> model;
  std::shared_ptr<const Vocabulary> vocabulary;
  /// In the file's order.
  std::vector<AddedToken> added_tokens;
  Templates templates;
  std::optional<std::int64_t> pad_id;
};

namespace internal {

/// Reads one file; see `read_tokenizer_json`.
class TokenizerJsonReader : private TemplateJsonReader {
 public:
  explicit TokenizerJsonReader(std::filesystem::path path) : TemplateJsonReader(std::move(path)) {}

  TokenizerJson read() {
    const Json root = parse();
    TokenizerJson result;
    if (expect_object(root, "")) {
      if (root.contains("version") && root["version"] != "1.0") {
        problem("version", fmt::format("must be \"1.0\", but got {}", shown(root["version"])));
      }
      Vocabulary vocabulary;
      if (const Json* model = object(root, "model")) {
        // The oldest files do not name the model's type.
        const std::string type = model->contains("type")     ? kind(*model, "model", {"WordPiece", "BPE"})
                                 : model->contains("merges") ? "BPE"
                                                             : "WordPiece";
        if (!type.empty()) vocabulary = read_vocabulary(*model);
        if (type == "WordPiece") result.model = read_wordpiece(root, *model, vocabulary);
        if (type == "BPE") result.model = read_bpe(root, *model, vocabulary);
      }
      result.added_tokens = read_added_tokens(root, vocabulary);
      result.templates = read_templates(root);
      result.pad_id = read_pad_id(root, vocabulary, result.added_tokens);
      result.vocabulary = std::make_shared<const Vocabulary>(std::move(vocabulary));
    }
    finish();
    return result;
  }

 private:
  Vocabulary read_vocabulary(const Json& model) {
    Vocabulary result;
    if (!model.contains("vocab")) {
      problem("model.vocab", "is missing");
      return result;
    }
    const Json& vocabulary = model["vocab"];
    if (!expect_object(vocabulary, "model.vocab")) return result;
    if (vocabulary.empty()) problem("model.vocab", "must hold tokens, but is empty");
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
      result.emplace(token, id.get<std::int64_t>());
    }
    return result;
  }

  WordPieceSettings read_wordpiece(const Json& root, const Json& model, const Vocabulary& vocabulary) {
    WordPieceSettings result;
    read_normalizer(root, result.normalizer);
    if (const Json* pre_tokenizer = object(root, "pre_tokenizer")) {
      kind(*pre_tokenizer, "pre_tokenizer", {"BertPreTokenizer"});
    }
    const std::string key = "model";
    result.unk_token = string(model, key, "unk_token");
    result.continuing_subword_prefix = string(model, key, "continuing_subword_prefix");
    result.max_input_chars_per_word = integer(model, key, "max_input_chars_per_word");
    if (model.contains("unk_token") && vocabulary.count(result.unk_token) == 0) {
      problem(
          "model.unk_token",
          fmt::format("must be a token of model.vocab, but got '{}', which is not in it", result.unk_token));
    }
    return result;
  }

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

  BpeSettings read_bpe(const Json& root, const Json& model, const Vocabulary& vocabulary) {
    BpeSettings result;
    if (root.contains("normalizer") && !root["normalizer"].is_null()) {
      problem("normalizer", fmt::format("must be null with BPE, but got {}", shown(root["normalizer"])));
    }
    const std::string place = "pre_tokenizer";
    if (const Json* part = object(root, place); part && !kind(*part, place, {"ByteLevel"}).empty()) {
      result.add_prefix_space = boolean(*part, place, "add_prefix_space");
      if (part->contains("use_regex")) result.use_regex = boolean(*part, place, "use_regex");
    }
    if (const Json* part = object(root, "decoder")) kind(*part, "decoder", {"ByteLevel"});

    const auto absent = [&](const char* key, const Json& allowed) {
      if (model.contains(key) && !model[key].is_null() && model[key] != allowed) {
        problem(join("model", key), fmt::format("must be null or {} with byte-level BPE, but got {}",
                                                allowed.dump(), shown(model[key])));
      }
    };
    absent("dropout", 0.0);
    absent("continuing_subword_prefix", "");
    absent("end_of_word_suffix", "");
    if (model.contains("ignore_merges")) result.ignore_merges = boolean(model, "model", "ignore_merges");

    // With all of them there is no unknown character, so `unk_token` and its options do not count.
    std::vector<std::string> bytes;
    for (const char32_t character : byte_alphabet()) {
      std::string token = encode_utf8({&character, 1});
      if (vocabulary.count(token) == 0) bytes.push_back(std::move(token));
    }
    if (!bytes.empty()) {
      problem("model.vocab",
              fmt::format("must hold a token for every byte, but lacks {} of 256, such as '{}' (hint: train "
                          "with ByteLevel's alphabet as the initial one)",
                          bytes.size(), bytes.front()));
    }
    read_merges(model, vocabulary, result);
    return result;
  }

  /// Both forms: "a b", and [a, b], which may hold blanks.
  void read_merges(const Json& model, const Vocabulary& vocabulary, BpeSettings& result) {
    if (!model.contains("merges") || !model["merges"].is_array()) {
      return problem("model.merges", model.contains("merges")
                                         ? "must be a list, but got " + shown(model["merges"])
                                         : "is missing");
    }
    const Json& merges = model["merges"];
    for (std::size_t i = 0; i < merges.size(); ++i) {
      const std::string key = fmt::format("model.merges[{}]", i);
      std::string left, right;
      if (const Json& merge = merges[i]; merge.is_string()) {
        const auto line = merge.get<std::string>();
        if (line.starts_with("#version")) continue;
        const auto blank = line.find(' ');
        if (blank != std::string::npos && line.find(' ', blank + 1) == std::string::npos) {
          left = line.substr(0, blank);
          right = line.substr(blank + 1);
        }
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      }
      if (left.empty() || right.empty()) {
        problem(key,
                fmt::format("must be two tokens, \"a b\" or [\"a\", \"b\"], but got {}", shown(merges[i])));
        continue;
      }
      for (const std::string& token : {left, right, left + right}) {
        if (vocabulary.count(token) == 0) {
          problem(key, fmt::format("must join tokens of model.vocab to one, but '{}' is not in it", token));
        }
      }
      result.merges.emplace_back(std::move(left), std::move(right));
    }
  }

  std::vector<AddedToken> read_added_tokens(const Json& root, const Vocabulary& vocabulary) {
    std::vector<AddedToken> result;
    if (!root.contains("added_tokens")) return result;
    const Json& tokens = root["added_tokens"];
    if (!tokens.is_array()) {
      problem("added_tokens", fmt::format("must be a list, but got {}", shown(tokens)));
      return result;
    }
    // A token the vocabulary lacks gets the next free id, whatever the file says: the two must agree.
    auto next_id = static_cast<std::int64_t>(vocabulary.size());
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
      token.special = boolean(tokens[i], key, "special");
      if (!tokens[i].contains("content") || !tokens[i].contains("id")) continue;
      if (token.content.empty()) problem(key + ".content", "must not be empty");
      if (!contents.insert(token.content).second) {
        problem(key + ".content",
                fmt::format("must be listed once, but '{}' is listed before", token.content));
        continue;
      }
      const auto known = vocabulary.find(token.content);
      const std::int64_t id = known != vocabulary.end() ? known->second : next_id++;
      if (token.id != id) {
        problem(key + ".id", fmt::format("must be {} for '{}', but got {}", id, token.content, token.id));
      }
      result.push_back(std::move(token));
    }
    return result;
  }

  std::optional<std::int64_t> read_pad_id(const Json& root, const Vocabulary& vocabulary,
                                          const std::vector<AddedToken>& added_tokens) {
    if (root.contains("padding") && root["padding"].is_object()) {
      return integer(root["padding"], "padding", "pad_id");
    }
    for (const char* token : {"[PAD]", "<pad>"}) {
      if (const auto found = vocabulary.find(token); found != vocabulary.end()) return found->second;
      for (const AddedToken& added : added_tokens) {
        if (added.content == token) return added.id;
      }
    }
    return std::nullopt;
  }
};

}  // namespace internal

/// Reads a tokenizer.json with either BertNormalizer, BertPreTokenizer and WordPiece, or ByteLevel and BPE,
/// and one of TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel and no post-processor. Throws:
/// std::runtime_error naming the file and every key that is missing, unsupported or wrong.
inline TokenizerJson read_tokenizer_json(const std::filesystem::path& path) {
  return internal::TokenizerJsonReader(path).read();
}

}  // namespace text
