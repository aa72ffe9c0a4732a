// Method: what `--method NAME[:key=value,…]` says.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "method_table.h"
#include "method_values.h"
#include "peft/core/problems.h"
#include "peft/methods/replace.h"
#include "peft/model/add_adapter.h"

namespace finetune {

/// A method as the user asked for it.
struct Method {
  std::string text;  ///< as written
  std::string name;
  std::optional<double> rate;  ///< `lr=`
  std::vector<peft::Part> parts;
  std::string init;                          ///< `init=` of LoRA
  int64_t init_batches = 32;                 ///< that a start from the data reads
  std::optional<double> lora_plus;           ///< the rate of B over that of A
  std::map<std::string, std::string> given;  ///< keys and values
  std::optional<peft::FusionOptions> fusion;
  std::vector<std::string> fused;  ///< folders of the adapters that a fusion is made of, in its order
  /// Nothing but the head trains.
  bool head_only() const { return parts.empty() && !fusion; }
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

/// Reads `--method`. `targets`: of `--targets`; `heads`: paths of the task head in the model, or empty;
/// `steps`: of the whole run, 0 as long as they are not known (what depends on them is not checked then);
/// `tasks`: of the data.
/// Throws: std::runtime_error for an unknown method, key or a value of the wrong kind, with what there is;
/// c10::ValueError for a value out of range.
inline Method parse_method(const std::string& text, const std::vector<std::string>& targets,
                           const std::vector<std::string>& heads, int64_t steps = 0, int64_t tasks = 1) {
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
  Method method;
  method.text = text;
  method.name = name;
  method.given = given;
  if (values.has("lr")) {
    method.rate = values.number("lr", 0);
    if (!(*method.rate >= 0 && std::isfinite(*method.rate))) {
      throw std::runtime_error(
          fmt::format("--method {}: lr must be at least 0, but got {}", name, *method.rate));
    }
  }
  method.init = values.text("init");
  method.init_batches = values.integer("init_batches", method.init_batches);
  if (method.init_batches < 1) {
    throw std::runtime_error(
        fmt::format("--method {}: init_batches must be at least 1, but got {}", name, method.init_batches));
  }
  if (values.has("lora_plus")) {
    method.lora_plus = values.number("lora_plus", 1);
    if (!(*method.lora_plus >= 1 && std::isfinite(*method.lora_plus))) {
      throw std::runtime_error(
          fmt::format("--method {}: lora_plus must be at least 1, but got {}", name, *method.lora_plus));
    }
  }
  Place place{entry.default_targets, heads.empty() ? "" : heads.back(), values.list("modules_to_save"), steps,
              tasks};
  if (!targets.empty()) place.targets = targets;
  if (values.has("targets")) {
    place.targets = values.list("targets");
    if (place.targets.empty())
      throw std::runtime_error(fmt::format("--method {}: targets must not be empty", name));
  }
  for (const auto& head : heads) {
    if (std::find(place.saved.begin(), place.saved.end(), head) == place.saved.end())
      place.saved.push_back(head);
  }
  try {
    method.parts = entry.parts(values, place);
    if (name == "fusion") {
      method.fused = values.list("adapters");
      method.fusion = internal::fusion_options(values);
    }
    if (!method.parts.empty() && !place.saved.empty()) {
      method.parts.push_back(peft::on(peft::ReplaceOptions(), peft::named(place.saved)));
    }
  } catch (const c10::Error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", name, error.what_without_backtrace()));
  }
  return method;
}

/// The same of a model whose head has one path, or none.
inline Method parse_method(const std::string& text, const std::vector<std::string>& targets,
                           const std::string& head, int64_t steps = 0, int64_t tasks = 1) {
  return parse_method(text, targets, head.empty() ? std::vector<std::string>() : std::vector{head}, steps,
                      tasks);
}

}  // namespace finetune
