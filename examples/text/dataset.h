// Dataset: labelled texts from a tab-separated file, their classes, and the order of an epoch.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unicode.h"

namespace text {

/// Spreads the bits of a number (the finalizer of MurmurHash3).
constexpr std::uint64_t mix(std::uint64_t h) {
  h ^= h >> 33;
  h *= 0xff51afd7ed558ccdULL;
  h ^= h >> 33;
  h *= 0xc4ceb9fe1a85ec53ULL;
  return h ^ h >> 33;
}

/// A hash of a text's bytes that is the same on every machine: FNV-1a, mixed.
constexpr std::uint64_t h64(std::string_view bytes) {
  std::uint64_t h = 0xcbf29ce484222325ULL;
  for (char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return mix(h);
}

/// One row of a data set.
struct Row {
  std::string label;
  /// The text, or the first of a pair.
  std::string text;
  /// The second text of a pair; empty where the data set has single texts.
  std::string text_b;
  /// Its line in the file, counted from 1.
  std::size_t line = 0;
};

/// The rows of one file.
struct Dataset {
  std::filesystem::path path;
  /// Whether every row has two texts.
  bool pairs = false;
  std::vector<Row> rows;
};

namespace internal {

/// Throws what is wrong with a file: the first line says it, at most twenty problems follow.
inline void throw_problems(const std::filesystem::path& path, const std::vector<std::string>& problems) {
  constexpr std::size_t most_shown = 20;
  if (problems.empty()) return;
  if (problems.size() == 1) throw std::runtime_error(fmt::format("{}:{}", path.string(), problems[0]));
  std::string message = fmt::format("{}: {} lines are wrong", path.string(), problems.size());
  for (std::size_t i = 0; i < std::min(problems.size(), most_shown); ++i) {
    message += fmt::format("\n  {}:{}", path.string(), problems[i]);
  }
  if (problems.size() > most_shown) message += fmt::format("\n  and {} more", problems.size() - most_shown);
  throw std::runtime_error(message);
}

inline std::vector<std::string_view> split(std::string_view line, char separator) {
  std::vector<std::string_view> columns;
  for (std::size_t start = 0;;) {
    const std::size_t end = line.find(separator, start);
    columns.push_back(line.substr(start, end - start));
    if (end == std::string_view::npos) return columns;
    start = end + 1;
  }
}

inline bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\v\f\r\n") == std::string_view::npos;
}

/// What is wrong with a row; empty if nothing is.
inline std::string problem_of(std::string_view line, const std::vector<std::string_view>& columns,
                              std::size_t expected) {
  if (const auto at = invalid_utf8_at(line)) {
    return fmt::format("must be valid UTF-8, but the byte at offset {} of the line (0x{:02X}) is not", *at,
                       static_cast<unsigned char>(line[*at]));
  }
  if (columns.size() == 1) return "must have a label, a tab and a text, but has no tab";
  if (columns.size() != expected) {
    return fmt::format("must have {} columns as the header has, but has {}", expected, columns.size());
  }
  if (is_blank(columns[0])) return "must have a label, but it is empty";
  for (std::size_t i = 1; i < columns.size(); ++i) {
    if (is_blank(columns[i])) return "must have a text, but it is empty";
  }
  return "";
}

}  // namespace internal

/// Reads a file with the header line `label<TAB>text` or `label<TAB>text_a<TAB>text_b` and a row a line.
/// Nothing is quoted: a `"` is a character. A byte-order mark and CRLF line ends are tolerated.
/// Throws: std::runtime_error naming the file and every line that has no tab, too few or too many columns,
/// an empty label or text or invalid UTF-8; or that the header or all rows are missing.
inline Dataset read_tsv(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::runtime_error(fmt::format("{}: cannot be opened for reading", path.string()));
  }
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) throw std::runtime_error(fmt::format("{}: cannot be read", path.string()));
  std::string_view rest = bytes;
  constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";
  if (rest.starts_with(byte_order_mark)) rest.remove_prefix(byte_order_mark.size());

  Dataset data{path, false, {}};
  std::vector<std::string> problems;
  for (std::size_t number = 1; !rest.empty() || number == 1; ++number) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (number == 1) {
      data.pairs = line == "label\ttext_a\ttext_b";
      if (data.pairs || line == "label\ttext") continue;
      throw std::runtime_error(
          fmt::format("{}:1: must be the header 'label<TAB>text' or "
                      "'label<TAB>text_a<TAB>text_b', but the file has no such line",
                      path.string()));
    }
    const auto columns = internal::split(line, '\t');
    if (std::string what = internal::problem_of(line, columns, data.pairs ? 3 : 2); !what.empty()) {
      problems.push_back(fmt::format("{}: {}", number, what));
      continue;
    }
    data.rows.push_back({std::string(columns[0]), std::string(columns[1]),
                         data.pairs ? std::string(columns[2]) : std::string(), number});
  }
  internal::throw_problems(path, problems);
  if (data.rows.empty())
    throw std::runtime_error(path.string() + ": must have rows, but has only the header");
  return data;
}

/// The classes of a task: the distinct labels of its training data in the order of their bytes.
class Labels {
 public:
  /// Collects the labels of the training data.
  /// Throws: std::runtime_error naming the file where there is only one.
  explicit Labels(const Dataset& training) {
    for (const Row& row : training.rows) names_.push_back(row.label);
    std::sort(names_.begin(), names_.end());
    names_.erase(std::unique(names_.begin(), names_.end()), names_.end());
    if (names_.size() < 2) {
      throw std::runtime_error(
          fmt::format("{}: must have two classes at least, but every row has the label '{}'",
                      training.path.string(), names_.empty() ? "" : names_[0]));
    }
  }

  /// Labels as they were stored with a model, in their order there.
  explicit Labels(std::vector<std::string> names) : names_(std::move(names)) {}

  /// The labels; a class is an index into them.
  const std::vector<std::string>& names() const { return names_; }

  /// Number of classes.
  std::int64_t size() const { return static_cast<std::int64_t>(names_.size()); }

  /// The class of every row.
  /// Throws: std::runtime_error naming file, line and label where a label is none of these.
  std::vector<std::int64_t> classes(const Dataset& data) const {
    std::vector<std::int64_t> result;
    std::vector<std::string> problems;
    result.reserve(data.rows.size());
    for (const Row& row : data.rows) {
      const auto found = std::find(names_.begin(), names_.end(), row.label);
      if (found == names_.end()) {
        problems.push_back(fmt::format("{}: label must be one of the training data ({}), but got '{}'",
                                       row.line, fmt::join(names_, ", "), row.label));
      }
      result.push_back(found - names_.begin());
    }
    internal::throw_problems(data.path, problems);
    return result;
  }

 private:
  std::vector<std::string> names_;
};

/// The hash of a row's text, for `epoch_order`; of a pair's two texts with a tab between them.
inline std::uint64_t row_hash(const Row& row, bool pairs) {
  return h64(pairs ? row.text + '\t' + row.text_b : row.text);
}

/// The order in which an epoch (counted from 0) takes the rows with these hashes. It depends on nothing but
/// the texts, the seed and the epoch, so any program can repeat it.
inline std::vector<std::size_t> epoch_order(const std::vector<std::uint64_t>& hashes, std::uint64_t seed,
                                            std::uint64_t epoch) {
  const std::uint64_t key = mix(1000 * seed + epoch + 1);
  std::vector<std::size_t> order(hashes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return mix(hashes[a] ^ key) < mix(hashes[b] ^ key); });
  return order;
}

}  // namespace text
