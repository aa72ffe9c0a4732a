// Cell: one run of the table, and its file.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "metrics.h"
#include "peft/io/atomic_file.h"
#include "peft/io/config_json.h"
#include "recipe.h"

namespace glue {

namespace fs = std::filesystem;

/// A metric of one of the task's files to evaluate on; no value where it is undefined.
struct Score {
  std::string name;
  std::optional<double> value;
};

/// The scores after a step.
struct Evaluated {
  std::int64_t step = 0;
  std::vector<Score> scores;

  /// The mean of the scores, as GLUE averages them; none where one is undefined.
  std::optional<double> score() const {
    double sum = 0;
    for (const auto& one : scores) {
      if (!one.value) return std::nullopt;
      sum += *one.value;
    }
    return sum / static_cast<double>(scores.size());
  }
};

/// The first evaluation with the best score; the last one where none has any.
inline const Evaluated& best_of(const std::vector<Evaluated>& curve) {
  const auto less = [](const Evaluated& a, const Evaluated& b) {
    return a.score().value_or(-2) < b.score().value_or(-2);
  };
  const auto best = std::max_element(curve.begin(), curve.end(), less);
  return best->score() ? *best : curve.back();
}

/// What a run came to.
struct CellResult {
  std::vector<Evaluated> curve;
  std::int64_t head_weights = 0, other_weights = 0;  ///< that train
  std::int64_t peak_bytes = 0, steps = 0;
  double seconds = 0;  ///< of training, evaluations left out
  double first_loss = 0, last_loss = 0;

  const Evaluated& best() const { return best_of(curve); }
};

/// What decides the result of a run.
struct CellSettings {
  std::string program = "peft";  ///< or "python"
  std::string task, method;      ///< `method`: its name in the table
  std::uint64_t seed = 0;
  Recipe recipe;
  std::int64_t eval_every = 0;  ///< steps; 0: after each epoch
  std::string model, data;      ///< which they were

  nlohmann::ordered_json to_json() const {
    return {{"program", program},
            {"task", task},
            {"method", method},
            {"seed", seed},
            {"recipe", recipe.to_json()},
            {"eval_every", eval_every},
            {"model", model},
            {"data", data}};
  }
  /// For people.
  std::string name() const {
    return fmt::format("{} {}{} seed {}", task, method, program == "peft" ? "" : " in Python", seed);
  }
  fs::path file() const {
    return fs::path(task) / fmt::format("{}{}-{}.json", program == "peft" ? "" : "python-", method, seed);
  }
};

namespace internal {

inline nlohmann::ordered_json to_json(const CellResult& result) {
  auto curve = nlohmann::ordered_json::array();
  for (const auto& evaluated : result.curve) {
    auto scores = nlohmann::ordered_json::object();
    for (const auto& [name, value] : evaluated.scores)
      scores[name] = value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
    curve.push_back({{"step", evaluated.step}, {"scores", std::move(scores)}});
  }
  const auto score = result.best().score();
  return {{"score", score ? nlohmann::ordered_json(*score) : nlohmann::ordered_json()},
          {"best_step", result.best().step},
          {"head_weights", result.head_weights},
          {"other_weights", result.other_weights},
          {"peak_bytes", result.peak_bytes},
          {"steps", result.steps},
          {"seconds", result.seconds},
          {"first_loss", result.first_loss},
          {"last_loss", result.last_loss},
          {"curve", std::move(curve)}};
}

inline CellResult result_of(const nlohmann::ordered_json& json) {
  CellResult result;
  result.head_weights = json.at("head_weights").get<std::int64_t>();
  result.other_weights = json.at("other_weights").get<std::int64_t>();
  result.peak_bytes = json.at("peak_bytes").get<std::int64_t>();
  result.steps = json.at("steps").get<std::int64_t>();
  result.seconds = json.at("seconds").get<double>();
  result.first_loss = json.at("first_loss").get<double>();
  result.last_loss = json.at("last_loss").get<double>();
  for (const auto& item : json.at("curve")) {
    Evaluated evaluated{item.at("step").get<std::int64_t>(), {}};
    for (const auto& [name, value] : item.at("scores").items()) {
      evaluated.scores.push_back(
          {name, value.is_null() ? std::nullopt : std::optional<double>(value.get<double>())});
    }
    result.curve.push_back(std::move(evaluated));
  }
  if (result.curve.empty()) throw std::runtime_error("'curve' is empty");
  return result;
}

/// Adds the first leaf in which two settings differ to `path`; false where they are the same.
inline bool first_difference(const nlohmann::ordered_json& was, const nlohmann::ordered_json& is,
                             std::string& path) {
  if (was == is) return false;
  if (!was.is_object() || !is.is_object()) return true;
  for (const auto& [key, value] : is.items()) {
    auto inner = path.empty() ? key : path + "." + key;
    if (!was.contains(key) || first_difference(was.at(key), value, inner)) {
      path = inner;
      return true;
    }
  }
  return true;
}

}  // namespace internal

/// The cells of a folder, each a file that is there when the cell is finished.
class Cells {
 public:
  explicit Cells(fs::path folder) : folder_(std::move(folder)) {}

  fs::path path(const CellSettings& settings) const { return folder_ / "cells" / settings.file(); }
  const fs::path& folder() const { return folder_; }

  /// A finished cell, or nothing. Throws: std::runtime_error where its file is damaged, or was made with
  /// other settings, naming the first that differs.
  std::optional<CellResult> read(const CellSettings& settings) const {
    const auto file = path(settings);
    std::error_code ignored;
    if (!fs::is_regular_file(file, ignored)) return std::nullopt;
    const auto json = peft::internal::read_json_object(file);
    try {
      const auto was = json.at("settings"), is = settings.to_json();
      std::string at;
      if (internal::first_difference(was, is, at)) {
        const auto pointer = nlohmann::ordered_json::json_pointer("/" + replaced(at));
        throw std::runtime_error(fmt::format(
            "{} was {} when the cell was run, but is {} now (hint: another --out)",
            at.empty() ? "its settings" : at, was.contains(pointer) ? was.at(pointer).dump() : "absent",
            is.contains(pointer) ? is.at(pointer).dump() : "absent"));
      }
      return internal::result_of(json.at("result"));
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}: {}", file.string(), error.what()));
    }
  }

  /// Writes a finished cell: all of it or nothing.
  void write(const CellSettings& settings, const CellResult& result) const {
    const auto file = path(settings);
    fs::create_directories(file.parent_path());
    const nlohmann::ordered_json json{{"settings", settings.to_json()},
                                      {"result", internal::to_json(result)}};
    peft::write_file(file, json.dump(2) + "\n");
  }

 private:
  static std::string replaced(std::string text) {
    std::replace(text.begin(), text.end(), '.', '/');
    return text;
  }

  fs::path folder_;
};

}  // namespace glue
