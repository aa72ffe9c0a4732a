// Report: the finished cells as a text table, Markdown and CSV.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cell.h"
#include "finetune/progress.h"
#include "finetune/report.h"
#include "finetune/terminal_table.h"
#include "pairs.h"

namespace glue {

/// A finished cell.
struct FinishedCell {
  CellSettings settings;
  CellResult result;
};

namespace internal {

/// A method in the table.
inline std::string row_name(const CellSettings& settings) {
  return settings.program == "peft" ? settings.method : settings.method + " (Python)";
}

/// "52.31 ± 1.20", as parts of a hundred; the deviation of a sample.
inline std::string mean_text(const std::vector<std::optional<double>>& values) {
  const auto undefined = std::count(values.begin(), values.end(), std::nullopt);
  if (undefined > 0) return fmt::format("undefined ({} of {})", undefined, values.size());
  double sum = 0, squares = 0;
  const auto count = static_cast<double>(values.size());
  for (const auto& value : values) sum += *value;
  for (const auto& value : values) squares += std::pow(*value - sum / count, 2);
  if (values.size() < 2) return fmt::format("{:.2f}", 100 * sum);
  return fmt::format("{:.2f} ± {:.2f}", 100 * sum / count, 100 * std::sqrt(squares / (count - 1)));
}

/// The names of a column or row in the order in which they come first.
template <class Name>
std::vector<std::string> names_of(const std::vector<FinishedCell>& cells, const Name& name) {
  std::vector<std::string> names;
  for (const auto& cell : cells) {
    for (const auto& one : name(cell)) {
      if (std::find(names.begin(), names.end(), one) == names.end()) names.push_back(one);
    }
  }
  return names;
}

/// The columns of a cell.
inline std::vector<std::string> columns_of(const FinishedCell& cell) {
  std::vector<std::string> columns;
  for (const auto& one : cell.result.best().scores) columns.push_back(cell.settings.task + " " + one.name);
  return columns;
}

}  // namespace internal

/// Header and lines: methods down, metrics across; each the mean over the seeds ± its deviation, at the best
/// evaluation. The average is that of the tasks' scores, where a method has all tasks. Trained weights and
/// memory are the largest of the tasks', time is the sum of their means.
inline std::vector<std::vector<std::string>> table_cells(const std::vector<FinishedCell>& cells) {
  const auto columns = internal::names_of(cells, internal::columns_of);
  const auto tasks = internal::names_of(
      cells, [](const FinishedCell& cell) { return std::vector<std::string>{cell.settings.task}; });
  const auto rows = internal::names_of(cells, [](const FinishedCell& cell) {
    return std::vector<std::string>{internal::row_name(cell.settings)};
  });
  std::vector<std::vector<std::string>> table{{"method"}};
  for (const auto& column : columns) table[0].push_back(column);
  for (const auto* column : {"average", "trained", "with head", "memory", "time"})
    table[0].emplace_back(column);
  for (const auto& row : rows) {
    std::map<std::string, std::vector<std::optional<double>>> values;
    std::map<std::string, std::vector<double>> scores, seconds;
    std::int64_t trained = 0, with_head = 0, memory = 0;
    bool defined = true;
    for (const auto& [settings, result] : cells) {
      if (internal::row_name(settings) != row) continue;
      for (const auto& one : result.best().scores)
        values[settings.task + " " + one.name].push_back(one.value);
      defined = defined && result.best().score();
      scores[settings.task].push_back(result.best().score().value_or(0));
      seconds[settings.task].push_back(result.seconds);
      trained = std::max(trained, result.other_weights);
      with_head = std::max(with_head, result.other_weights + result.head_weights);
      memory = std::max(memory, result.peak_bytes);
    }
    std::vector<std::string> line{row};
    for (const auto& column : columns)
      line.push_back(values.count(column) ? internal::mean_text(values.at(column)) : "-");
    const auto sum_of_means = [](const std::map<std::string, std::vector<double>>& all) {
      double sum = 0;
      for (const auto& [task, some] : all) {
        double part = 0;
        for (const auto value : some) part += value;
        sum += part / static_cast<double>(some.size());
      }
      return sum;
    };
    const bool complete = scores.size() == tasks.size() && defined;
    line.push_back(complete
                       ? fmt::format("{:.2f}", 100 * sum_of_means(scores) / static_cast<double>(tasks.size()))
                       : "-");
    line.push_back(finetune::internal::grouped(trained));
    line.push_back(finetune::internal::grouped(with_head));
    line.push_back(finetune::internal::size_text(memory));
    line.push_back(finetune::clock_time(sum_of_means(seconds)));
    table.push_back(std::move(line));
  }
  return table;
}

/// The pairs of scores of each task and method that both programs have, in the order of the cells.
inline std::vector<std::pair<CellSettings, Pairs>> pairs_of(const std::vector<FinishedCell>& cells) {
  std::vector<std::pair<CellSettings, Pairs>> result;
  for (const auto& ours : cells) {
    if (ours.settings.program != "peft") continue;
    for (const auto& theirs : cells) {
      const auto &a = ours.settings, &b = theirs.settings;
      if (b.program == "peft" || a.task != b.task || a.method != b.method || a.seed != b.seed) continue;
      const auto at = std::find_if(result.begin(), result.end(), [&](const auto& item) {
        return item.first.task == a.task && item.first.method == a.method;
      });
      auto& pairs = at == result.end() ? result.emplace_back(a, Pairs()).second : at->second;
      if (!ours.result.best().score() || !theirs.result.best().score()) continue;
      pairs.ours.push_back(*ours.result.best().score());
      pairs.theirs.push_back(*theirs.result.best().score());
    }
  }
  return result;
}

/// The two programs beside each other, in points of a hundred.
inline std::vector<std::vector<std::string>> peer_cells(const std::vector<FinishedCell>& cells) {
  std::vector<std::vector<std::string>> table{
      {"task, method", "seeds", "peft", "Python", "difference", "standard error", "verdict"}};
  const auto mean = [](const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  };
  for (const auto& [settings, pairs] : pairs_of(cells)) {
    std::vector<std::string> line{settings.task + ", " + settings.method, std::to_string(pairs.size())};
    if (pairs.size() == 0) {
      line.insert(line.end(), {"undefined", "undefined", "-", "-", "-"});
    } else {
      const auto error = pairs.standard_error();
      line.insert(
          line.end(),
          {fmt::format("{:.2f}", 100 * mean(pairs.ours)), fmt::format("{:.2f}", 100 * mean(pairs.theirs)),
           fmt::format("{:+.2f}", 100 * pairs.mean()),
           std::isnan(error) ? "-" : fmt::format("{:.2f}", 100 * error), pairs.agree() ? "agree" : "differ"});
    }
    table.push_back(std::move(line));
  }
  return table;
}

/// A table for GitHub.
inline std::string markdown(const std::vector<std::vector<std::string>>& table) {
  std::string result;
  for (std::size_t i = 0; i < table.size(); ++i) {
    result += fmt::format("| {} |\n", fmt::join(table[i], " | "));
    if (i > 0) continue;
    result += "|---|";
    for (std::size_t column = 1; column < table[i].size(); ++column) result += "---:|";
    result += "\n";
  }
  return result;
}

/// A line a metric of a cell, with all digits; the value is empty where the metric is undefined.
inline std::string csv(const std::vector<FinishedCell>& cells) {
  std::string result =
      "task,method,program,seed,metric,value,best_step,steps,trained,trained_with_head,peak_bytes,"
      "seconds\r\n";
  for (const auto& [settings, found] : cells) {
    for (const auto& one : found.best().scores) {
      result += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{}\r\n", settings.task,
                            finetune::internal::csv_field(settings.method), settings.program, settings.seed,
                            one.name, one.value ? fmt::format("{}", *one.value) : "", found.best().step,
                            found.steps, found.other_weights, found.other_weights + found.head_weights,
                            found.peak_bytes, found.seconds);
    }
  }
  return result;
}

}  // namespace glue
