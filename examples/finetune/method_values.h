// MethodValues: the keys of one `--method NAME:key=value,…`, read with the type each is to have.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"

namespace finetune {

/// The keys and values of one `--method`, read with the type each is to have.
/// Throws: std::runtime_error naming method, key and value where a value is of another type.
class MethodValues {
 public:
  MethodValues(std::string method, std::map<std::string, std::string> values)
      : method_(std::move(method)), values_(std::move(values)) {}

  bool has(const std::string& key) const { return values_.count(key) > 0; }

  std::string text(const std::string& key) const { return has(key) ? values_.at(key) : std::string(); }
  int64_t integer(const std::string& key, int64_t absent) const {
    return has(key) ? parse<int64_t>(key, values_.at(key), "an integer") : absent;
  }
  double number(const std::string& key, double absent) const {
    return has(key) ? parse<double>(key, values_.at(key), "a number") : absent;
  }
  bool boolean(const std::string& key, bool absent) const {
    return has(key) ? truth(key, values_.at(key)) : absent;
  }
  /// `[a,b]`, or `a` alone.
  std::vector<std::string> list(const std::string& key) const {
    return has(key) ? split(values_.at(key)) : std::vector<std::string>{};
  }
  std::vector<int64_t> integers(const std::string& key) const {
    std::vector<int64_t> numbers;
    for (const auto& item : list(key)) numbers.push_back(parse<int64_t>(key, item, "integers"));
    return numbers;
  }
  std::vector<bool> booleans(const std::string& key) const {
    std::vector<bool> result;
    for (const auto& item : list(key)) result.push_back(truth(key, item));
    return result;
  }
  /// `[expression:value,…]`.
  template <class Value>
  std::vector<peft::Pattern<Value>> patterns(const std::string& key) const {
    std::vector<peft::Pattern<Value>> result;
    for (const auto& item : list(key)) {
      const auto colon = item.rfind(':');
      if (colon == std::string::npos || colon == 0) fail(key, "[expression:value,…]", item);
      result.emplace_back(item.substr(0, colon),
                          parse<Value>(key, item.substr(colon + 1), "expression:value"));
    }
    return result;
  }
  /// One of several words.
  template <class Value>
  Value choice(const std::string& key, const std::vector<std::pair<std::string, Value>>& words,
               Value absent) const {
    if (!has(key)) return absent;
    std::vector<std::string> names;
    for (const auto& [word, value] : words) {
      if (word == values_.at(key)) return value;
      names.push_back(word);
    }
    fail(key, fmt::format("{}", fmt::join(names, ", ")), values_.at(key));
  }

  /// The items of `[a,b]`; a comma inside inner brackets, as regular expressions have them, does not part.
  static std::vector<std::string> split(std::string_view text) {
    if (text.starts_with('[') && text.ends_with(']')) text = text.substr(1, text.size() - 2);
    std::vector<std::string> items;
    int depth = 0;
    std::string item;
    for (const char c : text) {
      depth += c == '[' || c == '(' || c == '{' ? 1 : c == ']' || c == ')' || c == '}' ? -1 : 0;
      if (c == ',' && depth == 0) {
        items.push_back(std::exchange(item, {}));
      } else {
        item += c;
      }
    }
    if (!item.empty() || !items.empty()) items.push_back(item);
    std::erase(items, std::string());
    return items;
  }

 private:
  template <class Value>
  Value parse(const std::string& key, const std::string& text, const char* what) const {
    Value value{};
    const auto* end = text.data() + text.size();
    const auto [stopped, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stopped != end) fail(key, what, text);
    return value;
  }
  bool truth(const std::string& key, const std::string& text) const {
    if (text == "true" || text == "1") return true;
    if (text == "false" || text == "0") return false;
    fail(key, "true or false", text);
  }
  [[noreturn]] void fail(const std::string& key, const std::string& must, const std::string& got) const {
    throw std::runtime_error(
        fmt::format("--method {}: {} must be {}, but got '{}'", method_, key, must, got));
  }

  std::string method_;
  std::map<std::string, std::string> values_;
};

}  // namespace finetune
