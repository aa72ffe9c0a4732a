// UnicodeForm: Unicode's four normalization forms, as Hugging Face's tokenizers
// have them.
#pragma once

#include <unicode/normalizer2.h>
#include <unicode/uniset.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>

#include "unicode.h"

namespace text {

/// Canonical or compatibility decomposition, or that and composition.
enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

namespace internal {

inline const icu::Normalizer2& unicode_normalizer(UnicodeForm form) {
  static const auto normalizers = [] {
    UErrorCode status = U_ZERO_ERROR;
    const std::array forms{icu::Normalizer2::getNFCInstance(status), icu::Normalizer2::getNFDInstance(status),
                           icu::Normalizer2::getNFKCInstance(status),
                           icu::Normalizer2::getNFKDInstance(status)};
    static const icu::UnicodeSet known(u"[:age=9.0:]", status);
    require_icu(status, "normalization");
    std::array<const icu::Normalizer2*, forms.size()> filtered{};
    for (std::size_t i = 0; i < forms.size(); ++i) {
      filtered[i] = new icu::FilteredNormalizer2(*forms[i], known);  // for the program's life
    }
    return filtered;
  }();
  return *normalizers[static_cast<std::size_t>(form)];
}

}  // namespace internal

/// A text in a normalization form, by the reference's tables, which are of
/// Unicode 9: what was assigned later neither decomposes nor moves past other
/// marks.
inline std::u32string unicode_form(std::u32string text, UnicodeForm form) {
  if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0xA0; })) return text;
  UErrorCode status = U_ZERO_ERROR;
  icu::UnicodeString result;
  internal::unicode_normalizer(form).normalize(internal::to_icu(text), result, status);
  internal::require_icu(status, "normalization");
  return internal::from_icu(result);
}

}  // namespace text
