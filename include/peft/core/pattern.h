// Pattern: a value for the layers whose path matches a regular expression.
#pragma once

#include <c10/util/Exception.h>

#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace peft {

/// (regular expression, value). Matching is Hugging Face PEFT's: the expression must match the whole path or
/// all of it after some dot; `.` matches any character.
template <class Value>
using Pattern = std::pair<std::string, Value>;

namespace internal {

/// An expression that matches this text alone.
inline std::string escape_regex(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (std::string_view(".^$|()[]{}*+?\\").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

/// What matches the paths that a pattern matches, as a whole or after a dot.
inline std::regex suffix_expression(const std::string& pattern) {
  return std::regex("(.*\\.)?(" + pattern + ")");
}

/// Throws c10::ValueError if `pattern` is no regular expression.
inline void check_pattern(const std::string& subject, const std::string& pattern) {
  try {
    suffix_expression(pattern);
  } catch (const std::regex_error& error) {
    TORCH_CHECK_VALUE(false, subject, ": '", pattern, "' is no regular expression: ", error.what());
  }
}

/// True if the expression matches the path, or all of it after a dot.
inline bool matches_suffix(const std::string& pattern, const std::string& path) {
  return std::regex_match(path, suffix_expression(pattern));
}

/// The value of the first pattern that matches, or `otherwise`.
template <class Value>
Value first_match(const std::vector<Pattern<Value>>& patterns, const std::string& path, Value otherwise) {
  for (const auto& [pattern, value] : patterns) {
    if (matches_suffix(pattern, path)) return value;
  }
  return otherwise;
}

}  // namespace internal
}  // namespace peft
