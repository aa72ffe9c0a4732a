// Report: the results of a comparison as a table, CSV and learning curves.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "finetune/learning_curves.h"
#include "finetune/progress.h"
#include "finetune/result_row.h"
#include "finetune/terminal_table.h"
#include "text/unicode.h"

namespace finetune {

namespace internal {

/// "1234567" with spaces between the thousands.
inline std::string grouped(std::int64_t count) {
  std::string digits = std::to_string(count);
  for (std::size_t position = digits.size(); position > (count < 0 ? 4u : 3u);) {
    position -= 3;
    digits.insert(position, 1, ' ');
  }
  return digits;
}

/// A size for people: "812 B", "1.2 MiB"; "-" for none.
inline std::string size_text(std::int64_t bytes) {
  if (bytes <= 0) return "-";
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double size = static_cast<double>(bytes);
  std::size_t unit = 0;
  constexpr std::string_view units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  // 1023.96 would be rounded to 1024.0.
  for (; size >= 1023.95 && unit + 1 < std::size(units); ++unit) size /= 1024;
  return fmt::format("{:.1f} {}", size, units[unit]);
}

/// A field of a CSV file as RFC 4180 wants it.
inline std::string csv_field(std::string_view text) {
  if (text.find_first_of(",\"\r\n") == std::string_view::npos) return std::string(text);
  std::string field = "\"";
  for (const char c : text) field.append(c == '"' ? 2 : 1, c);
  return field + "\"";
}

/// The methods as a table has room for: long ones cut, unless two would look alike.
inline std::vector<std::string> labels(const std::vector<ResultRow>& rows) {
  constexpr std::size_t widest = 40;
  std::vector<std::string> full, cut;
  for (const ResultRow& row : rows) {
    full.push_back(text::replace_invalid_utf8(row.method));
    std::string label = full.back();
    while (display_width(label) >= widest) {
      while ((static_cast<unsigned char>(label.back()) & 0xC0) == 0x80) label.pop_back();
      label.pop_back();
    }
    cut.push_back(label == full.back() ? label : label + "…");
  }
  auto sorted = cut;
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end() ? cut : full;
}

}  // namespace internal

/// The rows as a table for people: the method to the left, figures to the right, columns aligned as a
/// terminal shows them.
inline std::string table(const std::vector<ResultRow>& rows) {
  std::vector<std::vector<std::string>> cells = {
      {"method", "trainable", "%", "accuracy", "s/step", "peak memory", "adapter", "time"}};
  const auto labels = internal::labels(rows);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const ResultRow& row = rows[i];
    cells.push_back({labels[i], internal::grouped(row.trainable),
                     fmt::format("{:.{}f}", row.percent, row.percent < 1 ? 3 : 2),
                     std::isfinite(row.accuracy) && !row.accuracy_curve.empty()
                         ? fmt::format("{:.2f} %", 100 * row.accuracy)
                         : "-",
                     fmt::format("{:.3f}", row.seconds_per_step), internal::size_text(row.peak_bytes),
                     internal::size_text(row.adapter_bytes), clock_time(row.train_seconds)});
  }
  return aligned(cells);
}

/// The rows as CSV (RFC 4180) with a header line, numbers in full precision; accuracy is empty where there
/// was no evaluation.
inline std::string csv(const std::vector<ResultRow>& rows) {
  std::string result =
      "method,trainable,percent,accuracy,seconds_per_step,peak_bytes,adapter_bytes,train_seconds\r\n";
  for (const ResultRow& row : rows) {
    result += fmt::format("{},{},{},{},{},{},{},{}\r\n", internal::csv_field(row.method), row.trainable,
                          row.percent, row.accuracy_curve.empty() ? "" : fmt::format("{}", row.accuracy),
                          row.seconds_per_step, row.peak_bytes, row.adapter_bytes, row.train_seconds);
  }
  return result;
}

}  // namespace finetune
