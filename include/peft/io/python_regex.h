// Python regular expressions, as adapter_config.json holds them, in the words of std::regex.
#pragma once

#include <cctype>
#include <regex>
#include <string>
#include <string_view>

namespace peft::internal {

/// A regular expression for std::regex, or why there is none.
struct ConvertedRegex {
  std::string text;
  std::string problem;
};

/// Rewrites what the two languages spell differently: named groups, `\A`, `\Z`, comments, `{,n}`, brackets
/// and braces that stand for themselves. What ECMAScript does not have is refused: looking behind, flags,
/// possessive quantifiers.
inline ConvertedRegex to_ecmascript(std::string_view python) {
  std::string out;
  bool after_quantifier = false;
  const auto refuse = [](const std::string& what) {
    return ConvertedRegex{"", "uses " + what + ", which is not supported"};
  };
  const auto escape = [&](size_t& i) -> std::string {
    if (i + 1 >= python.size()) return "a backslash at its end";
    const char next = python[++i];
    if (next == 'A') {
      out += '^';
    } else if (next == 'Z' || next == 'z') {
      out += '$';
    } else if (std::isalpha(static_cast<unsigned char>(next)) &&
               std::string_view("dDwWsSbBtnrfvxu").find(next) == std::string_view::npos) {
      return std::string("\\") + next;
    } else {
      out += {'\\', next};
    }
    return {};
  };
  for (size_t i = 0; i < python.size(); ++i) {
    const char c = python[i];
    const bool was_quantifier = after_quantifier;
    after_quantifier = false;
    if (c == '\\') {
      if (const auto what = escape(i); !what.empty()) return refuse("'" + what + "'");
    } else if (c == '[') {
      out += c;
      if (i + 1 < python.size() && python[i + 1] == '^') out += python[++i];
      for (bool first = true; ++i < python.size() && (first || python[i] != ']'); first = false) {
        if (python[i] == '\\') {
          if (const auto what = escape(i); !what.empty()) return refuse("'" + what + "'");
        } else {
          if (python[i] == '[' || python[i] == ']') out += '\\';
          out += python[i];
        }
      }
      out += ']';
      if (i >= python.size()) return {"", "has a '[' without its ']'"};
    } else if (c == '(' && python.substr(i + 1, 1) == "?") {
      const auto kind = python.substr(i + 2, 1);
      if (kind == "#") {
        i = python.find(')', i);
        if (i == std::string_view::npos) return {"", "has a comment without its end"};
      } else if (python.substr(i + 2, 2) == "P<") {
        i = python.find('>', i);
        if (i == std::string_view::npos) return {"", "has a group's name without its end"};
        out += '(';
      } else if (kind == ":" || kind == "=" || kind == "!") {
        out += "(?";
        out += kind;
        i += 2;
      } else {
        return refuse("'" + std::string(python.substr(i, 4)) + "'");
      }
    } else if (c == '{') {
      const auto end = python.find('}', i);
      const auto inside =
          end == std::string_view::npos ? std::string_view() : python.substr(i + 1, end - i - 1);
      const bool counts = inside.find_first_not_of("0123456789,") == std::string_view::npos &&
                          inside.find_first_of("0123456789") != std::string_view::npos &&
                          inside.find(',') == inside.rfind(',');
      if (counts) {
        out += inside.front() == ',' ? "{0" + std::string(inside) + "}" : "{" + std::string(inside) + "}";
        i = end;
        after_quantifier = true;
      } else {
        out += "\\{";
      }
    } else if (c == ']' || c == '}') {
      out += {'\\', c};
    } else {
      if (c == '+' && was_quantifier) return refuse("a possessive quantifier");
      after_quantifier = (c == '*' || c == '+' || c == '?') && !was_quantifier;
      out += c;
    }
  }
  try {
    std::regex{out};
  } catch (const std::regex_error& error) {
    return {"", std::string("is no regular expression: ") + error.what()};
  }
  return {out, ""};
}

/// True if an expression of std::regex means the same in Python.
inline bool reads_alike_in_python(const std::string& ecmascript) {
  const auto converted = to_ecmascript(ecmascript);
  return converted.problem.empty() && converted.text == ecmascript;
}

}  // namespace peft::internal
