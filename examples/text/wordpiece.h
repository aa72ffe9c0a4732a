// WordPiece: text to ids, equal to Hugging Face's tokenizers, from a tokenizer.json.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "bert_text.h"
#include "tokenizer_json.h"
#include "unicode.h"

namespace text {

/// Ids of one text or of a pair, with the special tokens of the model.
struct Encoding {
  /// Token ids.
  std::vector<std::int64_t> ids;
  /// As many type ids: with BERT 0 for the first text, 1 for the second.
  std::vector<std::int64_t> type_ids;
};

/// A WordPiece tokenizer. Settings for truncation and padding in the file do not count: the length is the
/// caller's. Thread-safe once built.
///
/// Example:
///   auto tokenizer = text::WordPiece::from_file("model/tokenizer.json");
///   text::Encoding one = tokenizer.encode("a text", 128);
///   text::Encoding two = tokenizer.encode("a question", "an answer", 128);
class WordPiece {
 public:
  /// For texts of any length.
  static constexpr std::int64_t no_limit = std::numeric_limits<std::int64_t>::max();

  /// Reads a tokenizer.json.
  /// Throws: std::runtime_error naming the file and the key where it is not such a tokenizer.
  static WordPiece from_file(const std::filesystem::path& path) { return WordPiece(path); }

  /// Ids of a text, cut on the right to `max_length`, special tokens included.
  /// Throws: std::invalid_argument for invalid UTF-8 (with the offset of the byte) and for a `max_length`
  /// that the special tokens alone exceed.
  Encoding encode(std::string_view text, std::int64_t max_length = no_limit) const {
    return assemble(file_.single, max_length, text, std::nullopt);
  }

  /// Ids of a pair; where it is too long, the longer of the two is cut first.
  Encoding encode(std::string_view first, std::string_view second, std::int64_t max_length = no_limit) const {
    return assemble(file_.pair, max_length, first, second);
  }

  /// One more than the largest id: the rows a word embedding must have at least.
  std::int64_t vocabulary_size() const { return vocabulary_size_; }

  /// Number of special tokens `encode` puts around one text, or a pair.
  std::int64_t special_tokens(bool pair) const { return count_fixed(pair ? file_.pair : file_.single); }

  /// The token of an id.
  /// Throws: std::out_of_range where no token has it.
  const std::string& token(std::int64_t id) const {
    const auto found = tokens_.find(id);
    if (found == tokens_.end()) throw std::out_of_range(fmt::format("WordPiece: no token has the id {}", id));
    return found->second;
  }

  /// The id of a token, if it is one.
  std::optional<std::int64_t> id(const std::string& token) const {
    for (const AddedToken& added : file_.added_tokens) {
      if (added.content == token) return added.id;
    }
    const auto found = file_.vocabulary.find(token);
    return found == file_.vocabulary.end() ? std::nullopt : std::optional(found->second);
  }

  /// The id that fills up a batch: the file's padding id, else that of "[PAD]".
  /// Throws: std::runtime_error where the file has neither.
  std::int64_t pad_id() const {
    if (!file_.pad_id) throw std::runtime_error(path_.string() + ": names no padding token");
    return *file_.pad_id;
  }

 private:
  explicit WordPiece(const std::filesystem::path& path) : path_(path), file_(read_tokenizer_json(path)) {
    unk_id_ = file_.vocabulary.at(file_.unk_token);
    for (const auto& [token, id] : file_.vocabulary) {
      tokens_.emplace(id, token);
      longest_token_ = std::max(longest_token_, token.size());
    }
    for (const AddedToken& token : file_.added_tokens) {
      tokens_.emplace(token.id, token.content);
      const std::u32string content = decode_utf8(token.content);
      const bool added = token.normalized ? in_normalized_.add(file_.normalizer(content), token)
                                          : in_given_.add(content, token);
      if (!added) {
        throw std::runtime_error(fmt::format(
            "{}: key 'added_tokens' must hold forms that differ, but the one of '{}' is empty or taken",
            path.string(), token.content));
      }
    }
    for (const auto& [id, token] : tokens_) vocabulary_size_ = std::max(vocabulary_size_, id + 1);
  }

  /// Ids of one text without special tokens.
  std::vector<std::int64_t> tokenize(std::string_view text) const {
    std::vector<std::int64_t> ids;
    const std::u32string given = decode_utf8(text);
    for (const auto& outer : in_given_.split(given)) {
      if (outer.id) {
        ids.push_back(*outer.id);
        continue;
      }
      const std::u32string normalized = file_.normalizer(std::u32string(outer.text));
      for (const auto& inner : in_normalized_.split(normalized)) {
        if (inner.id) {
          ids.push_back(*inner.id);
          continue;
        }
        for (std::u32string_view word : split_words(inner.text)) append_word(ids, word);
      }
    }
    return ids;
  }

  /// Cuts a word into its longest tokens from the left; if one part is unknown, the whole word is.
  void append_word(std::vector<std::int64_t>& ids, std::u32string_view word) const {
    if (static_cast<std::int64_t>(word.size()) > file_.max_input_chars_per_word) {
      ids.push_back(unk_id_);
      return;
    }
    const std::string& prefix = file_.continuing_subword_prefix;
    const std::size_t before = ids.size();
    std::string candidate;
    std::vector<std::size_t> ends;  // bytes of `candidate` up to each of its characters
    for (std::size_t start = 0; start < word.size();) {
      candidate = start > 0 ? prefix : "";
      ends.clear();
      for (std::size_t i = start; i < word.size() && candidate.size() < longest_token_; ++i) {
        append_utf8(candidate, word[i]);
        ends.push_back(candidate.size());
      }
      while (!ends.empty()) {
        candidate.resize(ends.back());
        if (const auto found = file_.vocabulary.find(candidate); found != file_.vocabulary.end()) {
          ids.push_back(found->second);
          break;
        }
        ends.pop_back();
      }
      if (ends.empty()) {
        ids.resize(before);
        ids.push_back(unk_id_);
        return;
      }
      start += ends.size();
    }
  }

  static std::int64_t count_fixed(const std::vector<TemplatePiece>& pieces) {
    std::size_t count = 0;
    for (const TemplatePiece& piece : pieces) count += piece.ids.size();
    return static_cast<std::int64_t>(count);
  }

  Encoding assemble(const std::vector<TemplatePiece>& pieces, std::int64_t max_length, std::string_view first,
                    std::optional<std::string_view> second) const {
    const std::int64_t fixed = count_fixed(pieces);
    if (max_length < fixed || max_length < 1) {
      throw std::invalid_argument(
          fmt::format("max_length must be at least {} for the special tokens, but got {}",
                      std::max<std::int64_t>(fixed, 1), max_length));
    }
    std::vector<std::int64_t> a = tokenize(first);
    std::vector<std::int64_t> b;
    if (second) b = tokenize(*second);
    cut(a, b, second.has_value(), static_cast<std::size_t>(max_length - fixed));
    Encoding encoding;
    for (const TemplatePiece& piece : pieces) {
      using Kind = TemplatePiece::Kind;
      const auto& ids = piece.kind == Kind::kFirst ? a : piece.kind == Kind::kSecond ? b : piece.ids;
      encoding.ids.insert(encoding.ids.end(), ids.begin(), ids.end());
      encoding.type_ids.insert(encoding.type_ids.end(), ids.size(), piece.type_id);
    }
    return encoding;
  }

  /// The reference's "longest first": the longer text gives until both are equal, then both in halves, and
  /// an odd place goes to the longer one.
  static void cut(std::vector<std::int64_t>& a, std::vector<std::int64_t>& b, bool pair, std::size_t room) {
    if (a.size() + b.size() <= room) return;
    if (!pair) return a.resize(room);
    const bool swapped = a.size() > b.size();
    auto& shorter = swapped ? b : a;
    auto& longer = swapped ? a : b;
    std::size_t few = shorter.size();
    std::size_t many = few > room ? few : std::max(few, room - few);
    if (few + many > room) {
      few = room / 2;
      many = few + room % 2;
    }
    shorter.resize(std::min(shorter.size(), few));
    longer.resize(std::min(longer.size(), many));
  }

  std::filesystem::path path_;
  TokenizerJson file_;
  AddedTokenMatcher in_given_, in_normalized_;
  std::unordered_map<std::int64_t, std::string> tokens_;
  std::int64_t unk_id_ = 0;
  std::int64_t vocabulary_size_ = 0;
  std::size_t longest_token_ = 0;
};

}  // namespace text
