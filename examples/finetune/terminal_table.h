// Tables for a terminal: columns aligned as it shows them.
#pragma once

#include <unicode/uchar.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "text/unicode.h"

namespace finetune {

namespace internal {

/// Columns a terminal needs for a text: two for a wide character, none for one that joins the one before.
inline std::size_t display_width(std::string_view text) {
  std::size_t width = 0;
  for (const char32_t c : text::decode_utf8(text::replace_invalid_utf8(text))) {
    const auto code_point = static_cast<UChar32>(c);
    const auto kind = u_charType(code_point);
    if (kind == U_NON_SPACING_MARK || kind == U_ENCLOSING_MARK || kind == U_FORMAT_CHAR) continue;
    const int east_asian = u_getIntPropertyValue(code_point, UCHAR_EAST_ASIAN_WIDTH);
    width += east_asian == U_EA_WIDE || east_asian == U_EA_FULLWIDTH ? 2 : 1;
  }
  return width;
}

}  // namespace internal

/// Lines of cells, all of the same number, as text: the first column to the left, the others to the right;
/// the first line is the header.
inline std::string aligned(const std::vector<std::vector<std::string>>& cells) {
  std::vector<std::size_t> widths(cells.front().size(), 0);
  for (const auto& line : cells) {
    for (std::size_t i = 0; i < line.size(); ++i) {
      widths[i] = std::max(widths[i], internal::display_width(line[i]));
    }
  }
  std::string result;
  for (std::size_t n = 0; n < cells.size(); ++n) {
    for (std::size_t i = 0; i < widths.size(); ++i) {
      const std::string gap(widths[i] - internal::display_width(cells[n][i]), ' ');
      result += i == 0 ? cells[n][i] + gap : "  " + gap + cells[n][i];
    }
    result += "\n";
    if (n > 0) continue;
    for (std::size_t i = 0; i < widths.size(); ++i) result += (i ? "  " : "") + std::string(widths[i], '-');
    result += "\n";
  }
  return result;
}

}  // namespace finetune
