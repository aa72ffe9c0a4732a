// TokenizerFolder: the tokenizer of a folder that has no tokenizer.json, but a
// vocabulary in an older form.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base64.h"
#include "sentencepiece_model.h"
#include "special_tokens.h"
#include "strict_json.h"

namespace text {

namespace internal {

/// Makes a tokenizer.json of a folder's files; see `tokenizer_json_of_folder`.
class FolderReader : private SpecialTokensReader {
 public:
  explicit FolderReader(const std::filesystem::path& folder) : SpecialTokensReader(folder) {}

  Json read() {
    read_settings();
    const std::string type = tokenizer_class();
    Json result = {
        {"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"normalizer", nullptr}};
    if (type == "RobertaTokenizer") make_roberta(result);
    if (type == "GPT2Tokenizer") make_gpt2(result);
    if (type == "BertTokenizer") make_bert(result);
    if (type == "DebertaV2Tokenizer") make_deberta(result);
    if (type == "XLMRobertaTokenizer") make_xlm_roberta(result);
    result["added_tokens"] = added_tokens();
    if (const auto pad = content("pad_token")) {
      result["padding"] = {{"pad_id", id(*pad)}};
    }
    finish();
    return result;
  }

 private:
  /// As AutoTokenizer chooses it: by tokenizer_config.json, else by the model's
  /// config.json.
  std::string tokenizer_class() {
    static const std::map<std::string, std::string> by_model = {{"bert", "BertTokenizer"},
                                                                {"roberta", "RobertaTokenizer"},
                                                                {"gpt2", "GPT2Tokenizer"},
                                                                {"deberta-v2", "DebertaV2Tokenizer"},
                                                                {"xlm-roberta", "XLMRobertaTokenizer"}};
    std::string name;
    const Json model = read_if_there("config.json");
    for (const Json* config : {&settings(), &model}) {
      if (name.empty() && config->contains("tokenizer_class") && (*config)["tokenizer_class"].is_string()) {
        name = (*config)["tokenizer_class"].get<std::string>();
      }
    }
    if (name.empty() && model.contains("model_type") && model["model_type"].is_string()) {
      const auto found = by_model.find(model["model_type"].get<std::string>());
      name = found == by_model.end() ? model["model_type"].get<std::string>() : found->second;
    }
    if (name.ends_with("Fast")) name.resize(name.size() - 4);
    for (const auto& [model_type, known] : by_model) {
      if (name == known) return name;
    }
    throw std::runtime_error(
        fmt::format("'{}' has no tokenizer.json, and {} (hint: without one, the "
                    "tokenizer_class of tokenizer_config.json or the "
                    "model_type of config.json must be of BERT, RoBERTa, GPT-2, DeBERTa-v2 "
                    "or XLM-RoBERTa; "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes "
                    "one)",
                    folder().string(),
                    name.empty() ? "does not say of what class its tokenizer is"
                                 : fmt::format("its tokenizer is of the class '{}'", name)));
  }

  std::filesystem::path file(const char* name) const {
    if (!std::filesystem::exists(folder() / name)) {
      throw std::runtime_error(
          fmt::format("'{}' has neither a tokenizer.json nor the {} its "
                      "tokenizer is made of",
                      folder().string(), name));
    }
    return folder() / name;
  }

  static std::vector<std::string> read_lines(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error(fmt::format("{}: cannot be opened for reading", path.string()));
    std::vector<std::string> lines;
    for (std::string line; std::getline(stream, line);) {
      if (line.ends_with('\r')) line.pop_back();
      lines.push_back(std::move(line));
    }
    return lines;
  }

  void make_byte_level(Json& result, bool add_prefix_space) {
    const Json vocabulary = read_json(file("vocab.json"));
    for (const auto& [token, token_id] : vocabulary.items()) {
      if (is_id(token_id)) know(token, token_id.get<std::int64_t>());
    }
    const Json byte_level = {{"type", "ByteLevel"},
                             {"add_prefix_space", add_prefix_space},
                             {"trim_offsets", true},
                             {"use_regex", true}};
    result["model"] = {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", read_lines(file("merges.txt"))}};
    result["pre_tokenizer"] = byte_level;
    result["decoder"] = byte_level;
  }

  void make_roberta(Json& result) {
    make_byte_level(result, flag("add_prefix_space", false));
    add_special({{"bos_token", "<s>"},
                 {"eos_token", "</s>"},
                 {"unk_token", "<unk>"},
                 {"sep_token", "</s>"},
                 {"pad_token", "<pad>"},
                 {"cls_token", "<s>"},
                 {"mask_token", "<mask>"}});
    const auto [cls, sep] = required("cls_token", "sep_token");
    result["post_processor"] = {{"type", "RobertaProcessing"},
                                {"cls", {cls, id(cls)}},
                                {"sep", {sep, id(sep)}},
                                {"trim_offsets", flag("trim_offsets", true)},
                                {"add_prefix_space", flag("add_prefix_space", false)}};
  }

  void make_gpt2(Json& result) {
    make_byte_level(result, flag("add_prefix_space", false));
    const std::string end = "<|endoftext|>";
    add_special({{"bos_token", end}, {"eos_token", end}, {"unk_token", end}});
    const std::string bos = flag("add_bos_token", false) ? content("bos_token").value_or("") : "";
    const std::string eos = flag("add_eos_token", false) ? content("eos_token").value_or("") : "";
    result["post_processor"] = processing({bos, "A0", eos}, {bos, "A0", eos, bos + ":1", "B1", eos + ":1"});
  }

  void make_bert(Json& result) {
    Json vocabulary = Json::object();
    const auto lines = read_lines(file("vocab.txt"));
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const std::string token = lines[i].substr(0, lines[i].find_last_not_of(" \t") + 1);
      vocabulary[token] = i;
      know(token, static_cast<std::int64_t>(i));
    }
    add_special({{"unk_token", "[UNK]"},
                 {"sep_token", "[SEP]"},
                 {"pad_token", "[PAD]"},
                 {"cls_token", "[CLS]"},
                 {"mask_token", "[MASK]"}});
    const Json accents = settings().value("strip_accents", Json());
    result["normalizer"] = {{"type", "BertNormalizer"},
                            {"clean_text", true},
                            {"handle_chinese_chars", flag("tokenize_chinese_chars", true)},
                            {"strip_accents", accents},
                            {"lowercase", flag("do_lower_case", true)}};
    result["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
    result["decoder"] = {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}};
    result["model"] = {{"type", "WordPiece"},
                       {"unk_token", content("unk_token").value_or("")},
                       {"continuing_subword_prefix", "##"},
                       {"max_input_chars_per_word", 100},
                       {"vocab", vocabulary}};
    make_bert_processing(result);
  }

  void make_bert_processing(Json& result) {
    const auto [cls, sep] = required("cls_token", "sep_token");
    result["post_processor"] = processing({cls, "A0", sep}, {cls, "A0", sep, "B1", sep + ":1"});
  }

  void make_unigram(Json& result, const SentencePieceModel& model, std::int64_t unk_id) {
    for (std::size_t i = 0; i < model.pieces.size(); ++i) {
      know(model.pieces[i].first, static_cast<std::int64_t>(i));
    }
    result["model"] = {{"type", "Unigram"}, {"unk_id", unk_id}, {"vocab", model.pieces}};
  }

  static Json metaspace(const char* scheme) {
    return {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", scheme}, {"split", true}};
  }

  void make_deberta(Json& result) {
    const SentencePieceModel model = read_sentencepiece(file("spm.model"));
    add_spare(model);
    const std::vector<std::pair<std::string, std::string>> tokens = {
        {"bos_token", "[CLS]"}, {"eos_token", "[SEP]"}, {"unk_token", "[UNK]"},  {"sep_token", "[SEP]"},
        {"pad_token", "[PAD]"}, {"cls_token", "[CLS]"}, {"mask_token", "[MASK]"}};
    // The unknown token where the vocabulary has it with a score of 0, else
    // where the file says.
    const auto unknown = std::find(model.pieces.begin(), model.pieces.end(),
                                   std::pair(content("unk_token", "[UNK]").value_or("None"), 0.0));
    make_unigram(result, model,
                 unknown == model.pieces.end() ? model.unk_id : unknown - model.pieces.begin());
    add_special(tokens);
    Json steps = Json::array();
    if (flag("do_lower_case", false)) steps.push_back({{"type", "Lowercase"}});
    steps.push_back({{"type", "Replace"}, {"pattern", {{"Regex", "\\s{2,}|[\\n\\r\\t]"}}}, {"content", " "}});
    steps.push_back({{"type", "NFC"}});
    steps.push_back({{"type", "Strip"}, {"strip_left", false}, {"strip_right", true}});
    result["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
    const Json words = metaspace(flag("add_prefix_space", true) ? "always" : "first");
    Json cuts = Json::array();
    if (flag("split_by_punct", false)) cuts.push_back({{"type", "Punctuation"}, {"behavior", "Isolated"}});
    cuts.push_back(words);
    result["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", cuts}};
    result["decoder"] = words;
    make_bert_processing(result);
  }

  void make_xlm_roberta(Json& result) {
    SentencePieceModel model = read_sentencepiece(file("sentencepiece.bpe.model"));
    add_spare(model);
    const std::vector<std::pair<std::string, std::string>> tokens = {
        {"bos_token", "<s>"},   {"eos_token", "</s>"}, {"unk_token", "<unk>"},  {"sep_token", "</s>"},
        {"pad_token", "<pad>"}, {"cls_token", "<s>"},  {"mask_token", "<mask>"}};
    // The file's first three make way for four others, and the mask comes last.
    auto pieces = std::move(model.pieces);
    pieces.erase(pieces.begin(), pieces.begin() + std::min<std::ptrdiff_t>(3, std::ssize(pieces)));
    for (const char* name : {"unk_token", "eos_token", "pad_token", "bos_token"}) {
      const auto token =
          std::find_if(tokens.begin(), tokens.end(), [&](const auto& t) { return t.first == name; });
      pieces.emplace(pieces.begin(), content(name, token->second).value_or("None"), 0.0);
    }
    pieces.emplace_back(content("mask_token", "<mask>").value_or("None"), 0.0);
    model.pieces = std::move(pieces);
    make_unigram(result, model, 3);
    add_special(tokens);
    if (!model.charsmap.empty()) {
      result["normalizer"] = {{"type", "Precompiled"},
                              {"precompiled_charsmap", encode_base64(model.charsmap)}};
    }
    const Json words = metaspace(flag("add_prefix_space", true) ? "always" : "never");
    result["pre_tokenizer"] = {{"type", "Sequence"},
                               {"pretokenizers", {{{"type", "WhitespaceSplit"}}, words}}};
    result["decoder"] = words;
    const auto [bos, eos] = required("bos_token", "eos_token");
    result["post_processor"] = processing({bos, "A0", eos}, {bos, "A0", eos, eos, "B0", eos});
  }
};

}  // namespace internal

/// The tokenizer.json that a folder without one stands for, with the pieces,
/// special tokens and settings of the files it has in its place, as
/// transformers' AutoTokenizer (5.23) makes it:
///   vocab.txt                BERT: WordPiece;
///   vocab.json, merges.txt   RoBERTa and GPT-2: byte-level BPE;
///   spm.model                DeBERTa-v2 and -v3: Unigram, which does without
///   the file's own table of replacements; sentencepiece.bpe.model XLM-RoBERTa:
///   Unigram with that table.
/// Special tokens are those of tokenizer_config.json, special_tokens_map.json
/// and added_tokens.json. Throws: std::runtime_error naming folder or file
/// where something is missing or wrong.
inline internal::Json tokenizer_json_of_folder(const std::filesystem::path& folder) {
  return internal::FolderReader(folder).read();
}

/// Refuses a folder whose tokenizer_config.json and tokenizer.json differ in how
/// BERT's texts are normalised, or in the blank before the first word of RoBERTa
/// and GPT-2: transformers' AutoTokenizer follows the first, other programs the
/// second. Throws: std::runtime_error naming both.
inline void check_settings_agree(const std::filesystem::path& folder) {
  const auto path = folder / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return;
  const internal::Json settings = internal::read_json(path);
  const auto is_set = [&](const std::string& name) {
    return settings.is_object() && settings.contains(name) && settings.at(name).is_boolean();
  };
  const std::vector<std::pair<std::string, std::string>> of_bert{
      {"do_lower_case", "lowercase"},
      {"strip_accents", "strip_accents"},
      {"tokenize_chinese_chars", "handle_chinese_chars"}};
  // Other classes' tokenizers are their tokenizer.json alone.
  const auto named =
      settings.is_object() ? settings.value("tokenizer_class", internal::Json()) : internal::Json();
  const auto made_by = named.is_string() ? named.get<std::string>() : std::string();
  const bool adds_blank = made_by.starts_with("RobertaTokenizer") || made_by.starts_with("GPT2Tokenizer");
  if (!adds_blank &&
      std::none_of(of_bert.begin(), of_bert.end(), [&](const auto& each) { return is_set(each.first); })) {
    return;
  }
  const internal::Json file = internal::read_json(folder / "tokenizer.json");
  const auto part = [&](const char* name, const char* type) {
    const auto found = file.is_object() && file.contains(name) ? file.at(name) : internal::Json();
    const bool is_type = found.is_object() && found.value("type", internal::Json()) == type;
    return is_type ? found : internal::Json::object();
  };
  const auto require = [&](const std::string& setting, const internal::Json& wanted, const char* of,
                           const std::string& key, const internal::Json& value) {
    if (value == wanted) return;
    throw std::runtime_error(fmt::format(
        "{}: '{}' is {}, but the {} of tokenizer.json has '{}': {} (hint: transformers follows the "
        "first; save_pretrained of its tokenizer writes both alike)",
        path.string(), setting, wanted.dump(), of, key, value.dump()));
  };
  const auto normalizer = part("normalizer", "BertNormalizer");
  for (const auto& [setting, key] : of_bert) {
    if (normalizer.empty()) break;
    auto value = normalizer.value(key, internal::Json());
    // Without a word, accents go with the case.
    if (value.is_null() && key == "strip_accents") value = normalizer.value("lowercase", internal::Json());
    if (is_set(setting)) require(setting, settings.at(setting), "normalizer", key, value);
  }
  const auto bytes = part("pre_tokenizer", "ByteLevel");
  const std::string blank = "add_prefix_space";
  if (adds_blank && !bytes.empty()) {
    require(blank, is_set(blank) ? settings.at(blank) : internal::Json(false), "pre_tokenizer", blank,
            bytes.value(blank, internal::Json(true)));
  }
}

}  // namespace text
