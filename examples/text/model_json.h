// ModelJson: the vocabulary and the model of a tokenizer.json.
#pragma once

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "byte_level.h"
#include "model_settings.h"
#include "parts_json.h"

namespace text::internal {

/// A decimal as the reference reads it from a file: its digits as one whole
/// number, times or by a power of ten, each rounded, so that one in seven
/// scores is not the double nearest to what is written. The last bit decides
/// between cuts of a word that are equally likely. Given is the nearest double,
/// whose shortest form is what files hold.
inline double as_read_by_reference(double nearest) {
  const std::string text = fmt::format("{}", std::abs(nearest));
  std::uint64_t digits = 0;
  int exponent = 0;
  for (std::size_t i = 0, point = text.find('.'); i < text.size(); ++i) {
    if (text[i] == 'e') {
      exponent += std::atoi(text.c_str() + i + 1);
      break;
    }
    if (i == point) continue;
    digits = 10 * digits + static_cast<std::uint64_t>(text[i] - '0');
    if (i > point) --exponent;
  }
  const double power = std::strtod(fmt::format("1e{}", std::abs(exponent)).c_str(), nullptr);
  const auto whole = static_cast<double>(digits);
  return std::copysign(exponent < 0 ? whole / power : whole * power, nearest);
}

/// Reads the model of a file.
class ModelJsonReader : protected PartsJsonReader {
 protected:
  using PartsJsonReader::PartsJsonReader;

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

  WordPieceSettings read_wordpiece(const Json& model, const Vocabulary& vocabulary) {
    WordPieceSettings result;
    const std::string key = "model";
    result.unk_token = string(model, key, "unk_token");
    result.continuing_subword_prefix = string(model, key, "continuing_subword_prefix");
    result.max_input_chars_per_word = integer(model, key, "max_input_chars_per_word");
    if (model.contains("unk_token") && vocabulary.count(result.unk_token) == 0) {
      problem("model.unk_token", fmt::format("must be a token of model.vocab, "
                                             "but got '{}', which is not in it",
                                             result.unk_token));
    }
    return result;
  }

  BpeSettings read_bpe(const Json& model, const Vocabulary& vocabulary) {
    BpeSettings result;
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

    // With all of them there is no unknown character, so `unk_token` and its
    // options do not count.
    std::vector<std::string> bytes;
    for (const char32_t character : byte_alphabet()) {
      std::string token = encode_utf8({&character, 1});
      if (vocabulary.count(token) == 0) bytes.push_back(std::move(token));
    }
    if (!bytes.empty()) {
      problem("model.vocab", fmt::format("must hold a token for every byte, but lacks {} of "
                                         "256, such as '{}' (hint: train "
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
          problem(key, fmt::format("must join tokens of model.vocab to one, "
                                   "but '{}' is not in it",
                                   token));
        }
      }
      result.merges.emplace_back(std::move(left), std::move(right));
    }
  }

  /// `exact` where the scores were never written as decimals.
  UnigramSettings read_unigram(const Json& model, Vocabulary& vocabulary, bool exact) {
    UnigramSettings result;
    const std::string key = "model.vocab";
    if (!model.contains("vocab") || !model["vocab"].is_array() || model["vocab"].empty()) {
      problem(key, model.contains("vocab")
                       ? "must be a list of tokens and scores, but got " + shown(model["vocab"])
                       : "is missing");
      return result;
    }
    for (const Json& piece : model["vocab"]) {
      if (!piece.is_array() || piece.size() != 2 || !piece[0].is_string() || !piece[1].is_number()) {
        problem(fmt::format("{}[{}]", key, result.pieces.size()),
                fmt::format("must be [token, score], but got {}", shown(piece)));
        result.pieces.emplace_back();
        continue;
      }
      const auto score = piece[1].get<double>();
      vocabulary.insert_or_assign(piece[0].get<std::string>(),
                                  static_cast<std::int64_t>(result.pieces.size()));
      result.pieces.emplace_back(piece[0].get<std::string>(), exact ? score : as_read_by_reference(score));
    }
    if (!is_absent(model, "unk_id")) {
      result.unk_id = integer(model, "model", "unk_id");
      if (*result.unk_id >= static_cast<std::int64_t>(result.pieces.size())) {
        problem("model.unk_id", fmt::format("must be less than the {} tokens of model.vocab, but got {}",
                                            result.pieces.size(), *result.unk_id));
      }
    }
    if (!is_absent(model, "byte_fallback")) {
      result.byte_fallback = boolean(model, "model", "byte_fallback");
    }
    return result;
  }
};

}  // namespace text::internal
