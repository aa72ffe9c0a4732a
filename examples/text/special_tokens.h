// SpecialTokens: the added tokens that a folder's tokenizer_config.json,
// special_tokens_map.json and added_tokens.json make together.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sentencepiece_model.h"
#include "strict_json.h"

namespace text::internal {

/// Reads them as transformers does. A token is a name, or an object with its
/// content and how it is found.
class SpecialTokensReader : protected StrictJson {
 protected:
  explicit SpecialTokensReader(const std::filesystem::path& folder) : StrictJson(folder), folder_(folder) {}

  const std::filesystem::path& folder() const { return folder_; }
  /// The keys of tokenizer_config.json, and those of special_tokens_map.json
  /// that count.
  const Json& settings() const { return settings_; }

  Json read_if_there(const char* name) const {
    return std::filesystem::exists(folder_ / name) ? read_json(folder_ / name) : Json::object();
  }

  void read_settings() {
    settings_ = read_if_there("tokenizer_config.json");
    if (!expect_object(settings_, "tokenizer_config.json")) settings_ = Json::object();
    if (settings_.contains("additional_special_tokens") &&
        settings_.value("extra_special_tokens", Json()).empty()) {
      settings_["extra_special_tokens"] = settings_["additional_special_tokens"];
      settings_.erase("additional_special_tokens");
    }
    for (const auto& [key, value] : settings_.items()) {
      const bool named = std::find(names.begin(), names.end(), key) != names.end();
      if (key.ends_with("_token") && !named && (value.is_string() || value.is_object())) {
        problem("tokenizer_config.json." + key, "is a special token of a kind that is not supported");
      }
    }
    if (settings_.contains("added_tokens_decoder")) {
      for (const auto& [token_id, token] : settings_["added_tokens_decoder"].items()) {
        by_id_[std::atoll(token_id.c_str())] = token;
      }
      return;
    }
    read_older_files();
  }

  bool flag(const char* key, bool otherwise) {
    return settings_.contains(key) ? boolean(settings_, "tokenizer_config.json", key) : otherwise;
  }

  /// The content of a named token, where there is one.
  std::optional<std::string> content(const std::string& name, const std::string& otherwise) {
    const Json token = settings_.value(name, Json(otherwise));
    return token.is_null() ? std::nullopt : std::optional(content_of(token));
  }
  std::optional<std::string> content(const std::string& name) {
    const auto found = named_.find(name);
    return found == named_.end() ? std::nullopt : std::optional(content_of(found->second));
  }

  /// Two named tokens that the model's input cannot do without.
  std::pair<std::string, std::string> required(const char* first, const char* second) {
    for (const char* name : {first, second}) {
      if (!content(name))
        problem(fmt::format("tokenizer_config.json.{}", name), "must be a token, but is null");
    }
    return {content(first).value_or(""), content(second).value_or("")};
  }

  /// A token of the vocabulary.
  void know(const std::string& token, std::int64_t token_id) {
    ids_.insert_or_assign(token, token_id);
    next_id_ = std::max(next_id_, token_id + 1);
  }
  std::int64_t id(const std::string& token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? 0 : found->second;
  }

  /// Control and user-defined pieces become added tokens, unless the settings
  /// name such tokens.
  void add_spare(const SentencePieceModel& model) {
    if (settings_.contains("extra_special_tokens")) return;
    std::map<std::int64_t, Json> tokens;
    const auto add = [&](std::int64_t piece, bool special) {
      tokens[piece] = {{"content", model.pieces[static_cast<std::size_t>(piece)].first},
                       {"normalized", false},
                       {"special", special}};
    };
    for (const auto piece : model.control) add(piece, true);
    for (const auto piece : model.user_defined) add(piece, false);
    settings_["extra_special_tokens"] = Json::array();
    for (auto& [piece, token] : tokens) settings_["extra_special_tokens"].push_back(std::move(token));
  }

  /// Adds all tokens: those with ids, the named ones, and the others.
  /// `defaults` are the named ones the settings leave out.
  void add_special(const std::vector<std::pair<std::string, std::string>>& defaults) {
    for (const auto& [name, token] : defaults) named_[name] = token;
    for (const char* name : names) {
      if (settings_.contains(name)) named_[name] = settings_[name];
      if (named_.count(name) > 0 && named_[name].is_null()) named_.erase(name);
    }
    std::vector<Json> tokens;
    std::set<std::string> contents;
    for (const auto& [token_id, token] : by_id_) {
      tokens.push_back(token);
      contents.insert(content_of(token));
    }
    const auto add = [&](const Json& token) {
      const bool there = std::find(tokens.begin(), tokens.end(), token) != tokens.end();
      if (!there && contents.count(content_of(token)) == 0) tokens.push_back(token);
    };
    std::set<std::string> special;
    for (const char* name : names) {
      if (named_.count(name) == 0) continue;
      add(named_[name]);
      special.insert(content_of(named_[name]));
    }
    const Json extra =
        settings_.value("extra_special_tokens", settings_.value("additional_special_tokens", Json()));
    if (extra.is_array()) {
      for (const Json& token : extra) add(token);
    } else if (!extra.is_null()) {
      problem("tokenizer_config.json.extra_special_tokens", "must be a list, but got " + shown(extra));
    }
    for (const Json& token : tokens) {
      Json whole = as_object(token);
      const auto text = content_of(whole);
      if (text.empty()) continue;
      if (special.count(text) > 0) whole["special"] = true;
      if (ids_.count(text) == 0) know(text, next_id_);
      whole["id"] = id(text);
      added_[id(text)] = std::move(whole);
    }
  }

  /// What `add_special` has made, by id.
  Json added_tokens() const {
    Json list = Json::array();
    for (const auto& [token_id, token] : added_) list.push_back(token);
    return list;
  }

  /// A TemplateProcessing. "A0" is the first text with the type 0; other pieces
  /// are tokens, of type 0 unless ":1" follows; where there is no token, there
  /// is no piece.
  Json processing(const std::vector<std::string>& single, const std::vector<std::string>& pair) {
    Json result = {{"type", "TemplateProcessing"}, {"special_tokens", Json::object()}};
    const auto pieces = [&](const std::vector<std::string>& given) {
      Json list = Json::array();
      for (std::string piece : given) {
        const bool second = piece.ends_with(":1");
        if (second) piece.resize(piece.size() - 2);
        if (piece == "A0" || piece == "B0" || piece == "B1") {
          list.push_back({{"Sequence", {{"id", piece.substr(0, 1)}, {"type_id", piece[1] - '0'}}}});
        } else if (!piece.empty()) {
          list.push_back({{"SpecialToken", {{"id", piece}, {"type_id", second ? 1 : 0}}}});
          result["special_tokens"][piece] = {{"id", piece}, {"ids", {id(piece)}}, {"tokens", {piece}}};
        }
      }
      return list;
    };
    result["single"] = pieces(single);
    result["pair"] = pieces(pair);
    return result;
  }

 private:
  static constexpr std::array<const char*, 7> names{"bos_token", "eos_token", "unk_token", "sep_token",
                                                    "pad_token", "cls_token", "mask_token"};

  void read_older_files() {
    const Json map = read_if_there("special_tokens_map.json");
    for (const auto& [key, value] : map.items()) {
      settings_[key] = value;
      if (value.is_object()) settings_[key]["special"] = true;
    }
    const Json added = read_if_there("added_tokens.json");
    std::set<std::string> special;
    for (const char* name : names) {
      if (settings_.contains(name) && !settings_[name].is_null()) special.insert(content_of(settings_[name]));
    }
    const Json extra = settings_.value("extra_special_tokens", Json::array());
    for (const Json& token : extra) special.insert(content_of(token));
    for (const auto& [token, token_id] : added.items()) {
      if (!is_id(token_id)) {
        problem("added_tokens.json." + token, "must be an id, but got " + shown(token_id));
        continue;
      }
      const bool is_special = special.count(token) > 0;
      by_id_[token_id.get<std::int64_t>()] = {
          {"content", token}, {"normalized", !is_special}, {"special", is_special}};
    }
  }

  std::string content_of(const Json& token) {
    if (token.is_string()) return token.get<std::string>();
    if (token.is_object() && token.contains("content") && token["content"].is_string()) {
      return token["content"].get<std::string>();
    }
    problem("tokenizer_config.json",
            "must have tokens that are a text or an object with content, but got " + shown(token));
    return "";
  }

  /// A token with every flag; a name alone is a special token.
  Json as_object(const Json& token) {
    const bool object = token.is_object();
    const bool special = !object || token.value("special", false);
    Json result = {{"content", content_of(token)}, {"special", special}, {"normalized", !special}};
    for (const char* key : {"single_word", "lstrip", "rstrip", "normalized"}) {
      if (object && token.contains(key)) {
        result[key] = token[key];
      } else if (!result.contains(key)) {
        result[key] = false;
      }
    }
    return result;
  }

  std::filesystem::path folder_;
  Json settings_;
  std::map<std::int64_t, Json> by_id_, added_;
  std::map<std::string, Json> named_;
  std::unordered_map<std::string, std::int64_t> ids_;
  std::int64_t next_id_ = 0;
};

}  // namespace text::internal
