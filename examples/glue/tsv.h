// GLUE's TSV files: the rows of a task, as texts and labels.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tasks.h"
#include "text/dataset.h"

namespace glue {

/// One example.
struct GlueRow {
  std::string text, text_b;  ///< the second is empty where the task has single texts
  std::int64_t label = -1;   ///< its class, or −1
  double score = 0;          ///< where the task is a regression
  std::size_t line = 0;      ///< in the file, counted from 1
};

namespace internal {

/// The tasks whose files have this header.
inline std::string tasks_with_header(const std::vector<std::string>& header) {
  std::vector<std::string> names;
  for (const auto& task : glue_tasks()) {
    if (!header.empty() && (task.train.header == header || task.dev.header == header))
      names.push_back(task.name);
  }
  return names.empty()
             ? ""
             : fmt::format(", {} of {}", names.size() > 1 ? "those" : "that", fmt::join(names, " and "));
}

inline std::vector<std::string> strings(const std::vector<std::string_view>& views) {
  return {views.begin(), views.end()};
}

/// Throws where the first line is not what the task's files begin with.
inline void check_first_line(const std::filesystem::path& path, const GlueTask& task, const Layout& layout,
                             const std::vector<std::string>& columns) {
  constexpr std::size_t most_shown = 200;
  const auto found = [&] {
    auto text = fmt::format("{}", fmt::join(columns, ", "));
    if (text.size() > most_shown)
      text = fmt::format("{}…", text.substr(0, text.find_last_of(' ', most_shown)));
    return text + tasks_with_header(columns);
  };
  if (!layout.header.empty()) {
    if (columns == layout.header) return;
    throw std::runtime_error(fmt::format("{}: expected the columns of {} ({}), but found {}", path.string(),
                                         task.name, fmt::join(layout.header, ", "), found()));
  }
  if (columns.size() == layout.columns() && tasks_with_header(columns).empty()) return;
  throw std::runtime_error(fmt::format("{}: expected the columns of {} ({}, without a header), but found {}",
                                       path.string(), task.name, fmt::join(layout.names, ", "), found()));
}

/// What is wrong with the label of a line; else it is in `row`.
inline std::string read_label(const GlueTask& task, std::string_view text, GlueRow& row) {
  constexpr double most = 5;
  if (!task.is_regression()) {
    const auto at = std::find(task.labels.begin(), task.labels.end(), text);
    if (at == task.labels.end()) {
      return fmt::format("label must be one of {}'s ({}), but got '{}'", task.name,
                         fmt::join(task.labels, ", "), text);
    }
    row.label = at - task.labels.begin();
    return "";
  }
  const auto [stopped, error] = std::from_chars(text.data(), text.data() + text.size(), row.score);
  const bool number = error == std::errc() && stopped == text.data() + text.size();
  if (number && row.score >= 0 && row.score <= most) return "";
  return fmt::format("score must be a number from 0 to {}, but got '{}'", most, text);
}

}  // namespace internal

/// Reads one file of a task. Nothing is quoted: a `"` is a character. A byte-order mark and CRLF line ends
/// are tolerated. `note` gets a line about what is left out.
/// Throws: std::runtime_error naming the file where it is one of another task, with the columns expected and
/// found, and every line that is wrong.
inline std::vector<GlueRow> read_rows(const std::filesystem::path& path, const GlueTask& task,
                                      const Layout& layout,
                                      const std::function<void(const std::string&)>& note = {}) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path))
    throw std::runtime_error(fmt::format("{}: cannot be opened for reading", path.string()));
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) throw std::runtime_error(fmt::format("{}: cannot be read", path.string()));
  std::string_view rest = bytes;
  constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";
  if (rest.starts_with(byte_order_mark)) rest.remove_prefix(byte_order_mark.size());

  std::vector<GlueRow> rows;
  std::vector<std::string> problems;
  std::size_t short_lines = 0;
  for (std::size_t number = 1; !rest.empty() || number == 1; ++number) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    const auto columns = text::internal::split(line, '\t');
    if (number == 1) {
      internal::check_first_line(path, task, layout, internal::strings(columns));
      if (!layout.header.empty()) continue;
    }
    if (const auto at = text::invalid_utf8_at(line)) {
      problems.push_back(
          fmt::format("{}: must be valid UTF-8, but the byte at offset {} of the line is not", number, *at));
      continue;
    }
    if (columns.size() != layout.columns()) {
      if (task.has_short_lines && columns.size() < layout.columns()) {
        ++short_lines;
        continue;
      }
      problems.push_back(
          fmt::format("{}: must have {} columns, but has {}", number, layout.columns(), columns.size()));
      continue;
    }
    GlueRow row;
    row.line = number;
    row.text = columns[layout.texts[0]];
    if (layout.texts.size() > 1) row.text_b = columns[layout.texts[1]];
    if (const auto what = internal::read_label(task, columns[layout.label], row); !what.empty()) {
      problems.push_back(fmt::format("{}: {}", number, what));
      continue;
    }
    rows.push_back(std::move(row));
  }
  text::internal::throw_problems(path, problems);
  if (rows.empty()) throw std::runtime_error(path.string() + ": must have rows, but has none");
  if (short_lines > 0 && note)
    note(fmt::format("{}: {} lines with columns missing are left out", path.string(), short_lines));
  return rows;
}

}  // namespace glue
