// Normalizer: what happens to a text before it is cut into words, as a
// tokenizer.json says.
#pragma once

#include <fmt/format.h>
#include <unicode/regex.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "bert_text.h"
#include "precompiled.h"
#include "unicode.h"
#include "unicode_form.h"

namespace text {

/// Lowers the case of every character by itself.
struct Lowercase {
  /// The lowered text.
  std::u32string operator()(const std::u32string& text) const {
    std::u32string lowered;
    lowered.reserve(text.size());
    for (char32_t c : text) internal::append_lowercase(lowered, c);
    return lowered;
  }
};

namespace internal {

/// A mark of any kind in Unicode 9, of which the reference's table is.
inline bool is_mark(char32_t c) {
  if (c < 0x300 || c == 0x111C9) return false;  // a mark since
  if (c == 0x1CF2 || c == 0x1CF3) return true;  // none since
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(c), age);
  return age[0] <= 9 && (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_M_MASK) != 0;
}

}  // namespace internal

/// Drops marks of every kind; accents are marks where the text is decomposed.
struct StripAccents {
  /// The text without them.
  std::u32string operator()(std::u32string text) const {
    std::erase_if(text, internal::is_mark);
    return text;
  }
};

/// Drops white space at the ends.
struct Strip {
  bool left = true;
  bool right = true;

  /// The text without it.
  std::u32string operator()(std::u32string text) const {
    const auto black = [](char32_t c) { return !internal::is_whitespace(c); };
    if (right) text.erase(std::find_if(text.rbegin(), text.rend(), black).base(), text.end());
    if (left) text.erase(text.begin(), std::find_if(text.begin(), text.end(), black));
    return text;
  }
};

/// Puts a text before every one that is not empty.
struct Prepend {
  std::u32string before;

  /// Both.
  std::u32string operator()(std::u32string text) const { return text.empty() ? text : before + text; }
};

/// Replaces each match of a pattern by a text.
class Replace {
 public:
  /// The pattern is a regular expression, or itself. Throws:
  /// std::invalid_argument where it is no expression of ICU's, or matches
  /// nothing, which the reference's library does in another way.
  Replace(const std::string& pattern, bool regular_expression, const std::string& content)
      : content_(internal::to_icu(decode_utf8(content))) {
    UErrorCode status = U_ZERO_ERROR;
    UParseError place{};
    pattern_.reset(icu::RegexPattern::compile(internal::to_icu(decode_utf8(pattern)),
                                              regular_expression ? 0U : std::uint32_t{UREGEX_LITERAL}, place,
                                              status));
    if (U_FAILURE(status)) {
      throw std::invalid_argument(
          fmt::format("must be a regular expression, but '{}' is none ({})", pattern, u_errorName(status)));
    }
    const icu::UnicodeString nothing;
    const std::unique_ptr<icu::RegexMatcher> matcher(pattern_->matcher(nothing, status));
    if (matcher->find()) {
      throw std::invalid_argument(fmt::format("must not match the empty text, but '{}' does", pattern));
    }
  }

  /// The text with everything replaced.
  std::u32string operator()(const std::u32string& text) const {
    bool from_start = true;
    return (*this)(text, from_start);
  }

  /// The same; see `Normalizer` for `from_start`.
  std::u32string operator()(const std::u32string& text, bool& from_start) const {
    const icu::UnicodeString given = internal::to_icu(text);
    UErrorCode status = U_ZERO_ERROR;
    const std::unique_ptr<icu::RegexMatcher> matcher(pattern_->matcher(given, status));
    internal::require_icu(status, "Replace");
    icu::UnicodeString result;
    std::int32_t done = 0;
    while (matcher->find(status)) {
      const std::int32_t start = matcher->start(status), end = matcher->end(status);
      // What replaces several characters is said to come from the last.
      if (start == 0 && (content_.isEmpty() || given.countChar32(0, end) > 1)) from_start = false;
      result.append(given, done, start - done).append(content_);
      done = end;
    }
    internal::require_icu(status, "Replace");
    if (done == 0) return text;
    return internal::from_icu(result.append(given, done, given.length() - done));
  }

  /// Characters of what a match becomes.
  std::int32_t content_length() const { return content_.countChar32(); }

 private:
  icu::UnicodeString content_;
  std::shared_ptr<const icu::RegexPattern> pattern_;
};

/// One step of a normalizer.
using NormalizerPart =
    std::variant<BertNormalizer, UnicodeForm, Lowercase, StripAccents, Strip, Prepend, Replace, Precompiled>;

/// A row of steps, each of which takes what the one before it gives.
class Normalizer {
 public:
  /// Adds a step.
  void add(NormalizerPart part) { parts_.push_back(std::move(part)); }

  /// The normalized text.
  std::u32string operator()(std::u32string text) const {
    bool from_start = true;
    return (*this)(std::move(text), from_start);
  }

  /// The same; `from_start` becomes false where the first character is gone
  /// that the text began with. Only right where `keeps_start`.
  std::u32string operator()(std::u32string text, bool& from_start) const {
    for (const NormalizerPart& part : parts_) {
      if (const auto* replace = std::get_if<Replace>(&part)) {
        text = (*replace)(text, from_start);
      } else {
        const char32_t first = text.empty() ? U'\0' : text.front();
        text = std::visit([&](const auto& step) { return apply(step, std::move(text)); }, part);
        if (std::holds_alternative<Strip>(part) || std::holds_alternative<StripAccents>(part)) {
          from_start = from_start && !text.empty() && text.front() == first;
        }
      }
    }
    return text;
  }

  /// Whether no step makes several characters of one, which may be cut apart
  /// again and then all begin where the text does.
  bool keeps_start() const {
    return std::all_of(parts_.begin(), parts_.end(), [](const NormalizerPart& part) {
      if (const auto* form = std::get_if<UnicodeForm>(&part)) return *form == UnicodeForm::kNfc;
      if (const auto* replace = std::get_if<Replace>(&part)) return replace->content_length() <= 1;
      return std::holds_alternative<Lowercase>(part) || std::holds_alternative<Strip>(part) ||
             std::holds_alternative<StripAccents>(part);
    });
  }

 private:
  template <typename Step>
  static std::u32string apply(const Step& step, std::u32string text) {
    if constexpr (std::is_same_v<Step, UnicodeForm>) {
      return unicode_form(std::move(text), step);
    } else {
      return step(std::move(text));
    }
  }

  std::vector<NormalizerPart> parts_;
};

}  // namespace text
