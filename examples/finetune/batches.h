// Batches: what a model is trained and tried on, from labelled texts or from a file of ready tensors.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/safetensors.h"
#include "peft/models/bert.h"
#include "task.h"
#include "text/dataset.h"
#include "text/tokenizer.h"

namespace finetune {

/// Inputs, labels where there are any, the head's features where they were computed before, and the rows'
/// tasks where there are several.
struct Batch {
  peft::models::EncoderInputs inputs;
  Tensor labels;
  Tensor features;
  Tensor tasks = {};
};

/// Shapes: (rows, labels).
inline Tensor logits(Task& task, const Batch& batch) {
  if (batch.features.defined()) return task.logits(batch.features);
  std::optional<peft::TaskIds> tasks;
  if (batch.tasks.defined()) tasks.emplace(batch.tasks);
  return task.logits(batch.inputs);
}

/// A text as ids, with its class and its task (−1 without one), or with a score in place of a class.
struct Example {
  text::Encoding encoding;
  int64_t label = -1;
  int64_t task = -1;
  std::optional<float> score = std::nullopt;
};

namespace internal {

/// The classes of some examples, or their scores; undefined where one has neither.
inline Tensor labels_of(const std::vector<const Example*>& rows) {
  const auto every = [&](const auto& has) { return std::all_of(rows.begin(), rows.end(), has); };
  std::vector<int64_t> classes;
  std::vector<float> scores;
  if (every([](const Example* row) { return row->score.has_value(); })) {
    for (const auto* row : rows) scores.push_back(*row->score);
    return torch::tensor(scores);
  }
  if (!every([](const Example* row) { return row->label >= 0; })) return {};
  for (const auto* row : rows) classes.push_back(row->label);
  return torch::tensor(classes, torch::kLong);
}

/// Examples as tensors, filled up to the longest.
inline Batch pad(const std::vector<const Example*>& rows, int64_t pad_id) {
  size_t longest = 0;
  bool types = false, tasks = true;
  for (const auto* row : rows) {
    longest = std::max(longest, row->encoding.ids.size());
    types = types || std::any_of(row->encoding.type_ids.begin(), row->encoding.type_ids.end(),
                                 [](int64_t type) { return type != 0; });
    tasks = tasks && row->task >= 0;
  }
  const std::vector<int64_t> shape{static_cast<int64_t>(rows.size()), static_cast<int64_t>(longest)};
  Batch batch;
  batch.inputs.input_ids = torch::full(shape, pad_id, torch::kLong);
  batch.inputs.attention_mask = torch::zeros(shape, torch::kLong);
  if (types) batch.inputs.token_type_ids = torch::zeros(shape, torch::kLong);
  batch.labels = labels_of(rows);
  if (tasks) batch.tasks = torch::empty({shape[0]}, torch::kLong);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& encoding = rows[i]->encoding;
    const auto at = i * longest;
    std::copy(encoding.ids.begin(), encoding.ids.end(), batch.inputs.input_ids.data_ptr<int64_t>() + at);
    std::fill_n(batch.inputs.attention_mask.data_ptr<int64_t>() + at, encoding.ids.size(), 1);
    if (types) {
      std::copy(encoding.type_ids.begin(), encoding.type_ids.end(),
                batch.inputs.token_type_ids.data_ptr<int64_t>() + at);
    }
    if (tasks) batch.tasks.data_ptr<int64_t>()[i] = rows[i]->task;
  }
  return batch;
}

inline Batch to(Batch batch, torch::Device device) {
  if (device.is_cpu()) return batch;
  for (auto* tensor :
       {&batch.inputs.input_ids, &batch.inputs.inputs_embeds, &batch.inputs.attention_mask,
        &batch.inputs.token_type_ids, &batch.inputs.position_ids, &batch.labels, &batch.tasks}) {
    if (tensor->defined()) *tensor = tensor->to(device);
  }
  return batch;
}

}  // namespace internal

/// Batches in an order that depends on nothing but the epoch.
class Batches {
 public:
  virtual ~Batches() = default;
  /// Batches in an epoch.
  virtual int64_t count() const = 0;
  virtual int64_t rows() const = 0;
  virtual Batch get(int64_t epoch, int64_t index) = 0;
  /// A number that is another when the data is.
  virtual uint64_t hash() const = 0;
  /// Computes the head's features of every row once; `get` then gives those and no inputs.
  virtual void cache_features(Task& task) = 0;
};

/// Labelled texts.
class TextBatches final : public Batches {
 public:
  /// How an epoch is ordered and cut.
  struct Options {
    int64_t batch_size = 32;
    bool shuffle = true;
    uint64_t seed = 0;
    bool by_length = false;  ///< shortest first, in place of an order of the epoch: for evaluation
    /// From 2 on, of every so many batches of a shuffled epoch the rows are shared out among them by length,
    /// for less padding, and then all batches come in an order of the epoch.
    int64_t group = 0;
  };

  TextBatches(std::vector<Example> examples, std::vector<uint64_t> hashes, int64_t pad_id, Options options)
      : examples_(std::move(examples)), hashes_(std::move(hashes)), pad_id_(pad_id), options_(options) {}

  int64_t count() const override { return (rows() + options_.batch_size - 1) / options_.batch_size; }
  int64_t rows() const override { return static_cast<int64_t>(examples_.size()); }

  Batch get(int64_t epoch, int64_t index) override {
    if (epoch != epoch_) order_ = order(epoch);
    epoch_ = epoch;
    const auto begin = static_cast<size_t>(index * options_.batch_size);
    const auto end = std::min(order_.size(), begin + static_cast<size_t>(options_.batch_size));
    if (features_.defined()) {
      std::vector<int64_t> rows(order_.begin() + static_cast<std::ptrdiff_t>(begin),
                                order_.begin() + static_cast<std::ptrdiff_t>(end));
      const auto chosen = torch::tensor(rows, torch::kLong);
      Batch batch;
      batch.features = features_.index_select(0, chosen.to(features_.device()));
      batch.labels = labels_.index_select(0, chosen.to(labels_.device()));
      return batch;
    }
    std::vector<const Example*> rows;
    for (size_t i = begin; i < end; ++i) rows.push_back(&examples_[order_[i]]);
    return internal::pad(rows, pad_id_);
  }

  uint64_t hash() const override {
    uint64_t sum = examples_.size();
    for (size_t i = 0; i < examples_.size(); ++i) {
      const auto label =
          examples_[i].score ? std::bit_cast<uint32_t>(*examples_[i].score) : examples_[i].label;
      sum = text::mix(sum ^ hashes_[i]) + static_cast<uint64_t>(label) +
            (static_cast<uint64_t>(examples_[i].task + 1) << 32);
    }
    return sum;
  }

  void cache_features(Task& task) override {
    const auto order = by_length();
    constexpr size_t at_once = 64;
    const torch::NoGradGuard no_grad;
    std::vector<const Example*> labelled;
    for (const auto& example : examples_) labelled.push_back(&example);
    Tensor all;
    for (size_t begin = 0; begin < order.size(); begin += at_once) {
      std::vector<const Example*> rows;
      std::vector<int64_t> where;
      for (size_t i = begin; i < std::min(order.size(), begin + at_once); ++i) {
        rows.push_back(&examples_[order[i]]);
        where.push_back(static_cast<int64_t>(order[i]));
      }
      const auto batch = internal::to(internal::pad(rows, pad_id_), task.device());
      const auto features = task.features(task.encode(batch.inputs), batch.inputs);
      if (!all.defined()) all = torch::empty({this->rows(), features.size(1)}, features.options());
      all.index_copy_(0, torch::tensor(where, torch::kLong).to(features.device()), features);
    }
    features_ = all;
    labels_ = internal::labels_of(labelled).to(task.device());
  }

  /// The rows of an epoch in the order in which its batches are cut from them.
  std::vector<size_t> order(int64_t epoch) const {
    if (options_.by_length) return by_length();
    if (options_.shuffle) {
      auto order = text::epoch_order(hashes_, options_.seed, static_cast<uint64_t>(epoch));
      return options_.group > 1 ? grouped(std::move(order), static_cast<uint64_t>(epoch)) : order;
    }
    std::vector<size_t> order(examples_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    return order;
  }

 private:
  std::vector<size_t> by_length() const {
    std::vector<size_t> order(examples_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return examples_[a].encoding.ids.size() < examples_[b].encoding.ids.size();
    });
    return order;
  }

  std::vector<size_t> grouped(std::vector<size_t> order, uint64_t epoch) const {
    const auto size = static_cast<size_t>(options_.batch_size);
    const auto full = order.size() / size;  // a last batch of fewer rows stays the last
    const auto at = [&](size_t batch) { return order.begin() + static_cast<std::ptrdiff_t>(batch * size); };
    for (size_t begin = 0; begin < full; begin += static_cast<size_t>(options_.group)) {
      const auto end = std::min(full, begin + static_cast<size_t>(options_.group));
      std::stable_sort(at(begin), at(end), [&](size_t a, size_t b) {
        return examples_[a].encoding.ids.size() < examples_[b].encoding.ids.size();
      });
    }
    std::vector<uint64_t> batches(full);
    std::iota(batches.begin(), batches.end(), uint64_t{0});
    for (auto& batch : batches) batch = text::mix(batch);
    std::vector<size_t> result;
    for (const auto batch : text::epoch_order(batches, options_.seed, epoch))
      result.insert(result.end(), at(batch), at(batch + 1));
    result.insert(result.end(), at(full), order.end());
    return result;
  }

  std::vector<Example> examples_;
  std::vector<uint64_t> hashes_;
  int64_t pad_id_;
  Options options_;
  int64_t epoch_ = -1;
  std::vector<size_t> order_;
  Tensor features_, labels_;
};

/// Ready batches from a safetensors file: `b0.input_ids`, `b0.attention_mask`, `b0.labels` …, `b1.…` and so
/// on, or names without a number for a single one.
class FileBatches final : public Batches {
 public:
  /// Throws: std::runtime_error naming the file and every tensor that is not expected or missing.
  explicit FileBatches(const fs::path& path, bool needs_labels) : path_(path) {
    const peft::SafetensorsFile file(path);
    peft::internal::Problems problems;
    std::map<int64_t, std::map<std::string, Tensor>> found;
    for (const auto& name : file.names()) {
      const auto [number, field] = cut(name);
      if (std::find(fields().begin(), fields().end(), field) == fields().end()) {
        problems.add(fmt::format("'{}' is not expected; nearest: {}", name,
                                 peft::internal::closest(field, fields(), 1)));
        continue;
      }
      auto tensor = file.tensor(name);
      if (field != "labels" && field != "inputs_embeds") {
        if (torch::isFloatingType(tensor.scalar_type())) {
          problems.add(fmt::format("'{}' must hold integers, but holds {}", name,
                                   c10::toString(tensor.scalar_type())));
        } else {
          tensor = tensor.to(torch::kLong);
        }
      }
      if (number < 0) bare_ = true;
      if (!found[std::max<int64_t>(number, 0)].emplace(field, tensor).second) {
        problems.add(fmt::format("'{}' and '{}' are the same", name, field));
      }
    }
    for (const auto& [number, tensors] : found) {
      const auto prefix = bare_ ? std::string() : fmt::format("b{}.", number);
      if (number != static_cast<int64_t>(batches_.size())) {
        problems.add(
            fmt::format("batch b{} is missing: the batches must be numbered from 0", batches_.size()));
        break;
      }
      const auto get = [&tensors = tensors](const char* field) {
        const auto at = tensors.find(field);
        return at == tensors.end() ? Tensor() : at->second;
      };
      Batch batch;
      batch.inputs.input_ids = get("input_ids");
      batch.inputs.inputs_embeds = get("inputs_embeds");
      batch.inputs.attention_mask = get("attention_mask");
      batch.inputs.token_type_ids = get("token_type_ids");
      batch.inputs.position_ids = get("position_ids");
      batch.labels = get("labels");
      if (!batch.inputs.input_ids.defined() && !batch.inputs.inputs_embeds.defined()) {
        problems.add(fmt::format("'{}input_ids' is missing", prefix));
      }
      if (needs_labels && !batch.labels.defined()) problems.add(fmt::format("'{}labels' is missing", prefix));
      const auto& tokens =
          batch.inputs.input_ids.defined() ? batch.inputs.input_ids : batch.inputs.inputs_embeds;
      if (tokens.defined()) rows_ += tokens.dim() > 0 ? tokens.size(0) : 0;
      batches_.push_back(std::move(batch));
    }
    if (found.empty() && problems.empty()) problems.add("it has no tensors");
    problems.raise(fmt::format("'{}' cannot be used as --inputs", path.string()));
  }

  int64_t count() const override { return static_cast<int64_t>(batches_.size()); }
  int64_t rows() const override { return rows_; }
  Batch get(int64_t, int64_t index) override { return batches_.at(static_cast<size_t>(index)); }
  /// What stands before a batch's names, in the file and in what is written of it.
  std::string prefix(int64_t index) const { return bare_ ? "" : fmt::format("b{}.", index); }

  /// The number of classes the labels ask for at least; 0 where they are no classes.
  int64_t classes() const {
    int64_t most = 0;
    for (const auto& batch : batches_) {
      if (!batch.labels.defined() || batch.labels.numel() == 0) continue;
      if (torch::isFloatingType(batch.labels.scalar_type())) return 0;
      most = std::max(most, batch.labels.max().item<int64_t>() + 1);
    }
    return most;
  }
  /// Whether a model can take the batches, found out before any of them is computed. `classes`: of its head,
  /// 0 without one. Throws: c10::ValueError naming the file and every tensor that does not fit.
  void check(const peft::models::BertConfig& config, int64_t classes) const {
    peft::internal::Problems problems;
    for (size_t i = 0; i < batches_.size(); ++i) {
      const auto& inputs = batches_[i].inputs;
      const auto& labels = batches_[i].labels;
      const auto name = [&](const char* field) {
        return fmt::format("'{}{}'", prefix(static_cast<int64_t>(i)), field);
      };
      const auto complain = [&](const char* field, const std::string& must, const Tensor& tensor) {
        problems.add(fmt::format("{} must be {}, but got {}", name(field), must,
                                 peft::internal::shape_text(tensor.sizes())));
      };
      const bool embedded = inputs.inputs_embeds.defined();
      if (embedded && inputs.input_ids.defined()) {
        problems.add(fmt::format("{} and {} exclude each other", name("input_ids"), name("inputs_embeds")));
        continue;
      }
      const auto& tokens = embedded ? inputs.inputs_embeds : inputs.input_ids;
      const bool fits =
          embedded ? tokens.dim() == 3 && tokens.size(2) == config.hidden_size() : tokens.dim() == 2;
      if (!fits || tokens.size(1) == 0) {
        complain(embedded ? "inputs_embeds" : "input_ids",
                 embedded ? fmt::format("(rows, tokens, {})", config.hidden_size()) : "(rows, tokens)",
                 tokens);
        continue;
      }
      const auto rows = tokens.size(0), time = tokens.size(1);
      const auto check_ids = [&](const char* field, const Tensor& ids, int64_t end, bool one_row) {
        if (!ids.defined()) return;
        if (ids.dim() != 2 || ids.size(1) != time ||
            (ids.size(0) != rows && !(one_row && ids.size(0) == 1))) {
          return complain(field, peft::internal::shape_text(std::vector<int64_t>{rows, time}), ids);
        }
        const auto wrong = end > 0 ? ids.masked_select(ids.lt(0).logical_or(ids.ge(end))) : Tensor();
        if (!wrong.defined() || wrong.numel() == 0) return;
        problems.add(fmt::format("{} must be from 0 to {}, but holds {}", name(field), end - 1,
                                 wrong[0].item<int64_t>()));
      };
      check_ids("input_ids", inputs.input_ids, config.vocab_size(), false);
      check_ids("attention_mask", inputs.attention_mask, 0, false);
      check_ids("token_type_ids", inputs.token_type_ids, config.type_vocab_size(), true);
      check_ids("position_ids", inputs.position_ids, config.max_position_embeddings(), true);
      if (!inputs.position_ids.defined() && time > config.max_position_embeddings()) {
        problems.add(fmt::format("{} must have at most {} tokens a row, but has {}",
                                 name(embedded ? "inputs_embeds" : "input_ids"),
                                 config.max_position_embeddings(), time));
      }
      if (!labels.defined() || classes == 0) continue;
      if (labels.dim() == 0 || labels.size(0) != rows) {
        complain("labels", fmt::format("one a row, {} of them", rows), labels);
        continue;
      }
      if (torch::isFloatingType(labels.scalar_type()) || labels.dim() > 1 || classes < 2) continue;
      const auto wrong =
          labels.masked_select(labels.ne(-100).logical_and(labels.lt(0).logical_or(labels.ge(classes))));
      if (wrong.numel() == 0) continue;
      problems.add(fmt::format("{} must be classes from 0 to {}, or -100, but one is {}", name("labels"),
                               classes - 1, wrong[0].item<int64_t>()));
    }
    problems.raise(fmt::format("'{}' cannot be used as --inputs", path_.string()));
  }

  /// Throws: c10::ValueError naming the labels of a step, of `accumulate` batches, of which none counts.
  void check_labels_count(int64_t accumulate) const {
    peft::internal::Problems problems;
    const auto counts = [](const Batch& batch) { return batch.labels.ne(-100).any().item<bool>(); };
    for (int64_t first = 0; first < count(); first += accumulate) {
      const auto begin = batches_.begin() + first,
                 end = batches_.begin() + std::min(first + accumulate, count());
      if (std::any_of(begin, end, counts)) continue;
      problems.add(
          fmt::format("'{}labels' must have one that counts in each step, but all are -100", prefix(first)));
    }
    problems.raise(fmt::format("'{}' cannot be used as --inputs", path_.string()));
  }

  uint64_t hash() const override {
    uint64_t sum = batches_.size();
    for (const auto& batch : batches_) {
      for (const auto* tensor :
           {&batch.inputs.input_ids, &batch.inputs.inputs_embeds, &batch.inputs.attention_mask,
            &batch.inputs.token_type_ids, &batch.inputs.position_ids, &batch.labels}) {
        if (!tensor->defined()) continue;
        const auto bytes = tensor->contiguous();
        sum = text::mix(sum) ^ text::h64({static_cast<const char*>(bytes.data_ptr()), bytes.nbytes()});
      }
    }
    return sum;
  }

  void cache_features(Task& task) override {
    const torch::NoGradGuard no_grad;
    for (auto& batch : batches_) {
      const auto moved = internal::to(batch, task.device());
      batch.features = task.features(task.encode(moved.inputs), moved.inputs);
    }
  }

 private:
  static const std::vector<std::string>& fields() {
    static const std::vector<std::string> names{"input_ids",      "inputs_embeds", "attention_mask",
                                                "token_type_ids", "position_ids",  "labels"};
    return names;
  }
  /// "b3.labels" → (3, "labels"); "labels" → (−1, "labels").
  static std::pair<int64_t, std::string> cut(const std::string& name) {
    const auto dot = name.find('.');
    if (dot == std::string::npos || dot < 2 || dot > 10 || name[0] != 'b' ||
        !std::all_of(name.begin() + 1, name.begin() + static_cast<std::ptrdiff_t>(dot),
                     [](char c) { return c >= '0' && c <= '9'; })) {
      return {-1, name};
    }
    return {std::stoll(name.substr(1, dot - 1)), name.substr(dot + 1)};
  }

  fs::path path_;
  std::vector<Batch> batches_;
  int64_t rows_ = 0;
  bool bare_ = false;
};

/// The tokenizer of a model's folder: its tokenizer.json, or the vocabulary it has in an older form.
/// Throws: std::runtime_error naming the file.
inline text::Tokenizer read_tokenizer(const fs::path& model) {
  std::error_code ignored;
  if (!fs::is_directory(model, ignored)) {
    throw std::runtime_error(fmt::format("--model: there is no folder '{}'", model.string()));
  }
  return text::Tokenizer::from_folder(model);
}

/// The same, of a model with so many tokens.
/// Throws: std::runtime_error naming the file where the model has no vectors for its tokens.
inline text::Tokenizer read_tokenizer(const fs::path& model, int64_t vocabulary) {
  auto tokenizer = read_tokenizer(model);
  if (tokenizer.vocabulary_size() > vocabulary) {
    throw std::runtime_error(fmt::format(
        "the tokenizer in '{}' has {} tokens, but the model only {} (hint: that of another model?)",
        model.string(), tokenizer.vocabulary_size(), vocabulary));
  }
  return tokenizer;
}
inline text::Tokenizer read_tokenizer(const fs::path& model, const peft::models::BertConfig& config) {
  return read_tokenizer(model, config.vocab_size());
}

/// The texts of a data set as ids.
inline std::vector<Example> encode(const text::Tokenizer& tokenizer, const text::Dataset& data,
                                   int64_t max_length) {
  std::vector<Example> examples;
  examples.reserve(data.rows.size());
  for (const auto& row : data.rows) {
    examples.push_back({data.pairs ? tokenizer.encode(row.text, row.text_b, max_length)
                                   : tokenizer.encode(row.text, max_length),
                        -1});
  }
  return examples;
}

/// Labelled data sets, ready for a model: each a task, where there are several.
inline TextBatches text_batches(const text::Tokenizer& tokenizer, const std::vector<text::Dataset>& tasks,
                                const text::Labels& labels, int64_t max_length,
                                TextBatches::Options options) {
  std::vector<Example> examples;
  std::vector<uint64_t> hashes;
  for (size_t task = 0; task < tasks.size(); ++task) {
    const auto& data = tasks[task];
    const auto classes = labels.classes(data);
    auto own = encode(tokenizer, data, max_length);
    for (size_t i = 0; i < own.size(); ++i) {
      own[i].label = classes[i];
      if (tasks.size() > 1) own[i].task = static_cast<int64_t>(task);
      examples.push_back(std::move(own[i]));
      hashes.push_back(text::row_hash(data.rows[i], data.pairs));
    }
  }
  return {std::move(examples), std::move(hashes), tokenizer.pad_id(), options};
}

}  // namespace finetune
