// RunData: the options of a run, and the data that they name.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batches.h"
#include "run_folder.h"
#include "task.h"

namespace finetune {

/// The arguments of a run.
struct TrainOptions {
  fs::path model, inputs, out, init_adapter, log;
  std::vector<fs::path> train, test;  ///< several: one a task
  std::string method;
  std::vector<std::string> targets;
  int64_t epochs = 0, steps = 0;  ///< one of them, or neither
  int64_t batch_size = 32, accumulate = 1, checkpoint_every = 100;
  std::optional<int64_t> max_length;      ///< without one 128, or the model's positions where these are fewer
  int64_t train_rows = 0, test_rows = 0;  ///< the first so many of each file; 0 for all
  double rate = 1e-3;
  std::optional<double> head_rate;
  std::string optimizer = "adamw", schedule = "linear";
  double warmup = 0;  ///< steps; below 1 a part of all
  double weight_decay = 0.01, clip = 1.0, dropout = 0;
  double eps = 1e-8;  ///< of AdamW
  Pooling pooling = Pooling::cls;
  bool pooling_given = false;  ///< else that of `init_adapter`, if it says
  uint64_t seed = 0;
  std::string device = "cpu", dtype;
  bool gradient_checkpointing = false;
  bool shuffle = true, resume = false, overwrite = false;
  std::vector<std::string> known_labels;  ///< of `init_adapter`, in the order of its head
  Arguments arguments;                    ///< as given, for `--resume`
  std::string command;                    ///< for the hint how to go on
  bool quiet = false;                     ///< no line at the end
};

namespace internal {

/// The labels in the order of their classes: that of the adapter to go on from where it has just these, or of
/// the base's config where the base has a head for them, else sorted.
inline std::vector<std::string> class_names(const text::Labels& labels, const TrainOptions& options) {
  auto names = labels.names();
  const auto fit = [&](const std::vector<std::string>& known) {
    return known.size() == names.size() && std::is_permutation(known.begin(), known.end(), names.begin());
  };
  if (fit(options.known_labels)) return options.known_labels;
  if (options.pooling != Pooling::cls || !has_classifier(options.model)) return names;
  const auto known = peft::models::BertConfig::read(options.model / "config.json").labels();
  return fit(known) ? known : names;
}

/// `most`: 0 for all.
inline void keep_first(text::Dataset& data, int64_t most) {
  if (most > 0 && data.rows.size() > static_cast<size_t>(most)) data.rows.resize(static_cast<size_t>(most));
}

inline text::Dataset read_rows(const fs::path& path, int64_t most) {
  auto data = text::read_tsv(path);
  keep_first(data, most);
  return data;
}

inline void require_texts(const char* option, const text::Dataset& data, bool pairs) {
  if (data.pairs == pairs) return;
  throw std::runtime_error(fmt::format("{}: '{}' must have {} a row as --train has, but has {}", option,
                                       data.path.string(), pairs ? "two texts" : "one text",
                                       pairs ? "one" : "two"));
}

}  // namespace internal

/// What a run works on.
struct RunData {
  std::vector<std::string> labels;
  int64_t max_length = 0;
  std::unique_ptr<Batches> train, test;

  int64_t steps_per_epoch(const TrainOptions& options) const {
    return (train->count() + options.accumulate - 1) / options.accumulate;
  }
  /// Steps of the whole run.
  int64_t steps(const TrainOptions& options) const {
    constexpr int64_t default_epochs = 3;
    const auto epochs = options.epochs > 0 ? options.epochs : options.inputs.empty() ? default_epochs : 1;
    return options.steps > 0 ? options.steps : epochs * steps_per_epoch(options);
  }
};

inline RunData read_data(const TrainOptions& options) {
  RunData data;
  constexpr int64_t evaluation_batch = 64;
  std::optional<peft::models::BertConfig> config;
  bool pairs = false;
  const auto test_batches = [&]() -> std::unique_ptr<Batches> {
    if (options.test.empty()) return nullptr;
    const auto files = std::max<size_t>(1, options.train.size());
    if (options.test.size() != files) {
      throw std::runtime_error(fmt::format(
          "--test must be given once a file of --train, {} in all, but got {}", files, options.test.size()));
    }
    if (files == 1 && options.test[0].extension() == ".safetensors") {
      auto batches = std::make_unique<FileBatches>(options.test[0], /*needs_labels=*/true);
      batches->check(*config, static_cast<int64_t>(data.labels.size()));
      return batches;
    }
    std::vector<text::Dataset> rows;
    for (const auto& path : options.test) {
      rows.push_back(internal::read_rows(path, options.test_rows));
      if (options.inputs.empty()) internal::require_texts("--test", rows.back(), pairs);
    }
    return std::make_unique<TextBatches>(text_batches(read_tokenizer(options.model, *config), rows,
                                                      text::Labels(data.labels), data.max_length,
                                                      {evaluation_batch, false, 0, /*by_length=*/true}));
  };
  const auto read_config = [&] {
    constexpr int64_t usual_length = 128;
    config = peft::models::BertConfig::read(options.model / "config.json");
    const auto positions = config->max_position_embeddings();
    data.max_length = options.max_length.value_or(std::min(usual_length, positions));
    if (options.inputs.empty() && data.max_length > positions) {
      throw std::runtime_error(fmt::format(
          "--max-length must be at most {}, the model's positions, but got {}", positions, data.max_length));
    }
  };
  if (!options.inputs.empty()) {
    auto batches = std::make_unique<FileBatches>(options.inputs, /*needs_labels=*/true);
    read_config();
    const auto json = peft::internal::read_json_object(options.model / "config.json");
    data.labels = config->labels();
    const bool says = json.contains("id2label") || json.contains("num_labels");
    for (auto i = config->num_labels(); !says && i < batches->classes(); ++i)
      data.labels.push_back(fmt::format("LABEL_{}", i));
    batches->check(*config, static_cast<int64_t>(data.labels.size()));
    batches->check_labels_count(options.accumulate);
    // Batches have numbers only.
    if (options.known_labels.size() == data.labels.size()) data.labels = options.known_labels;
    data.train = std::move(batches);
    data.test = test_batches();
    return data;
  }
  // Rows first: a mistake in them is found at once.
  std::vector<text::Dataset> rows;
  for (const auto& path : options.train) rows.push_back(text::read_tsv(path));
  const text::Labels labels(rows[0]);
  pairs = rows[0].pairs;
  for (const auto& other : rows) {
    internal::require_texts("--train", other, pairs);
    const text::Labels own(other);
    if (own.names() == labels.names()) continue;
    throw std::runtime_error(fmt::format("--train: '{}' must have the labels of '{}' ({}), but has {}",
                                         other.path.string(), rows[0].path.string(),
                                         fmt::join(labels.names(), ", "), fmt::join(own.names(), ", ")));
  }
  read_config();
  data.labels = internal::class_names(labels, options);
  for (auto& one : rows) internal::keep_first(one, options.train_rows);
  data.train = std::make_unique<TextBatches>(
      text_batches(read_tokenizer(options.model, *config), rows, text::Labels(data.labels), data.max_length,
                   {options.batch_size, options.shuffle, options.seed, /*by_length=*/false}));
  data.test = test_batches();
  return data;
}

}  // namespace finetune
