// Method: what `--method NAME[:key=value,…]` says. A further method is one more row in `method_table`.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/add_adapter.h"

namespace finetune {

/// The keys and values of one `--method`, read with the type each is to have.
/// Throws: std::runtime_error naming method, key and value where a value is of another type.
class MethodValues {
 public:
  MethodValues(std::string method, std::map<std::string, std::string> values)
      : method_(std::move(method)), values_(std::move(values)) {}

  bool has(const std::string& key) const { return values_.count(key) > 0; }

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

/// Where a method goes: what the program knows beside the method's own keys.
struct Place {
  std::vector<std::string>
      targets;       ///< of `targets=`, else `--targets`, else the method's default; may be empty
  std::string head;  ///< path of the task head in the model, or empty where it lies outside
  std::vector<std::string> saved;  ///< layers that train as a copy of their own, the head among them
};

/// One method of the program.
struct MethodEntry {
  std::string name, what;
  std::vector<std::string> keys;             ///< beside `lr`
  std::vector<std::string> default_targets;  ///< of BERT
  /// The parts of the adapter, the task head left out.
  std::function<std::vector<peft::Part>(const MethodValues&, const Place&)> parts;
};

namespace internal {

/// A target from a list of names: `all-linear`, one regular expression between slashes, or last path
/// segments.
inline peft::Target target_of(const std::vector<std::string>& names, const Place& place) {
  if (names.size() == 1 && names[0] == "all-linear") {
    return peft::where([](const peft::SiteInfo& site) { return site.layer == "Linear"; })
        .exclude(place.saved);
  }
  if (names.size() == 1 && names[0].size() > 2 && names[0].starts_with('/') && names[0].ends_with('/')) {
    return peft::matching(names[0].substr(1, names[0].size() - 2));
  }
  return peft::named(names);
}

inline std::vector<peft::Part> lora_parts(const MethodValues& values, const Place& place) {
  using peft::LoraInit;
  enum class Biases { none, all, lora_only };
  peft::LoraOptions options(values.integer("rank", 8));
  options.alpha(values.number("alpha", options.alpha()))
      .dropout(values.number("dropout", 0.0))
      .rslora(values.boolean("rslora", false))
      .lora_bias(values.boolean("lora_bias", false))
      .init(values.choice<LoraInit>(
          "init",
          {{"kaiming", LoraInit::kaiming}, {"gaussian", LoraInit::gaussian}, {"random", LoraInit::random}},
          LoraInit::kaiming))
      .rank_pattern(values.patterns<int64_t>("rank_pattern"))
      .alpha_pattern(values.patterns<double>("alpha_pattern"))
      .enable(values.booleans("enable"));
  auto target = target_of(place.targets, place);
  // A layer with a copy of its own is not adapted as well, as in Hugging Face's peft.
  auto exclude = values.list("exclude");
  for (const auto& name : place.saved) {
    const bool aimed_at = std::find(place.targets.begin(), place.targets.end(), name) != place.targets.end();
    if (aimed_at || target.predicate()) exclude.push_back(name);
  }
  if (!exclude.empty()) target = target.exclude(exclude);
  if (values.has("layers")) target = target.layers(values.integers("layers"));
  std::vector<peft::Part> parts{peft::on(options, target)};
  const auto biases = values.choice<Biases>(
      "bias", {{"none", Biases::none}, {"all", Biases::all}, {"lora_only", Biases::lora_only}}, Biases::none);
  if (biases == Biases::lora_only) parts.push_back(peft::on(peft::BiasOptions(), target));
  if (biases == Biases::all) parts.push_back(peft::on(peft::BiasOptions(), peft::all().exclude(place.saved)));
  return parts;
}

inline std::vector<peft::Part> bitfit_parts(const MethodValues& values, const Place& place) {
  auto names = values.list("biases");
  if (names.empty()) names = place.targets;
  const auto kinds = values.list("kinds");
  auto target = peft::all();
  if (!names.empty()) {
    if (!kinds.empty()) throw std::runtime_error("--method bitfit: expected biases or kinds, but got both");
    target = target_of(names, place);
  } else if (!kinds.empty()) {
    target = peft::where([kinds](const peft::SiteInfo& site) {
      return std::find(kinds.begin(), kinds.end(), site.layer) != kinds.end();
    });
  }
  return {peft::on(peft::BiasOptions(), target.exclude(place.saved))};
}

inline std::vector<peft::Part> full_parts(const MethodValues&, const Place& place) {
  const auto target = place.targets.empty() ? peft::all() : target_of(place.targets, place);
  return {peft::on(peft::ReplaceOptions(), target.exclude(place.saved))};
}

}  // namespace internal

/// Every method the program knows.
inline const std::vector<MethodEntry>& method_table() {
  static const std::vector<MethodEntry> table{
      {"lora",
       "low-rank updates of the targets",
       {"targets", "rank", "alpha", "dropout", "rslora", "lora_bias", "init", "rank_pattern", "alpha_pattern",
        "enable", "bias", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::lora_parts},
      {"head",
       "the task head alone, on features computed once",
       {},
       {},
       [](const MethodValues&, const Place&) { return std::vector<peft::Part>{}; }},
      {"bitfit",
       "every bias, or those named, and the head",
       {"targets", "biases", "kinds"},
       {},
       internal::bitfit_parts},
      {"full", "every weight, or those of the targets, and the head", {"targets"}, {}, internal::full_parts},
  };
  return table;
}

/// A method as the user asked for it.
struct Method {
  std::string text;  ///< as written
  std::string name;
  std::optional<double> rate;  ///< `lr=`
  std::vector<peft::Part> parts;
  /// Nothing but the head trains.
  bool head_only() const { return parts.empty(); }
};

namespace internal {

/// "name:key=value,…" cut into its pieces.
inline std::pair<std::string, std::map<std::string, std::string>> split_method(const std::string& text) {
  const auto colon = std::min(text.find(':'), text.size());
  std::pair<std::string, std::map<std::string, std::string>> result{text.substr(0, colon), {}};
  if (colon == text.size()) return result;
  for (const auto& item : MethodValues::split(std::string_view(text).substr(colon + 1))) {
    const auto equals = item.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw std::runtime_error(fmt::format(
          "--method {}: expected key=value, but got '{}' (hint: lists in [ ])", result.first, item));
    }
    if (!result.second.emplace(item.substr(0, equals), item.substr(equals + 1)).second) {
      throw std::runtime_error(
          fmt::format("--method {}: {} is given twice", result.first, item.substr(0, equals)));
    }
  }
  return result;
}

inline const MethodEntry& method_entry(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& entry : method_table()) {
    if (entry.name == name) return entry;
    names.push_back(entry.name);
  }
  throw std::runtime_error(fmt::format("--method: there is no method '{}'; nearest: {}\n  there are {}", name,
                                       peft::internal::closest(name, names, 1), fmt::join(names, ", ")));
}

}  // namespace internal

/// Reads `--method`. `targets`: of `--targets`; `head`: path of the task head in the model, or empty.
/// Throws: std::runtime_error for an unknown method, key or a value of the wrong kind, with what there is;
/// c10::ValueError for a value out of range.
inline Method parse_method(const std::string& text, const std::vector<std::string>& targets,
                           const std::string& head) {
  const auto [name, given] = internal::split_method(text);
  const auto& entry = internal::method_entry(name);
  auto keys = entry.keys;
  keys.emplace_back("lr");
  for (const auto& [key, value] : given) {
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
    throw std::runtime_error(fmt::format("--method {}: there is no key '{}'; nearest: {}\n  there are {}",
                                         name, key, peft::internal::closest(key, keys, 1),
                                         fmt::join(keys, ", ")));
  }
  const MethodValues values(name, given);
  Method method{text, name, {}, {}};
  if (values.has("lr")) {
    method.rate = values.number("lr", 0);
    if (!(*method.rate >= 0 && std::isfinite(*method.rate))) {
      throw std::runtime_error(
          fmt::format("--method {}: lr must be at least 0, but got {}", name, *method.rate));
    }
  }
  Place place{entry.default_targets, head, values.list("modules_to_save")};
  if (!targets.empty()) place.targets = targets;
  if (values.has("targets")) {
    place.targets = values.list("targets");
    if (place.targets.empty())
      throw std::runtime_error(fmt::format("--method {}: targets must not be empty", name));
  }
  if (!head.empty() && std::find(place.saved.begin(), place.saved.end(), head) == place.saved.end()) {
    place.saved.push_back(head);
  }
  try {
    method.parts = entry.parts(values, place);
    if (!method.parts.empty() && !place.saved.empty()) {
      method.parts.push_back(peft::on(peft::ReplaceOptions(), peft::named(place.saved)));
    }
  } catch (const c10::Error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", name, error.what_without_backtrace()));
  }
  return method;
}

}  // namespace finetune
