// train_cell: one method trained on one task with one seed.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cell.h"
#include "data.h"
#include "finetune/lora_start.h"
#include "finetune/selective_start.h"
#include "finetune/train.h"
#include "model.h"
#include "peft/io/staged_directory.h"

namespace glue {

/// How many steps a recipe takes on some rows.
inline std::int64_t steps_per_epoch(const Recipe& recipe, std::size_t rows) {
  const auto count = static_cast<std::int64_t>(rows);
  return (count + recipe.batch_size - 1) / recipe.batch_size;
}

/// The scores of what a model gave for the rows of each file to evaluate on. Shapes: logits (rows, labels).
/// Throws: finetune::Diverged where not all are numbers.
inline Evaluated score(const GlueData& data, std::int64_t step, const std::vector<Tensor>& logits) {
  Evaluated result{step, {}};
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!logits[i].isfinite().all().item<bool>()) {
      throw finetune::Diverged(
          fmt::format("not all logits are numbers after step {} (hint: a smaller lr)", step));
    }
    const bool regression = data.task->is_regression();
    const auto values = (regression ? logits[i].reshape({-1}) : logits[i].argmax(-1)).to(torch::kDouble);
    Predictions rows;
    rows.predicted.assign(values.data_ptr<double>(), values.data_ptr<double>() + values.numel());
    for (const auto& example : data.devs[i].examples)
      rows.right.push_back(regression ? *example.score : static_cast<double>(example.label));
    for (const auto metric : data.task->metrics) {
      const auto& file = data.task->devs[i].name;
      result.scores.push_back(
          {file.empty() ? to_string(metric) : fmt::format("{} {}", file, to_string(metric)),
           evaluate(metric, rows)});
    }
  }
  return result;
}

/// A model with a method on it, as a cell begins: the same for the same settings, whoever trains it.
class StartedModel {
 public:
  StartedModel(const fs::path& folder, const CellSettings& settings, const GlueData& data)
      : batches(data.train_batches(settings.recipe.batch_size, settings.seed)),
        total(settings.recipe.epochs * batches.count()),
        model((torch::manual_seed(settings.seed), folder), settings.recipe, data.labels()),
        method(model.read(settings.recipe.method, total)) {
    model.attach(method);
    if (finetune::starts_from_data(method)) finetune::start_from_data(method, model, batches);
    if (finetune::chooses_entries(method)) finetune::choose_entries(method, model, batches);
  }

  finetune::TextBatches batches;
  std::int64_t total;  ///< steps
  GlueModel model;
  finetune::Method method;

  const peft::Adapter& trained() const { return *model.adapter(); }
  /// Nothing but the head.
  bool head_only() const { return method.name == "head"; }
};

namespace internal {

inline finetune::TrainOptions options_of(const Recipe& recipe) {
  finetune::TrainOptions options;
  options.rate = recipe.rate;
  options.schedule = recipe.schedule;
  options.warmup = recipe.warmup;
  options.weight_decay = recipe.weight_decay;
  options.clip = recipe.clip;
  options.optimizer = recipe.optimizer;
  options.eps = recipe.eps;
  return options;
}

/// The weights that train, of the task head and beside it.
inline void count_weights(const GlueModel& model, CellResult& result) {
  result.head_weights = 0;
  for (const auto& [name, tensor] : model.adapter()->named_parameters()) {
    if (model.is_head(name)) result.head_weights += tensor.numel();
  }
  result.other_weights = model.adapter()->count() - result.head_weights;
}

}  // namespace internal

/// Trains a cell and leaves the adapter of its best evaluation in `best`, if that is given.
/// Throws: finetune::Diverged where the loss is no number; what the method or the model throws.
class CellTraining {
 public:
  CellTraining(const fs::path& model, const CellSettings& settings, const GlueData& data, fs::path best)
      : settings_(settings), data_(data), best_(std::move(best)), start_(model, settings, data) {
    for (std::size_t i = 0; i < data.devs.size(); ++i) devs_.push_back(data.dev_batches(i));
  }

  CellResult operator()() {
    const auto rate = start_.method.rate.value_or(settings_.recipe.rate);
    auto options = internal::options_of(settings_.recipe);
    options.head_rate = rate;
    optimizer_ = finetune::internal::make_optimizer(start_.trained(), options, rate, start_.method.lora_plus);
    schedule_ = finetune::internal::make_schedule(*optimizer_, options, start_.total);
    auto began = Clock::now();
    if (start_.head_only() && settings_.recipe.dropout == 0.0) {
      start_.model.train(false);
      train_features_.emplace(start_.model, data_.train, data_.pad_id);
      for (const auto& rows : data_.devs) dev_features_.emplace_back(start_.model, rows, data_.pad_id);
    }
    start_.model.train(true);
    const auto epoch = start_.batches.count();
    const auto every = settings_.eval_every > 0 ? settings_.eval_every : epoch;
    std::vector<std::size_t> order;
    for (std::int64_t done = 0; done < start_.total;) {
      if (done % epoch == 0) order = start_.batches.order(done / epoch);
      step(start_.batches.get(done / epoch, done % epoch), order, done);
      ++done;
      if (done % every != 0 && done != start_.total) continue;
      result_.seconds += std::chrono::duration<double>(Clock::now() - began).count();
      evaluate_now(done);
      began = Clock::now();
    }
    internal::count_weights(start_.model, result_);
    result_.steps = start_.total;
    result_.peak_bytes = finetune::internal::peak_memory();
    return result_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  /// `order`: the rows of the epoch; `done`: steps before this one.
  void step(const finetune::Batch& batch, const std::vector<std::size_t>& order, std::int64_t done) {
    optimizer_->zero_grad();
    Tensor logits;
    if (train_features_) {
      const auto begin = done % start_.batches.count() * settings_.recipe.batch_size;
      std::vector<std::int64_t> rows;
      for (std::int64_t i = 0; i < batch.labels.size(0); ++i)
        rows.push_back(static_cast<std::int64_t>(order[static_cast<std::size_t>(begin + i)]));
      logits = start_.model.logits(train_features_->rows(rows));
    } else {
      logits = start_.model.logits(batch.inputs);
    }
    const auto loss = start_.model.loss(logits, batch.labels);
    result_.last_loss = loss.item<double>();
    if (done == 0) result_.first_loss = result_.last_loss;
    if (!std::isfinite(result_.last_loss)) {
      throw finetune::Diverged(fmt::format("{}: the loss is no number at step {} (hint: a smaller lr)",
                                           settings_.name(), done + 1));
    }
    loss.backward();
    optimizer_->step();
    schedule_->step();
  }

  void evaluate_now(std::int64_t step) {
    const torch::NoGradGuard no_grad;
    start_.model.train(false);
    std::vector<Tensor> logits;
    for (std::size_t dev = 0; dev < devs_.size(); ++dev) {
      std::vector<Tensor> parts;
      std::int64_t row = 0;
      for (std::int64_t i = 0; i < devs_[dev].count(); ++i) {
        const auto batch = devs_[dev].get(0, i);
        if (dev_features_.empty()) {
          parts.push_back(start_.model.logits(batch.inputs));
          continue;
        }
        std::vector<std::int64_t> rows(static_cast<std::size_t>(batch.labels.size(0)));
        std::iota(rows.begin(), rows.end(), std::exchange(row, row + batch.labels.size(0)));
        parts.push_back(start_.model.logits(dev_features_[dev].rows(rows)));
      }
      logits.push_back(torch::cat(parts));
    }
    start_.model.train(true);
    result_.curve.push_back(score(data_, step, logits));
    if (!best_.empty() && &result_.best() == &result_.curve.back()) save_best(step);
  }

  void save_best(std::int64_t step) const {
    fs::create_directories(best_.parent_path());
    peft::StagedDirectory staged(best_, /*overwrite=*/true);
    auto labels = data_.task->labels;
    if (labels.empty()) labels = {"score"};
    auto json = finetune::Settings{labels, finetune::Pooling::cls, settings_.recipe.max_length}.to_json();
    json["step"] = step;
    json["arguments"] = settings_.to_json();
    start_.model.save(staged.path(), json);
    staged.commit();
  }

  const CellSettings& settings_;
  const GlueData& data_;
  fs::path best_;
  StartedModel start_;
  std::vector<finetune::TextBatches> devs_;
  std::optional<FeatureTable> train_features_;  ///< of a head that trains alone
  std::vector<FeatureTable> dev_features_;
  std::unique_ptr<peft::AdapterOptimizer> optimizer_;
  std::unique_ptr<peft::Schedule> schedule_;
  CellResult result_;
};

}  // namespace glue
