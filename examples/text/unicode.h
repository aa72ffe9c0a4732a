// Unicode: UTF-8 in and out, through ICU.
#pragma once

#include <fmt/format.h>
#include <unicode/unistr.h>
#include <unicode/utf8.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace text {

namespace internal {

/// Reads the code point at `position` and moves behind it; negative where the
/// bytes are not UTF-8.
inline std::int32_t next_code_point(std::string_view bytes, std::size_t& position) {
  const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
  std::int32_t code_point = 0;
  U8_NEXT(data, position, bytes.size(), code_point);
  return code_point;
}

inline void require_icu(UErrorCode status, const char* what) {
  if (U_FAILURE(status)) throw std::runtime_error(std::string(what) + ": ICU says " + u_errorName(status));
}

inline icu::UnicodeString to_icu(std::u32string_view text) {
  return icu::UnicodeString::fromUTF32(reinterpret_cast<const UChar32*>(text.data()),
                                       static_cast<std::int32_t>(text.size()));
}

inline std::u32string from_icu(const icu::UnicodeString& text) {
  std::u32string result(static_cast<std::size_t>(text.countChar32()), U'\0');
  UErrorCode status = U_ZERO_ERROR;
  text.toUTF32(reinterpret_cast<UChar32*>(result.data()), static_cast<std::int32_t>(result.size()), status);
  if (status == U_STRING_NOT_TERMINATED_WARNING) status = U_ZERO_ERROR;
  require_icu(status, "UTF-32");
  return result;
}

}  // namespace internal

/// Offset of the first byte that is not UTF-8 (overlong forms and surrogates
/// are not), if there is one.
inline std::optional<std::size_t> invalid_utf8_at(std::string_view bytes) {
  for (std::size_t position = 0; position < bytes.size();) {
    const std::size_t start = position;
    if (internal::next_code_point(bytes, position) < 0) return start;
  }
  return std::nullopt;
}

/// The code points of a UTF-8 text.
/// Throws: std::invalid_argument naming the offset of the first byte that is
/// not UTF-8.
inline std::u32string decode_utf8(std::string_view bytes) {
  std::u32string code_points;
  code_points.reserve(bytes.size());
  for (std::size_t position = 0; position < bytes.size();) {
    const std::size_t start = position;
    const std::int32_t code_point = internal::next_code_point(bytes, position);
    if (code_point < 0) {
      throw std::invalid_argument(
          fmt::format("text must be valid UTF-8, but the byte at offset {} "
                      "(0x{:02X}) is not",
                      start, static_cast<unsigned char>(bytes[start])));
    }
    code_points.push_back(static_cast<char32_t>(code_point));
  }
  return code_points;
}

/// A text in UTF-8 whatever the bytes were: each longest part that cannot
/// belong to a character becomes one U+FFFD, as Python's `errors="replace"`
/// does.
inline std::string replace_invalid_utf8(std::string_view bytes) {
  if (!invalid_utf8_at(bytes)) return std::string(bytes);
  std::string valid;
  for (std::size_t position = 0; position < bytes.size();) {
    const std::size_t start = position;
    const bool good = internal::next_code_point(bytes, position) >= 0;
    valid += good ? bytes.substr(start, position - start) : std::string_view("\xEF\xBF\xBD");
  }
  return valid;
}

/// Appends a code point in UTF-8.
inline void append_utf8(std::string& bytes, char32_t code_point) {
  const auto c = static_cast<std::uint32_t>(code_point);
  const auto byte = [&](std::uint32_t value) { bytes.push_back(static_cast<char>(value)); };
  if (c < 0x80) {
    byte(c);
  } else if (c < 0x800) {
    byte(0xC0 | c >> 6), byte(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F));
  } else {
    byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F)), byte(0x80 | (c >> 6 & 0x3F)),
        byte(0x80 | (c & 0x3F));
  }
}

/// Code points as UTF-8.
inline std::string encode_utf8(std::u32string_view code_points) {
  std::string bytes;
  bytes.reserve(code_points.size());
  for (char32_t c : code_points) append_utf8(bytes, c);
  return bytes;
}

}  // namespace text
