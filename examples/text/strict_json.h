// StrictJson: reads a JSON file key by key and reports everything that is wrong
// with it at once.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace text::internal {

using Json = nlohmann::json;

/// What the reader of one file is derived from. A wrong key is a problem that
/// is kept, and gives an empty value; `finish` throws all problems.
class StrictJson {
 protected:
  explicit StrictJson(std::filesystem::path path) : path_(std::move(path)) {}

  static constexpr std::int64_t largest_id = std::numeric_limits<std::int32_t>::max();

  Json parse() {
    std::ifstream file(path_, std::ios::binary);
    if (!file) throw std::runtime_error(fmt::format("{}: cannot be opened for reading", path_.string()));
    const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (file.bad()) throw std::runtime_error(fmt::format("{}: cannot be read", path_.string()));
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    const auto watch = [&](int, Json::parse_event_t event, Json& value) {
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
        problem(value.get<std::string>(), "occurs twice in one object");
      }
      return true;
    };
    try {
      return Json::parse(bytes, watch);
    } catch (const Json::exception& error) {
      throw std::runtime_error(fmt::format("{}: must be JSON, but {}", path_.string(), error.what()));
    }
  }

  void problem(const std::string& key, const std::string& what) {
    problems_.push_back(key.empty() ? "the file " + what : fmt::format("key '{}' {}", key, what));
  }

  void finish() const {
    constexpr std::size_t most_shown = 20;
    if (problems_.empty()) return;
    if (problems_.size() == 1) throw std::runtime_error(fmt::format("{}: {}", path_.string(), problems_[0]));
    std::string message =
        fmt::format("{}: has {} problems: {}", path_.string(), problems_.size(), problems_[0]);
    for (std::size_t i = 1; i < std::min(problems_.size(), most_shown); ++i) message += "\n  " + problems_[i];
    if (problems_.size() > most_shown) {
      message += fmt::format("\n  and {} more", problems_.size() - most_shown);
    }
    throw std::runtime_error(message);
  }

  static std::string shown(const Json& value) {
    const std::string all = value.dump(-1, ' ', true);
    return all.size() <= 60 ? all : all.substr(0, 57) + "...";
  }

  static std::string join(const std::string& parent, const std::string& key) {
    return parent.empty() ? key : parent + "." + key;
  }

  bool expect_object(const Json& value, const std::string& key) {
    if (!value.is_object()) problem(key, fmt::format("must be an object, but got {}", shown(value)));
    return value.is_object();
  }

  const Json* object(const Json& root, const std::string& key) {
    if (!root.contains(key)) {
      problem(key, "is missing");
      return nullptr;
    }
    return expect_object(root[key], key) ? &root[key] : nullptr;
  }

  template <typename T>
  T value(const Json& parent, const std::string& parent_key, const std::string& key, const char* what,
          bool (*fits)(const Json&)) {
    const auto found = parent.find(key);
    if (found == parent.end()) {
      problem(join(parent_key, key), "is missing");
    } else if (!fits(*found)) {
      problem(join(parent_key, key), fmt::format("must be {}, but got {}", what, shown(*found)));
    } else {
      return found->template get<T>();
    }
    return T{};
  }

  static bool is_id(const Json& json) { return json.is_number_integer() && json >= 0 && json <= largest_id; }

  bool boolean(const Json& parent, const std::string& parent_key, const std::string& key) {
    return value<bool>(parent, parent_key, key, "true or false",
                       [](const Json& j) { return j.is_boolean(); });
  }
  std::int64_t integer(const Json& parent, const std::string& parent_key, const std::string& key) {
    return value<std::int64_t>(parent, parent_key, key, "a whole number from 0 to 2147483647", is_id);
  }
  std::string string(const Json& parent, const std::string& parent_key, const std::string& key) {
    return value<std::string>(parent, parent_key, key, "a string",
                              [](const Json& j) { return j.is_string(); });
  }

  /// The `type` of a part, which must be one of those given; empty where it is
  /// not.
  std::string kind(const Json& part, const std::string& key, std::initializer_list<std::string> known) {
    const std::string type = string(part, key, "type");
    for (const std::string& name : known) {
      if (type == name) return type;
    }
    if (part.contains("type") && part["type"].is_string()) {
      problem(key + ".type",
              fmt::format("must be {}, but got {}", fmt::join(known, " or "), shown(part["type"])));
    }
    return "";
  }

 private:
  std::filesystem::path path_;
  std::vector<std::string> problems_;
};

/// A whole file. Throws: std::runtime_error naming it where it is no JSON, or
/// has a key twice.
inline Json read_json(const std::filesystem::path& path) {
  struct Reader : StrictJson {
    explicit Reader(const std::filesystem::path& file) : StrictJson(file) {}
    using StrictJson::finish;
    using StrictJson::parse;
  } reader(path);
  Json json = reader.parse();
  reader.finish();
  return json;
}

}  // namespace text::internal
