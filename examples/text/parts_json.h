// PartsJson: the normalizer, pre-tokenizer and decoder of a tokenizer.json.
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "base64.h"
#include "decoders.h"
#include "normalizers.h"
#include "pre_tokenizers.h"
#include "template_json.h"

namespace text::internal {

/// Reads what a text goes through before and behind the model.
class PartsJsonReader : protected TemplateJsonReader {
 protected:
  using TemplateJsonReader::TemplateJsonReader;

  static bool is_absent(const Json& root, const std::string& key) {
    return !root.contains(key) || root[key].is_null();
  }

  BertNormalizer read_bert_normalizer(const Json& part, const std::string& key) {
    BertNormalizer normalizer;
    normalizer.clean_text = boolean(part, key, "clean_text");
    normalizer.handle_chinese_chars = boolean(part, key, "handle_chinese_chars");
    normalizer.lowercase = boolean(part, key, "lowercase");
    if (part.contains("strip_accents") && !part["strip_accents"].is_null()) {
      normalizer.strip_accents = boolean(part, key, "strip_accents");
    }
    return normalizer;
  }

  void read_normalizer(const Json& part, const std::string& key, Normalizer& result) {
    if (!expect_object(part, key)) return;
    const std::string type = kind(part, key,
                                  {"Sequence", "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase",
                                   "StripAccents", "Strip", "Prepend", "Replace", "Precompiled"});
    if (type == "Sequence") {
      for_each(part, key, "normalizers",
               [&](const Json& step, const std::string& place) { read_normalizer(step, place, result); });
    } else if (type == "BertNormalizer") {
      result.add(read_bert_normalizer(part, key));
    } else if (type == "Lowercase") {
      result.add(Lowercase{});
    } else if (type == "StripAccents") {
      result.add(StripAccents{});
    } else if (type == "Strip") {
      const bool left = boolean(part, key, "strip_left");
      result.add(Strip{left, boolean(part, key, "strip_right")});
    } else if (type == "Prepend") {
      result.add(Prepend{decode_utf8(string(part, key, "prepend"))});
    } else if (type == "Replace") {
      read_replace(part, key, result);
    } else if (type == "Precompiled") {
      read_precompiled(part, key, result);
    } else if (!type.empty()) {
      result.add(type == "NFC"    ? UnicodeForm::kNfc
                 : type == "NFD"  ? UnicodeForm::kNfd
                 : type == "NFKC" ? UnicodeForm::kNfkc
                                  : UnicodeForm::kNfkd);
    }
  }

  void read_pre_tokenizer(const Json& part, const std::string& key, PreTokenizer& result) {
    if (!expect_object(part, key)) return;
    const std::string type = kind(
        part, key, {"Sequence", "Metaspace", "WhitespaceSplit", "Punctuation", "Digits", "BertPreTokenizer"});
    if (type == "Sequence") {
      for_each(part, key, "pretokenizers",
               [&](const Json& step, const std::string& place) { read_pre_tokenizer(step, place, result); });
    } else if (type == "Metaspace") {
      result.parts.push_back(read_metaspace(part, key));
    } else if (type == "WhitespaceSplit") {
      result.parts.push_back(WhitespaceSplit{});
    } else if (type == "Punctuation") {
      if (!is_absent(part, "behavior") && part["behavior"] != "Isolated") {
        problem(key + ".behavior", fmt::format("must be Isolated, but got {}", shown(part["behavior"])));
      }
      result.parts.push_back(Punctuation{});
    } else if (type == "Digits") {
      result.parts.push_back(Digits{boolean(part, key, "individual_digits")});
    } else if (type == "BertPreTokenizer") {
      result.parts.push_back(BertPreTokenizer{});
    }
  }

  /// Kinds that are not supported are kept by name: they only count where ids
  /// become text.
  Decoder read_decoder(const Json& root) {
    const std::string key = "decoder";
    if (is_absent(root, key)) return JoinDecoder{};
    const Json& part = root[key];
    if (!expect_object(part, key)) return JoinDecoder{};
    const std::string type = string(part, key, "type");
    if (type == "ByteLevel") return ByteLevelDecoder{};
    if (type == "WordPiece") {
      const std::string prefix = string(part, key, "prefix");
      return WordPieceDecoder{prefix, boolean(part, key, "cleanup")};
    }
    if (type == "Metaspace") {
      const Metaspace metaspace = read_metaspace(part, key);
      return MetaspaceDecoder{encode_utf8({&metaspace.replacement, 1}),
                              metaspace.prepend == Metaspace::Prepend::kNever};
    }
    return type;
  }

 private:
  template <typename Visit>
  void for_each(const Json& part, const std::string& key, const std::string& name, const Visit& visit) {
    if (!part.contains(name) || !part[name].is_array()) {
      return problem(join(key, name),
                     part.contains(name) ? "must be a list, but got " + shown(part[name]) : "is missing");
    }
    for (std::size_t i = 0; i < part[name].size(); ++i) {
      visit(part[name][i], fmt::format("{}.{}[{}]", key, name, i));
    }
  }

  void read_replace(const Json& part, const std::string& key, Normalizer& result) {
    const std::string content = string(part, key, "content");
    const auto pattern = part.find("pattern");
    const std::string tag =
        pattern != part.end() && pattern->is_object() && pattern->size() == 1 ? pattern->begin().key() : "";
    if ((tag != "String" && tag != "Regex") || !pattern->begin()->is_string()) {
      return problem(key + ".pattern", "must be a String or a Regex" +
                                           (pattern == part.end() ? "" : ", but got " + shown(*pattern)));
    }
    add_checked(key + ".pattern", result,
                [&] { return Replace(pattern->begin()->get<std::string>(), tag == "Regex", content); });
  }

  void read_precompiled(const Json& part, const std::string& key, Normalizer& result) {
    const std::string place = key + ".precompiled_charsmap";
    const auto bytes = decode_base64(string(part, key, "precompiled_charsmap"));
    if (!bytes) return problem(place, "must be bytes in base 64");
    add_checked(place, result, [&] { return Precompiled(*bytes); });
  }

  template <typename Make>
  void add_checked(const std::string& key, Normalizer& result, const Make& make) {
    try {
      result.add(make());
    } catch (const std::invalid_argument& error) {
      problem(key, error.what());
    }
  }

  Metaspace read_metaspace(const Json& part, const std::string& key) {
    using Prepend = Metaspace::Prepend;
    Metaspace result;
    const std::u32string replacement = decode_utf8(string(part, key, "replacement"));
    if (replacement.size() == 1) {
      result.replacement = replacement.front();
    } else if (part.contains("replacement")) {
      problem(key + ".replacement",
              fmt::format("must be one character, but got {}", shown(part["replacement"])));
    }
    if (!is_absent(part, "split")) result.split = boolean(part, key, "split");
    if (!is_absent(part, "prepend_scheme")) {
      const std::string scheme = string(part, key, "prepend_scheme");
      if (scheme == "never") result.prepend = Prepend::kNever;
      if (scheme == "first") result.prepend = Prepend::kFirst;
      if (scheme != "never" && scheme != "first" && scheme != "always") {
        problem(key + ".prepend_scheme",
                fmt::format("must be never, first or always, but got {}", shown(part["prepend_scheme"])));
      }
    }
    // Older files have this beside it.
    if (!is_absent(part, "add_prefix_space") && !boolean(part, key, "add_prefix_space") &&
        result.prepend != Prepend::kNever) {
      problem(key + ".add_prefix_space", "must not be false unless prepend_scheme is never");
    }
    return result;
  }
};

}  // namespace text::internal
