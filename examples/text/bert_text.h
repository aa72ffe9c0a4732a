// BertNormalizer and BertPreTokenizer: what happens to a text before its words
// are looked up.
#pragma once

#include <unicode/uchar.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "unicode_form.h"

namespace text {

namespace internal {

/// The general category in the Unicode version the reference's category tables
/// were made from, which is 8: what was assigned later counts as unassigned,
/// and so is neither punctuation nor a mark.
inline std::uint32_t category_mask(char32_t c) {
  switch (c) {  // the ones for which it matters that their category has changed
                // since
    case 0x166D:
    case 0x111C9:
      return U_GC_PO_MASK;
    case 0x1734:
      return U_GC_MN_MASK;
    case 0x1885:
    case 0x1886:
      return U_GC_LO_MASK;
    case 0xA9BD:
      return U_GC_MC_MASK;
    default:
      break;
  }
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(c), age);
  if (age[0] > 8) return U_GC_CN_MASK;
  return U_MASK(static_cast<std::uint32_t>(u_charType(static_cast<UChar32>(c))));
}

inline bool is_whitespace(char32_t c) { return u_isUWhiteSpace(static_cast<UChar32>(c)) != 0; }

inline bool is_control(char32_t c) {
  if (c == U'\t' || c == U'\n' || c == U'\r') return false;
  return (category_mask(c) & (U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CO_MASK)) != 0;
}

inline bool is_ascii_punctuation(char32_t c) {
  return (c >= U'!' && c <= U'/') || (c >= U':' && c <= U'@') || (c >= U'[' && c <= U'`') ||
         (c >= U'{' && c <= U'~');
}

inline bool is_bert_punctuation(char32_t c) {
  return is_ascii_punctuation(c) || (category_mask(c) & U_GC_P_MASK) != 0;
}

/// The blocks that BERT splits into single characters. 0x2B920 (for 0x2B820) is
/// the reference's own slip.
inline bool is_chinese(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

/// Appends the full lowercase of one character, which may be several; its
/// neighbours do not count, so a sigma at the end of a word is an ordinary one.
inline void append_lowercase(std::u32string& out, char32_t c) {
  constexpr char32_t capital_i_with_dot = 0x130;
  if (c == capital_i_with_dot) {
    out += U"i\u0307";
  } else {
    out.push_back(static_cast<char32_t>(u_tolower(static_cast<UChar32>(c))));
  }
}

}  // namespace internal

/// The normalizer of BERT's tokenizers: cleaning, blanks around ideographs,
/// accents, case, in this order.
struct BertNormalizer {
  /// Drops control characters, U+0000 and U+FFFD, and makes every white space a
  /// blank.
  bool clean_text = true;
  /// Puts blanks around every CJK ideograph, so that each becomes a word.
  bool handle_chinese_chars = true;
  /// Decomposes and drops non-spacing marks; where not given, as `lowercase`.
  std::optional<bool> strip_accents;
  /// Lowers the case of every character by itself.
  bool lowercase = true;

  /// The normalized text.
  std::u32string operator()(std::u32string text) const {
    if (clean_text) {
      std::erase_if(text, [](char32_t c) { return c == 0 || c == 0xFFFD || internal::is_control(c); });
      std::replace_if(text.begin(), text.end(), internal::is_whitespace, U' ');
    }
    if (handle_chinese_chars && std::any_of(text.begin(), text.end(), internal::is_chinese)) {
      std::u32string spaced;
      for (char32_t c : text) {
        if (internal::is_chinese(c)) {
          spaced += {U' ', c, U' '};
        } else {
          spaced.push_back(c);
        }
      }
      text = std::move(spaced);
    }
    if (strip_accents.value_or(lowercase)) {
      text = unicode_form(text, UnicodeForm::kNfd);
      std::erase_if(text, [](char32_t c) { return (internal::category_mask(c) & U_GC_MN_MASK) != 0; });
    }
    if (lowercase) {
      std::u32string lowered;
      lowered.reserve(text.size());
      for (char32_t c : text) internal::append_lowercase(lowered, c);
      text = std::move(lowered);
    }
    return text;
  }
};

/// The pre-tokenizer of BERT's tokenizers, the words of a normalized text:
/// split at white space, every punctuation character a word of its own.
inline std::vector<std::u32string_view> split_words(std::u32string_view text) {
  std::vector<std::u32string_view> words;
  std::size_t start = 0;
  const auto close = [&](std::size_t end) {
    if (end > start) words.push_back(text.substr(start, end - start));
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool blank = internal::is_whitespace(text[i]);
    if (!blank && !internal::is_bert_punctuation(text[i])) continue;
    close(i);
    if (!blank) words.push_back(text.substr(i, 1));
    start = i + 1;
  }
  close(text.size());
  return words;
}

}  // namespace text
