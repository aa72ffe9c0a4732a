// AddedTokens: tokens found in the text itself, before or after normalization, such as "[MASK]".
#pragma once

#include <unicode/uchar.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bert_text.h"

namespace text {

/// One entry of `added_tokens` in a tokenizer.json.
struct AddedToken {
  /// The id it becomes.
  std::int64_t id = 0;
  /// What is looked for.
  std::string content;
  /// Only where neither neighbour is a letter, digit, mark or connector.
  bool single_word = false;
  /// Swallows the white space before it.
  bool lstrip = false;
  /// Swallows the white space behind it.
  bool rstrip = false;
  /// Its normalized form is looked for in the normalized text, not its content in the text as given.
  bool normalized = false;
  /// Left out where ids become text again.
  bool special = false;
};

namespace internal {

/// Regular expressions' `\w`.
inline bool is_word_character(char32_t code_point) {
  const auto c = static_cast<UChar32>(code_point);
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL) ||
         (U_GET_GC_MASK(c) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

}  // namespace internal

/// Finds a set of added tokens in a text: leftmost first, of several at one place the longest.
class AddedTokenMatcher {
 public:
  /// A piece of the text: an added token (then `id` is set) or what lies between two of them.
  struct Piece {
    std::u32string_view text;
    std::optional<std::int64_t> id;
  };

  /// Adds a token under the form it has in the text; false where that form is empty or taken already.
  bool add(std::u32string form, const AddedToken& token) {
    if (form.empty()) return false;
    auto& candidates = by_first_[form.front()];
    const auto position = std::find_if(candidates.begin(), candidates.end(), [&](const auto& candidate) {
      return candidate.first.size() <= form.size();
    });
    for (auto other = position; other != candidates.end(); ++other) {
      if (other->first == form) return false;
    }
    candidates.emplace(position, std::move(form), token);
    return true;
  }

  /// Cuts the text into tokens and the pieces between them; empty pieces are left out.
  std::vector<Piece> split(std::u32string_view text) const {
    std::vector<Piece> pieces;
    const auto size = text.size();
    std::size_t done = 0;
    const auto add_piece = [&](std::size_t start, std::size_t stop, std::optional<std::int64_t> id) {
      if (start < stop) pieces.push_back({text.substr(start, stop - start), id});
    };
    for (std::size_t i = 0; i < size;) {
      const auto* match = longest_at(text, i);
      if (match == nullptr) {
        ++i;
        continue;
      }
      const AddedToken& token = match->second;
      std::size_t start = i;
      std::size_t stop = i + match->first.size();
      i = stop;
      if (token.single_word && ((start > 0 && internal::is_word_character(text[start - 1])) ||
                                (stop < size && internal::is_word_character(text[stop])))) {
        continue;
      }
      if (token.lstrip) {
        while (start > 0 && internal::is_whitespace(text[start - 1])) --start;
        start = std::max(start, done);
      }
      if (token.rstrip) {
        while (stop < size && internal::is_whitespace(text[stop])) ++stop;
      }
      add_piece(done, start, std::nullopt);
      add_piece(start, stop, token.id);
      done = stop;
    }
    add_piece(done, size, std::nullopt);
    return pieces;
  }

 private:
  using Candidate = std::pair<std::u32string, AddedToken>;

  const Candidate* longest_at(std::u32string_view text, std::size_t position) const {
    const auto found = by_first_.find(text[position]);
    if (found == by_first_.end()) return nullptr;
    for (const Candidate& candidate : found->second) {
      if (text.substr(position).starts_with(candidate.first)) return &candidate;
    }
    return nullptr;
  }

  // By first character, longest first.
  std::unordered_map<char32_t, std::vector<Candidate>> by_first_;
};

}  // namespace text
