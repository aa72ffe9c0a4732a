// TemplateJson: what a tokenizer.json's post-processor puts around one text, or a pair.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

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

/// The template of one text, and of two.
struct Templates {
  std::vector<TemplatePiece> single, pair;
};

namespace internal {

/// Reads the post-processor of a file.
class TemplateJsonReader : protected StrictJson {
 protected:
  using StrictJson::StrictJson;

  /// Without a post-processor, and with ByteLevel, which moves offsets only, nothing is added.
  Templates read_templates(const Json& root) {
    using Kind = TemplatePiece::Kind;
    const std::string key = "post_processor";
    Templates result{{{Kind::kFirst, {}, 0}}, {{Kind::kFirst, {}, 0}, {Kind::kSecond, {}, 1}}};
    if (root.contains(key) && root[key].is_null()) return result;
    const Json* part = object(root, key);
    if (part == nullptr) return result;
    const std::string type =
        kind(*part, key, {"TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel"});
    if (type == "TemplateProcessing") {
      result.single = read_template(*part, "single", false);
      result.pair = read_template(*part, "pair", true);
    } else if (type == "BertProcessing" || type == "RobertaProcessing") {
      const bool roberta = type == "RobertaProcessing";  // two separators, and one type for both texts
      // These move offsets only, but without them the reference takes it for the other.
      for (const char* name : {"trim_offsets", "add_prefix_space"}) {
        if (roberta) boolean(*part, key, name);
      }
      const TemplatePiece cls{Kind::kFixed, {token_pair(*part, "cls")}, 0};
      const TemplatePiece sep{Kind::kFixed, {token_pair(*part, "sep")}, 0};
      const std::int64_t second = roberta ? 0 : 1;
      result.single = {cls, {Kind::kFirst, {}, 0}, sep};
      result.pair = result.single;
      if (roberta) result.pair.push_back(sep);
      result.pair.push_back({Kind::kSecond, {}, second});
      result.pair.push_back({Kind::kFixed, sep.ids, second});
    }
    return result;
  }

 private:
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
}  // namespace text
