// ConfigFields: typed, strict reading of an adapter_config.json, for the rows in io/formats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/core/problems.h"
#include "peft/io/config_json.h"
#include "peft/io/python_regex.h"

namespace peft::internal {

inline constexpr const char* config_file_name = "adapter_config.json";

/// What is said where a file has no place for `Adapter::scale`.
inline constexpr const char* scale_note = "the adapter's scale is not written: loaded, it is 1 again";

/// Takes what a user should know, a line each.
using Note = std::function<void(const std::string&)>;

/// The keys of an adapter_config.json. What is wrong is added to the problems, each with its key, what was
/// expected and what is there; the value read is then the given default. A key that is absent, or null where
/// null can mean that, has its default.
class ConfigFields {
 public:
  /// `model_type`: Hugging Face's name of the base's kind, on which some defaults depend.
  /// `file`: what messages call it.
  ConfigFields(nlohmann::ordered_json json, std::string model_type, Problems& problems, const Note& note,
               std::string file = config_file_name)
      : json_(std::move(json)),
        model_type_(std::move(model_type)),
        problems_(problems),
        note_(note),
        file_(std::move(file)) {}

  /// True where the key is there and is not null.
  bool has(const std::string& key) const { return json_.contains(key) && !json_[key].is_null(); }
  /// The value as it is; null where it is absent.
  const nlohmann::ordered_json& value(const std::string& key) const {
    static const nlohmann::ordered_json null;
    return json_.contains(key) ? json_[key] : null;
  }
  const nlohmann::ordered_json& json() const { return json_; }
  const std::string& model_type() const { return model_type_; }
  void note(const std::string& line) const { note_(file_ + ": " + line); }

  /// Notes that a value will not do: "adapter_config.json: 'r' must be …, but got 0". `decides_shapes`: what
  /// the file of tensors must hold cannot be known now, so it is not compared.
  void complain(const std::string& key, const std::string& must, bool decides_shapes = true) {
    refuse("'" + key + "' " + must + ", but got " + (json_.contains(key) ? json_text(json_[key]) : "none"),
           decides_shapes);
  }
  /// The same in whole words.
  void refuse(const std::string& line, bool decides_shapes = true) {
    problems_.add(file_ + ": " + line);
    if (decides_shapes) usable_ = false;
  }
  /// Refuses features this library does not have: keys that are neither null nor false nor, of those whose
  /// emptiness means the same to Python, empty.
  void refuse_features(const std::vector<std::string>& keys) {
    static const std::set<std::string> off_if_empty{"layer_replication", "megatron_config", "loftq_config",
                                                    "target_parameters", "trainable_token_indices"};
    for (const auto& key : keys) {
      if (!has(key) || json_[key] == false) continue;
      if (off_if_empty.count(key) && json_[key].is_structured() && json_[key].empty()) continue;
      refuse("'" + key + "' is not supported yet, but got " + json_text(json_[key]));
    }
  }
  /// False where what decides tensors and shapes could not be read.
  bool usable() const { return usable_; }

  std::string string(const std::string& key) {
    if (!has(key)) return {};
    if (!json_[key].is_string()) {
      complain(key, "must be a string");
      return {};
    }
    return json_[key].get<std::string>();
  }
  bool boolean(const std::string& key, bool absent = false) {
    if (!has(key)) return absent;
    if (!json_[key].is_boolean()) {
      complain(key, "must be true or false");
      return absent;
    }
    return json_[key].get<bool>();
  }
  static constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  /// An integer from `least` to `most`.
  int64_t integer(const std::string& key, int64_t absent, int64_t least, int64_t most = largest) {
    if (!json_.contains(key)) return absent;
    const auto& value = json_[key];
    if (!is_integer(value, least, most)) {
      const bool above = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(most);
      complain(key, above ? "must be an integer of at most " + std::to_string(most)
                          : "must be an integer of at least " + std::to_string(least));
      return absent;
    }
    return json_[key].get<int64_t>();
  }
  /// A number that `fits`; `must` says which do: "must be a number in [0, 1)". Numbers decide no shapes.
  double number(const std::string& key, double absent, const std::function<bool(double)>& fits,
                const std::string& must) {
    if (!json_.contains(key)) return absent;
    const auto& value = json_[key];
    if (!value.is_number() || !fits(value.get<double>())) {
      complain(key, must, /*decides_shapes=*/false);
      return absent;
    }
    return value.get<double>();
  }
  /// A rate of dropout; absent: 0.
  double rate(const std::string& key) {
    return number(
        key, 0.0, [](double value) { return value >= 0 && value < 1; }, "must be a number in [0, 1)");
  }
  /// A list of names, each once. `lone`: a string alone is a list of one.
  std::vector<std::string> strings(const std::string& key, bool lone = false) {
    std::vector<std::string> found;
    if (!has(key)) return found;
    const auto& value = json_[key];
    if (lone && value.is_string()) return {value.get<std::string>()};
    bool fits = value.is_array();
    for (const auto& item : value) {
      if (fits && item.is_string() && !item.get<std::string>().empty()) {
        const auto text = item.get<std::string>();
        if (std::find(found.begin(), found.end(), text) == found.end()) found.push_back(text);
      } else {
        fits = false;
      }
    }
    if (!fits) complain(key, "must be a list of names");
    return found;
  }
  /// An expression of Python's, for std::regex.
  std::string expression(const std::string& key, const std::string& text) {
    const auto converted = to_ecmascript(text);
    if (!converted.problem.empty()) {
      complain(key,
               "must hold regular expressions this library can read: '" + text + "' " + converted.problem);
    }
    return converted.text;
  }
  /// A map from expressions to integers of at least 1 (`rank_pattern`).
  std::vector<Pattern<int64_t>> ranks(const std::string& key) {
    return patterns<int64_t>(key, "must map expressions to integers of at least 1", /*decides_shapes=*/true,
                             [](const nlohmann::ordered_json& value) { return is_integer(value, 1); });
  }
  /// A map from expressions to numbers (`alpha_pattern`).
  std::vector<Pattern<double>> numbers(const std::string& key) {
    return patterns<double>(key, "must map expressions to numbers", /*decides_shapes=*/false,
                            [](const nlohmann::ordered_json& value) { return value.is_number(); });
  }

 private:
  static bool is_integer(const nlohmann::ordered_json& value, int64_t least, int64_t most = largest) {
    if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(most)) return false;
    return value.is_number_integer() && value.get<int64_t>() >= least && value.get<int64_t>() <= most;
  }
  template <class Value, class Fits>
  std::vector<Pattern<Value>> patterns(const std::string& key, const std::string& must, bool decides_shapes,
                                       const Fits& fits) {
    std::vector<Pattern<Value>> found;
    if (!has(key)) return found;
    const auto& map = json_[key];
    bool good = map.is_object();
    for (const auto& item : map.items()) {
      if (!good) break;
      const auto pattern = expression(key, item.key());
      good = fits(item.value());
      if (good) found.emplace_back(pattern, item.value().template get<Value>());
    }
    if (!good) complain(key, must, decides_shapes);
    return found;
  }

  nlohmann::ordered_json json_;
  std::string model_type_;
  Problems& problems_;
  const Note& note_;
  std::string file_;
  bool usable_ = true;
};

}  // namespace peft::internal
