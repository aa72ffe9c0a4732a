// TokenizerJson: a WordPiece, byte-level BPE or Unigram tokenizer as Hugging
// Face's tokenizer.json describes it, read strictly.
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "added_tokens.h"
#include "decoders.h"
#include "model_json.h"
#include "model_settings.h"
#include "normalizers.h"
#include "pre_tokenizers.h"
#include "template_json.h"

namespace text {

/// What a tokenizer.json says. Its truncation and padding are the caller's
/// business and not kept, but for the id of the padding token.
struct TokenizerJson {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::variant<WordPieceSettings, BpeSettings, UnigramSettings> model;
  std::shared_ptr<const Vocabulary> vocabulary;
  /// In the file's order.
  std::vector<AddedToken> added_tokens;
  Templates templates;
  Decoder decoder;
  std::optional<std::int64_t> pad_id;
};

namespace internal {

/// Reads one file; see `read_tokenizer_json`.
class TokenizerJsonReader : private ModelJsonReader {
 public:
  explicit TokenizerJsonReader(std::filesystem::path path) : ModelJsonReader(std::move(path)) {}

  TokenizerJson read() { return read(parse(), /*exact=*/false); }

  /// The same of what no file holds.
  TokenizerJson read(const Json& root, bool exact) {
    TokenizerJson result;
    if (expect_object(root, "")) {
      if (root.contains("version") && root["version"] != "1.0") {
        problem("version", fmt::format("must be \"1.0\", but got {}", shown(root["version"])));
      }
      Vocabulary vocabulary;
      if (const Json* model = object(root, "model")) {
        // The oldest files do not name the model's type.
        const std::string type = model->contains("type")
                                     ? kind(*model, "model", {"WordPiece", "BPE", "Unigram"})
                                 : model->contains("merges") ? "BPE"
                                                             : "WordPiece";
        if (type == "WordPiece" || type == "BPE") vocabulary = read_vocabulary(*model);
        if (type == "WordPiece") {
          result.model = read_wordpiece(*model, vocabulary);
          read_bert_parts(root, result);
        } else if (type == "BPE") {
          result.model = read_bpe(*model, vocabulary);
          read_byte_level_parts(root, result);
        } else if (type == "Unigram") {
          result.model = read_unigram(*model, vocabulary, exact);
          read_unigram_parts(root, result);
        }
        vocabulary_size_ =
            type == "Unigram" ? std::get<UnigramSettings>(result.model).pieces.size() : vocabulary.size();
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
  void read_bert_parts(const Json& root, TokenizerJson& result) {
    const std::string key = "normalizer";
    if (const Json* part = object(root, key); part && !kind(*part, key, {"BertNormalizer"}).empty()) {
      result.normalizer.add(read_bert_normalizer(*part, key));
    }
    if (const Json* part = object(root, "pre_tokenizer")) kind(*part, "pre_tokenizer", {"BertPreTokenizer"});
    result.pre_tokenizer.parts.emplace_back(BertPreTokenizer{});
    result.decoder = read_decoder(root);
  }

  void read_byte_level_parts(const Json& root, TokenizerJson& result) {
    if (!is_absent(root, "normalizer")) {
      problem("normalizer", fmt::format("must be null with BPE, but got {}", shown(root["normalizer"])));
    }
    const std::string place = "pre_tokenizer";
    if (const Json* part = object(root, place); part && !kind(*part, place, {"ByteLevel"}).empty()) {
      ByteLevel words;
      words.add_prefix_space = boolean(*part, place, "add_prefix_space");
      if (part->contains("use_regex")) words.use_regex = boolean(*part, place, "use_regex");
      result.pre_tokenizer.parts.emplace_back(words);
    }
    if (const Json* part = object(root, "decoder")) kind(*part, "decoder", {"ByteLevel"});
    result.decoder = ByteLevelDecoder{};
  }

  void read_unigram_parts(const Json& root, TokenizerJson& result) {
    if (!is_absent(root, "normalizer")) read_normalizer(root["normalizer"], "normalizer", result.normalizer);
    if (!is_absent(root, "pre_tokenizer")) {
      read_pre_tokenizer(root["pre_tokenizer"], "pre_tokenizer", result.pre_tokenizer);
    }
    for (const PreTokenizerPart& part : result.pre_tokenizer.parts) {
      const auto* metaspace = std::get_if<Metaspace>(&part);
      if (metaspace && metaspace->prepend == Metaspace::Prepend::kFirst && !result.normalizer.keeps_start()) {
        problem("pre_tokenizer",
                "must not have the prepend_scheme first behind a normalizer "
                "that makes several characters of one");
      }
    }
    result.decoder = read_decoder(root);
  }

  std::vector<AddedToken> read_added_tokens(const Json& root, const Vocabulary& vocabulary) {
    std::vector<AddedToken> result;
    if (!root.contains("added_tokens")) return result;
    const Json& tokens = root["added_tokens"];
    if (!tokens.is_array()) {
      problem("added_tokens", fmt::format("must be a list, but got {}", shown(tokens)));
      return result;
    }
    // A token the vocabulary lacks gets the next free id, whatever the file
    // says: the two must agree.
    auto next_id = static_cast<std::int64_t>(vocabulary_size_);
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

  std::size_t vocabulary_size_ = 0;
};

}  // namespace internal

/// Reads a tokenizer.json with BertNormalizer, BertPreTokenizer and WordPiece;
/// ByteLevel and BPE; or Unigram behind the normalizers and pre-tokenizers of
/// normalizers.h and pre_tokenizers.h, but ByteLevel; and one of
/// TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel and no
/// post-processor. Throws: std::runtime_error naming the file and every key
/// that is missing, unsupported or wrong.
inline TokenizerJson read_tokenizer_json(const std::filesystem::path& path) {
  return internal::TokenizerJsonReader(path).read();
}

}  // namespace text
