// GlueData: the splits of one task, ready for a model.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "finetune/batches.h"
#include "metrics.h"
#include "tasks.h"
#include "text/tokenizer.h"
#include "tsv.h"

namespace glue {

namespace fs = std::filesystem;

/// How much of a split is used: its first rows; 0 for all.
struct RowLimits {
  std::int64_t train = 0, dev = 0;
};

/// The rows of one task.
struct GlueSplits {
  std::vector<GlueRow> train;
  std::vector<std::vector<GlueRow>> devs;  ///< in the order of `GlueTask::devs`
};

/// Reads the splits of a task from GLUE's folder. Nothing where a file is absent, which `say` is told.
/// Throws: std::runtime_error for files that are wrong, and for data on which a metric is undefined.
inline std::optional<GlueSplits> read_splits(const fs::path& folder, const GlueTask& task,
                                             const RowLimits& limits,
                                             const std::function<void(const std::string&)>& say) {
  const auto directory = folder / task.name;
  std::vector<std::string> files{"train.tsv"};
  for (const auto& dev : task.devs) files.push_back(dev.file);
  std::vector<std::string> absent;
  for (const auto& file : files) {
    std::error_code ignored;
    if (!fs::is_regular_file(directory / file, ignored)) absent.push_back(file);
  }
  if (!absent.empty()) {
    say(fmt::format("{}: skipped, since '{}' has no {}", task.name, directory.string(),
                    fmt::join(absent, ", ")));
    return std::nullopt;
  }
  const auto first = [](std::vector<GlueRow> rows, std::int64_t most) {
    if (most > 0 && rows.size() > static_cast<std::size_t>(most)) rows.resize(static_cast<std::size_t>(most));
    return rows;
  };
  GlueSplits splits;
  splits.train = first(read_rows(directory / files[0], task, task.train, say), limits.train);
  for (const auto& dev : task.devs) {
    const auto path = directory / dev.file;
    splits.devs.push_back(first(read_rows(path, task, task.dev, say), limits.dev));
    std::vector<double> right;
    for (const auto& row : splits.devs.back())
      right.push_back(task.is_regression() ? row.score : static_cast<double>(row.label));
    check_defined(path.string(), task, right);
  }
  return splits;
}

/// Rows as ids with their labels, and what an epoch's order is drawn from.
struct EncodedRows {
  std::vector<finetune::Example> examples;
  std::vector<std::uint64_t> hashes;
};

inline EncodedRows encode(const text::Tokenizer& tokenizer, const GlueTask& task,
                          const std::vector<GlueRow>& rows, std::int64_t max_length) {
  const bool pairs = task.train.texts.size() > 1;
  EncodedRows result;
  for (const auto& row : rows) {
    finetune::Example example{
        pairs ? tokenizer.encode(row.text, row.text_b, max_length) : tokenizer.encode(row.text, max_length),
        row.label};
    if (task.is_regression()) example.score = static_cast<float>(row.score);
    result.examples.push_back(std::move(example));
    result.hashes.push_back(text::h64(pairs ? row.text + '\t' + row.text_b : row.text));
  }
  return result;
}

/// The numbers of the rows, the shortest first.
inline std::vector<std::size_t> order_by_length(const EncodedRows& rows) {
  std::vector<std::size_t> order(rows.examples.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return rows.examples[a].encoding.ids.size() < rows.examples[b].encoding.ids.size();
  });
  return order;
}

/// The same rows, the shortest first: what is evaluated on needs no order, and less padding so.
inline EncodedRows by_length(EncodedRows rows) {
  EncodedRows sorted;
  for (const auto i : order_by_length(rows)) {
    sorted.examples.push_back(std::move(rows.examples[i]));
    sorted.hashes.push_back(rows.hashes[i]);
  }
  return sorted;
}

/// Everything a cell is trained and evaluated on.
struct GlueData {
  static constexpr std::int64_t evaluation_batch = 64;

  const GlueTask* task = nullptr;
  std::int64_t pad_id = 0;
  EncodedRows train;
  std::vector<EncodedRows> devs;

  std::int64_t labels() const {
    return task->is_regression() ? 1 : static_cast<std::int64_t>(task->labels.size());
  }
  finetune::TextBatches train_batches(std::int64_t batch_size, std::uint64_t seed) const {
    constexpr std::int64_t group = 16;
    return {train.examples,
            train.hashes,
            pad_id,
            {batch_size, /*shuffle=*/true, seed, /*by_length=*/false, group}};
  }
  finetune::TextBatches dev_batches(std::size_t index) const {
    return {devs[index].examples, devs[index].hashes, pad_id, {evaluation_batch, /*shuffle=*/false, 0}};
  }
};

inline GlueData encode_splits(const text::Tokenizer& tokenizer, const GlueTask& task,
                              const GlueSplits& splits, std::int64_t max_length) {
  GlueData data;
  data.task = &task;
  data.pad_id = tokenizer.pad_id();
  data.train = encode(tokenizer, task, splits.train, max_length);
  for (const auto& rows : splits.devs)
    data.devs.push_back(by_length(encode(tokenizer, task, rows, max_length)));
  return data;
}

/// What lies in a model's folder: its weights, settings and tokenizer.
inline std::string hash_of_folder(const fs::path& folder) {
  std::vector<fs::path> paths;
  for (const auto& item : fs::directory_iterator(folder)) {
    const auto kind = item.path().extension();
    const bool counts = kind == ".safetensors" || kind == ".json" || kind == ".txt" || kind == ".model";
    if (counts && item.is_regular_file()) paths.push_back(item.path());
  }
  std::sort(paths.begin(), paths.end());
  std::uint64_t sum = 0;
  std::string part(std::size_t{1} << 20, '\0');
  for (const auto& path : paths) {
    sum = text::mix(sum ^ text::h64(path.filename().string()));
    std::ifstream file(path, std::ios::binary);
    while (file) {
      file.read(part.data(), static_cast<std::streamsize>(part.size()));
      sum =
          text::mix(sum ^ text::h64(std::string_view(part.data(), static_cast<std::size_t>(file.gcount()))));
    }
    if (!file.eof()) throw std::runtime_error(fmt::format("{} cannot be read", path.string()));
  }
  return fmt::format("{:016x}", sum);
}

/// A number that is another when the rows are.
inline std::string hash_of(const GlueSplits& splits) {
  std::uint64_t sum = 0;
  const auto add = [&](const std::vector<GlueRow>& rows) {
    sum = text::mix(sum + rows.size());
    for (const auto& row : rows) {
      sum = text::mix(sum ^ text::h64(row.text) ^ text::mix(text::h64(row.text_b)));
      sum = text::mix(sum ^ text::h64(fmt::format("{} {}", row.label, row.score)));
    }
  };
  add(splits.train);
  for (const auto& rows : splits.devs) add(rows);
  return fmt::format("{:016x}", sum);
}

}  // namespace glue
