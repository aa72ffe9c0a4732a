// Model settings: what a tokenizer.json says of WordPiece, byte-level BPE and
// Unigram.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace text {

/// Ids by token.
using Vocabulary = std::unordered_map<std::string, std::int64_t>;

/// What a file with WordPiece says of its model.
struct WordPieceSettings {
  std::string unk_token;
  std::string continuing_subword_prefix;
  std::int64_t max_input_chars_per_word = 0;
};

/// What a file with byte-level BPE says of its model.
struct BpeSettings {
  /// A word that is a token is not built by merges.
  bool ignore_merges = false;
  /// Pairs of tokens that join, the first ones first.
  std::vector<std::pair<std::string, std::string>> merges;
};

/// What a file with Unigram says of its model.
struct UnigramSettings {
  /// Tokens and their scores, by id. Of a token listed twice the last id and
  /// score count.
  std::vector<std::pair<std::string, double>> pieces;
  /// The id of what is no token.
  std::optional<std::int64_t> unk_id;
  /// What is no token becomes its bytes, tokens such as "<0x0A>", where the
  /// vocabulary has them all.
  bool byte_fallback = false;
};

}  // namespace text
