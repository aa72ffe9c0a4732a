// compare: several methods trained on the same data from the same base, and their table.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "child.h"
#include "learning_curves.h"
#include "peft/io/atomic_file.h"
#include "peft/io/staged_directory.h"
#include "report.h"
#include "result_row.h"
#include "train.h"

namespace finetune {

namespace internal {

inline nlohmann::json to_json(const ResultRow& row) {
  const auto points = [](const std::vector<ResultRow::Point>& curve) {
    auto list = nlohmann::json::array();
    for (const auto& point : curve) list.push_back({point.step, point.value});
    return list;
  };
  return {{"method", row.method},
          {"trainable", row.trainable},
          {"percent", row.percent},
          {"accuracy", row.accuracy},
          {"seconds_per_step", row.seconds_per_step},
          {"peak_bytes", row.peak_bytes},
          {"adapter_bytes", row.adapter_bytes},
          {"train_seconds", row.train_seconds},
          {"loss", points(row.loss)},
          {"accuracy_curve", points(row.accuracy_curve)},
          {"ranks", row.ranks.to_json()}};
}

inline ResultRow row_of(const nlohmann::json& json) {
  const auto points = [&](const char* key) {
    std::vector<ResultRow::Point> curve;
    for (const auto& point : json.at(key)) curve.push_back({point[0].get<int64_t>(), point[1].get<double>()});
    return curve;
  };
  ResultRow row;
  row.method = json.at("method").get<std::string>();
  row.trainable = json.at("trainable").get<int64_t>();
  row.percent = json.at("percent").get<double>();
  row.accuracy = json.at("accuracy").get<double>();
  row.seconds_per_step = json.at("seconds_per_step").get<double>();
  row.peak_bytes = json.at("peak_bytes").get<int64_t>();
  row.adapter_bytes = json.at("adapter_bytes").get<int64_t>();
  row.train_seconds = json.at("train_seconds").get<double>();
  row.loss = points("loss");
  row.accuracy_curve = points("accuracy_curve");
  row.ranks = RankHistory::from_json(json.at("ranks"));
  return row;
}

/// Throws where one of the methods does not fit the model, listing all that do not.
inline void check_methods(const TrainOptions& options, const std::vector<std::string>& methods) {
  const auto data = read_data(options);
  const auto task =
      Task::for_training({options.model, parse_dtype(options.dtype), options.dropout, torch::kCPU},
                         options.pooling, static_cast<int64_t>(data.labels.size()));
  std::string problems;
  for (const auto& text : methods) {
    try {
      task.check(read_method(options, text, data.steps(options)));
    } catch (const std::exception& error) {
      problems += (problems.empty() ? "" : "\n") + std::string(error.what());
    }
  }
  if (!problems.empty()) throw std::runtime_error(problems);
}

/// A folder's name for each method: `lora`, and `lora-2` for a second.
inline std::vector<std::string> folder_names(const std::vector<std::string>& methods) {
  std::vector<std::string> names;
  std::map<std::string, int> seen;
  for (const auto& text : methods) {
    const auto name = split_method(text).first;
    const int count = ++seen[name];
    names.push_back(count == 1 ? name : fmt::format("{}-{}", name, count));
  }
  return names;
}

/// Whether a folder holds nothing but what `compare` writes.
inline bool is_comparison(const fs::path& folder) {
  std::error_code error;
  return fs::exists(folder / "results.csv", error) || fs::is_empty(folder, error);
}

}  // namespace internal

/// Trains each method in a process of its own, prints the table, and leaves adapters, `results.csv` and
/// `learning_curves.svg` in `options.out`, if that is given: all of it or nothing.
inline void compare(const TrainOptions& options, const std::vector<std::string>& methods,
                    const std::function<int(const std::function<void()>&)>& program) {
  std::error_code error;
  if (!options.out.empty()) {
    check_log(options.log, options.out);
    const bool used = fs::exists(options.out, error) &&
                      !(fs::is_directory(options.out, error) && fs::is_empty(options.out, error));
    if (used && !options.overwrite) {
      throw std::runtime_error(
          fmt::format("--out: '{}' exists (hint: another name, or --overwrite)", options.out.string()));
    }
    if (used && !(fs::is_directory(options.out, error) && internal::is_comparison(options.out))) {
      throw std::runtime_error(
          fmt::format("--out: '{}' was not written by compare; it is not overwritten", options.out.string()));
    }
  }
  for (const auto& method : methods) read_method(options, method);
  internal::in_child(
      [&] {
        internal::check_methods(options, methods);
        return std::string();
      },
      program, "compare");
  const auto names = internal::folder_names(methods);
  peft::StagedDirectory staged(
      options.out.empty() ? fs::temp_directory_path() / "peft-finetune-compare" : options.out,
      /*overwrite=*/true);
  std::vector<ResultRow> rows;
  for (size_t i = 0; i < methods.size(); ++i) {
    auto one = options;
    one.method = methods[i];
    one.out = staged.path() / names[i];
    one.checkpoint_every = 0;
    one.quiet = true;
    fmt::print(stderr, "method {} of {}: {}\n", i + 1, methods.size(), methods[i]);
    if (!one.log.empty()) one.log += fmt::format(".{}", names[i]);
    const auto text =
        internal::in_child([&] { return internal::to_json(Run(one)()).dump(); }, program, methods[i]);
    rows.push_back(internal::row_of(nlohmann::json::parse(text)));
  }
  fmt::print("{}", table(rows));
  for (const auto& row : rows) {
    if (!row.ranks.empty()) fmt::print("\n{}\n{}", row.method, rank_table(row.ranks));
  }
  std::fflush(stdout);
  if (options.out.empty()) return;
  peft::write_file(staged.path() / "learning_curves.svg", svg(rows));
  peft::write_file(staged.path() / "results.csv", csv(rows));
  staged.commit();
  fmt::print(stderr, "adapters, results.csv and learning_curves.svg: '{}'\n", options.out.string());
}

}  // namespace finetune
