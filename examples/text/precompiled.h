// Precompiled: the table of replacements in a SentencePiece model, applied as
// Hugging Face's tokenizers do.
#pragma once

#include <fmt/format.h>
#include <unicode/brkiter.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unicode.h"

namespace text {

/// A `precompiled_charsmap`: four bytes with the length of a double array (a
/// trie over bytes, in Darts' form), the array, and behind it what its values
/// point into, replacements that end in a zero byte.
///
/// SentencePiece's own normalizer replaces the longest match. The reference
/// looks a grapheme of less than six bytes up, else each character, and of
/// several matches takes the shortest, for the whole grapheme: other ids, so
/// the library's is of no use here.
class Precompiled {
 public:
  /// Throws: std::invalid_argument where the bytes are no such table.
  explicit Precompiled(std::string_view charsmap) {
    const auto word = [&](std::size_t at) {
      std::uint32_t value = 0;
      for (std::size_t i = 0; i < 4; ++i) {
        value |= std::uint32_t{static_cast<unsigned char>(charsmap[at + i])} << 8 * i;
      }
      return value;
    };
    const std::size_t size = charsmap.size() < 4 ? 0 : word(0) / 4;
    if (size == 0 || charsmap.size() < 4 + 4 * size) {
      throw std::invalid_argument(
          fmt::format("must begin with the length of its trie, but its {} bytes do not", charsmap.size()));
    }
    for (std::size_t i = 0; i < size; ++i) trie_.push_back(word(4 + 4 * i));
    replacements_ = charsmap.substr(4 + 4 * size);
    if (invalid_utf8_at(replacements_)) throw std::invalid_argument("must hold UTF-8 behind its trie");
  }

  /// The text with everything replaced.
  std::u32string operator()(const std::u32string& text) const {
    std::u32string result;
    const auto replace = [&](std::u32string_view part) {
      const auto found = find(encode_utf8(part));
      if (found) result += decode_utf8(*found);
      return found.has_value();
    };
    for_each_grapheme(text, [&](std::u32string_view grapheme) {
      if (encode_utf8(grapheme).size() < 6 && replace(grapheme)) return;
      for (std::size_t i = 0; i < grapheme.size(); ++i) {
        if (!replace(grapheme.substr(i, 1))) result.push_back(grapheme[i]);
      }
    });
    return result;
  }

 private:
  /// The replacement of the shortest key that the bytes begin with.
  std::optional<std::string_view> find(std::string_view bytes) const {
    const auto offset = [](std::uint32_t unit) { return unit >> 10 << ((unit & 1U << 9) >> 6); };
    std::size_t node = offset(trie_[0]);
    for (const char c : bytes) {
      const std::uint32_t byte = static_cast<unsigned char>(c);
      node ^= byte;
      if (byte == 0 || node >= trie_.size()) break;
      const std::uint32_t unit = trie_[node];
      if ((unit & (1U << 31 | 0xFF)) != byte) break;
      node ^= offset(unit);
      if (node >= trie_.size()) break;
      if ((unit >> 8 & 1) != 0) {
        const std::size_t start = trie_[node] & ~(1U << 31);
        if (start > replacements_.size()) break;
        const std::string_view rest = std::string_view(replacements_).substr(start);
        return rest.substr(0, rest.find('\0'));
      }
    }
    return std::nullopt;
  }

  template <typename Visit>
  static void for_each_grapheme(std::u32string_view text, const Visit& visit) {
    thread_local const auto graphemes = [] {
      UErrorCode status = U_ZERO_ERROR;
      std::unique_ptr<icu::BreakIterator> iterator(
          icu::BreakIterator::createCharacterInstance(icu::Locale::getRoot(), status));
      internal::require_icu(status, "graphemes");
      return iterator;
    }();
    const icu::UnicodeString utf16 = internal::to_icu(text);
    graphemes->setText(utf16);
    std::size_t start = 0;
    for (std::int32_t from = graphemes->first(), to = graphemes->next(); to != icu::BreakIterator::DONE;
         from = to, to = graphemes->next()) {
      const auto count = static_cast<std::size_t>(utf16.countChar32(from, to - from));
      visit(text.substr(start, count));
      start += count;
    }
  }

  std::vector<std::uint32_t> trie_;
  std::string replacements_;
};

}  // namespace text
