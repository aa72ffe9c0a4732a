// ByteLevel: texts as words of bytes, each byte written as one visible character, as GPT-2's tokenizer has
// them.
#pragma once

#include <unicode/uchar.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bert_text.h"
#include "unicode.h"

namespace text {

/// The character that stands for each byte in a vocabulary: itself where Latin-1 has a visible character
/// there, else one from U+0100 on, in the bytes' order. A blank is U+0120, "Ġ".
inline const std::array<char32_t, 256>& byte_alphabet() {
  static const auto alphabet = [] {
    std::array<char32_t, 256> characters{};
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool visible = (byte >= U'!' && byte <= U'~') || (byte >= 0xA1 && byte != 0xAD);
      characters[byte] = visible ? byte : next++;
    }
    return characters;
  }();
  return alphabet;
}

/// Bytes in the alphabet's characters.
inline std::string to_byte_alphabet(std::string_view bytes) {
  std::string characters;
  characters.reserve(2 * bytes.size());
  for (const char byte : bytes) append_utf8(characters, byte_alphabet()[static_cast<unsigned char>(byte)]);
  return characters;
}

/// The bytes a token stands for. One with a character that is none of the alphabet's (an added token may have
/// such) stands for its own UTF-8.
inline std::string from_byte_alphabet(const std::string& token) {
  constexpr std::size_t end = 0x144;  // behind the alphabet's last character
  static const auto byte_of = [] {
    std::array<std::int16_t, end> bytes{};
    bytes.fill(-1);
    for (std::size_t byte = 0; byte < 256; ++byte) {
      bytes[byte_alphabet()[byte]] = static_cast<std::int16_t>(byte);
    }
    return bytes;
  }();
  std::string bytes;
  for (const char32_t character : decode_utf8(token)) {
    if (character >= end || byte_of[character] < 0) return token;
    bytes.push_back(static_cast<char>(byte_of[character]));
  }
  return bytes;
}

/// GPT-2's words, which together are the text: English contractions; runs of letters, of digits, and of
/// anything else that is no white space, each with one blank before it where there is one; the white space
/// between, of which a last blank goes to the word behind it. The reference's regular expression, written
/// out:
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
inline std::vector<std::u32string_view> split_gpt2_words(std::u32string_view text) {
  enum class Kind { kSpace, kLetter, kNumber, kOther };
  const auto kind = [&](std::size_t i) {
    const auto category = U_GET_GC_MASK(static_cast<UChar32>(text[i]));
    if ((category & U_GC_L_MASK) != 0) return Kind::kLetter;
    if ((category & U_GC_N_MASK) != 0) return Kind::kNumber;
    return internal::is_whitespace(text[i]) ? Kind::kSpace : Kind::kOther;
  };
  const auto contraction = [&](std::size_t i) -> std::size_t {
    for (const std::u32string_view form : {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"}) {
      if (text.substr(i).starts_with(form)) return form.size();
    }
    return 0;
  };
  std::vector<std::u32string_view> words;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t stop = i + contraction(i);
    if (stop == i) {
      const std::size_t first = i + (text[i] == U' ' && i + 1 < text.size() && kind(i + 1) != Kind::kSpace);
      const Kind run = kind(first);
      stop = first + 1;
      while (stop < text.size() && kind(stop) == run) ++stop;
      if (run == Kind::kSpace && stop < text.size() && stop - i > 1) --stop;
    }
    words.push_back(text.substr(i, stop - i));
    i = stop;
  }
  return words;
}

}  // namespace text
