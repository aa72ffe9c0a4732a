// ConfigReader: typed, strict reading of a Hugging Face config.json.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {
namespace internal {

/// The text of a file. Throws c10::Error naming it where it cannot be read.
inline std::string read_text(const std::filesystem::path& path) {
  std::error_code ignored;
  TORCH_CHECK(std::filesystem::is_regular_file(path, ignored), "'", path.string(),
              "' must be a file, but there is none");
  std::ifstream stream(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  TORCH_CHECK(stream.good() || stream.eof(), "'", path.string(), "' cannot be read");
  return text;
}

/// A file's JSON. Keys keep their order. Throws c10::Error naming the file where it is none, or so deep that
/// what reads it might end the stack.
inline nlohmann::ordered_json read_json(const std::filesystem::path& path) {
  static constexpr int deepest = 100;
  const auto limit = [&path](int depth, nlohmann::ordered_json::parse_event_t, nlohmann::ordered_json&) {
    TORCH_CHECK(depth <= deepest, "'", path.string(), "' nests its values more than ", deepest, " deep");
    return true;
  };
  try {
    return nlohmann::ordered_json::parse(read_text(path), limit);
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, "'", path.string(), "' is not valid JSON: ", error.what());
  }
}

/// A file that must hold one JSON object.
inline nlohmann::ordered_json read_json_object(const std::filesystem::path& path) {
  auto json = read_json(path);
  TORCH_CHECK(json.is_object(), "'", path.string(), "' must hold a JSON object, but it holds ",
              json.type_name());
  return json;
}

/// A JSON value for a message, cut where it is long.
inline std::string json_text(const nlohmann::ordered_json& value) {
  constexpr size_t most = 60;
  std::string text = value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  return text.size() <= most ? text : text.substr(0, most) + "…";
}

}  // namespace internal

/// Reads the keys of a `config.json`. What is wrong is collected, each with its key; `finish()` throws it,
/// with the file's name. An absent key has its default, as in transformers; one of another type is an error.
///
/// Example:
/// ```
/// peft::ConfigReader reader("model/config.json");
/// const auto hidden = reader.integer("hidden_size", 768, /*least=*/1);
/// const auto dropout = reader.number("hidden_dropout_prob", 0.1, 0.0, 1.0);
/// reader.finish();
/// ```
class ConfigReader {
 public:
  explicit ConfigReader(std::filesystem::path path)
      : path_(std::move(path)), json_(internal::read_json_object(path_)) {}

  const nlohmann::ordered_json& json() const { return json_; }

  /// True where the key is there and is not null.
  bool has(const std::string& key) const { return json_.contains(key) && !json_[key].is_null(); }

  int64_t integer(const std::string& key, int64_t absent, int64_t least,
                  int64_t most = std::numeric_limits<int32_t>::max()) {
    if (!json_.contains(key)) return absent;
    const auto& value = json_[key];
    const bool fits =
        value.is_number_integer() && value.get<int64_t>() >= least && value.get<int64_t>() <= most;
    if (!fits) {
      complain(key, "must be an integer from " + std::to_string(least) + " to " + std::to_string(most));
      return absent;
    }
    return value.get<int64_t>();
  }

  double number(const std::string& key, double absent, double least, double most) {
    if (!json_.contains(key)) return absent;
    const auto& value = json_[key];
    const double found = value.is_number() ? value.get<double>() : std::nan("");
    if (!(found >= least && found <= most)) {
      complain(key, "must be a number from " + nlohmann::json(least).dump() + " to " +
                        nlohmann::json(most).dump());
      return absent;
    }
    return found;
  }

  bool boolean(const std::string& key, bool absent) {
    if (!json_.contains(key)) return absent;
    if (!json_[key].is_boolean()) {
      complain(key, "must be true or false");
      return absent;
    }
    return json_[key].get<bool>();
  }

  std::string string(const std::string& key, std::string absent) {
    if (!json_.contains(key)) return absent;
    if (!json_[key].is_string()) {
      complain(key, "must be a string");
      return absent;
    }
    return json_[key].get<std::string>();
  }

  /// Notes that the key's value will not do: "config.json: 'key' must be …, but got 3 (hint: …)".
  void complain(const std::string& key, const std::string& must, const std::string& hint = {}) {
    problems_.add("'" + key + "' " + must + ", but got " +
                  (json_.contains(key) ? internal::json_text(json_[key]) : "none") +
                  (hint.empty() ? "" : " (hint: " + hint + ")"));
  }

  /// Throws c10::ValueError when there is anything to say.
  void finish() const { problems_.raise("'" + path_.string() + "'"); }

 private:
  std::filesystem::path path_;
  nlohmann::ordered_json json_;
  internal::Problems problems_;
};

namespace internal {

/// What Hugging Face calls a floating type: "float32", formerly "torch.float32".
inline std::optional<torch::ScalarType> dtype_of_name(std::string name) {
  if (name.starts_with("torch.")) name.erase(0, 6);
  if (name == "float32") return torch::kFloat32;
  if (name == "float16") return torch::kFloat16;
  if (name == "bfloat16") return torch::kBFloat16;
  if (name == "float64") return torch::kFloat64;
  return std::nullopt;
}

/// The reverse of `dtype_of_name`.
inline std::string name_of_dtype(torch::ScalarType type) {
  switch (type) {
    case torch::kFloat16:
      return "float16";
    case torch::kBFloat16:
      return "bfloat16";
    case torch::kFloat64:
      return "float64";
    default:
      return "float32";
  }
}

/// The names of a classifier's labels in the order of their ids, from `id2label`, or "LABEL_0" … as many as
/// `num_labels` says, or two.
inline std::vector<std::string> read_labels(ConfigReader& reader) {
  constexpr int64_t most = 1'000'000;
  int64_t count = 2;
  if (reader.has("num_labels")) count = reader.integer("num_labels", count, 1, most);
  std::vector<std::string> labels;
  if (reader.has("id2label")) {
    const auto& map = reader.json()["id2label"];
    for (size_t i = 0; map.is_object() && i < map.size(); ++i) {
      const auto found = map.find(std::to_string(i));
      if (found != map.end() && found->is_string()) labels.push_back(found->get<std::string>());
    }
    if (!map.is_object() || map.empty() || labels.size() != map.size()) {
      reader.complain("id2label", R"(must map "0", "1" and so on to strings)");
    } else if (reader.has("num_labels") && static_cast<size_t>(count) != labels.size()) {
      reader.complain("num_labels",
                      "must be the number of labels in 'id2label', " + std::to_string(labels.size()));
    }
    if (!labels.empty()) return labels;
  }
  for (int64_t i = 0; i < count; ++i) labels.push_back("LABEL_" + std::to_string(i));
  return labels;
}

}  // namespace internal
}  // namespace peft
