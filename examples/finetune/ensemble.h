// Prompt ensembles: several prompts trained on one frozen model, and their vote in one forward.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batches.h"
#include "peft/io/staged_directory.h"
#include "peft/model/prompt_ensemble.h"
#include "run_folder.h"
#include "task.h"
#include "terminal_table.h"
#include "train.h"

namespace finetune {

/// The prompts of several folders on one model, each with its own head.
/// Throws: std::runtime_error naming the folder that has no prompt, another length, other labels or another
/// model's shapes.
class PromptVote {
 public:
  PromptVote(const BaseOptions& base, std::vector<fs::path> folders)
      : folders_(std::move(folders)),
        settings_(common_settings(folders_)),
        task_(Task::for_prediction(base, folders_.front(), settings_)) {
    std::vector<std::string> names{Task::adapter_name};
    for (size_t i = 1; i < folders_.size(); ++i) {
      names.push_back(fmt::format("#{}", i + 1));
      peft::set_active(*task_.model(), {});
      peft::load_adapter(*task_.model(), folders_[i], names.back(), /*trainable=*/false,
                         [](const std::string&) {});
    }
    try {
      ensemble_.emplace(*task_.model(), names);
    } catch (const c10::Error& error) {
      std::string text = error.what_without_backtrace();
      for (size_t i = 0; i < names.size(); ++i) {
        const auto name = "'" + names[i] + "'", folder = "'" + folders_[i].string() + "'";
        for (size_t at = 0; (at = text.find(name, at)) != std::string::npos; at += folder.size())
          text.replace(at, name.size(), folder);
      }
      throw std::runtime_error(text);
    }
    if (!task_.has_head()) {
      throw std::runtime_error(
          fmt::format("'{}' has no task head, so nothing to vote on", folders_[0].string()));
    }
    for (size_t i = 0; task_.has_pooled_head() && i < folders_.size(); ++i) {
      heads_.push_back(std::make_shared<internal::PooledHead>(task_.config().hidden_size(), task_.labels()));
      heads_.back()->read(folders_[i] / Task::head_file);
      heads_.back()->to(base.device);
    }
  }

  const Task& task() const { return task_; }
  const std::optional<Settings>& settings() const { return settings_; }
  const std::vector<fs::path>& folders() const { return folders_; }

  /// Of all prompts, in one forward. Shapes: (prompts, rows, labels).
  Tensor logits(const peft::models::EncoderInputs& inputs) {
    const auto rows = (inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds).size(0);
    auto all = inputs;
    for (auto* tensor :
         {&all.input_ids, &all.inputs_embeds, &all.attention_mask, &all.token_type_ids, &all.position_ids}) {
      *tensor = peft::internal::repeated(*tensor, ensemble_->members(), rows);
    }
    if (heads_.empty()) {
      return ensemble_->forward(rows, [&] {
        const peft::ForwardScope scope;
        return task_.logits(task_.features(task_.encode(all), all));
      });
    }
    const auto features = ensemble_->forward(rows, [&] { return task_.features(task_.encode(all), all); });
    std::vector<Tensor> logits;
    for (size_t i = 0; i < heads_.size(); ++i) {
      logits.push_back(heads_[i]->head->forward(features[static_cast<int64_t>(i)].to(torch::kFloat32)));
    }
    return torch::stack(logits);
  }

 private:
  /// What the folders say of their labels and head, which must be one thing.
  static std::optional<Settings> common_settings(const std::vector<fs::path>& folders) {
    const auto text = [](const fs::path& folder) {
      std::error_code ignored;
      if (!fs::is_directory(folder, ignored))
        throw std::runtime_error(fmt::format("--adapter: there is no folder '{}'", folder.string()));
      const auto settings = Settings::read(folder);
      return settings ? fmt::format("{}; pooling {}", fmt::join(settings->labels, ", "),
                                    to_string(settings->pooling))
                      : std::string("unknown");
    };
    const auto first = text(folders.front());
    for (auto folder = folders.begin(); folder != folders.end(); ++folder) {
      const auto own = text(*folder);
      const auto same = [&](const fs::path& other) { return fs::equivalent(*folder, other); };
      if (std::any_of(folders.begin(), folder, same))
        throw std::runtime_error(fmt::format("--adapter: '{}' is given twice", folder->string()));
      if (own == first) continue;
      throw std::runtime_error(fmt::format("--adapter: '{}' must have the labels of '{}' ({}), but has ({})",
                                           folder->string(), folders.front().string(), first, own));
    }
    return Settings::read(folders.front());
  }

  std::vector<fs::path> folders_;
  std::optional<Settings> settings_;
  Task task_;
  std::optional<peft::PromptEnsemble> ensemble_;
  std::vector<std::shared_ptr<internal::PooledHead>> heads_;  ///< one a prompt; none inside the model
};

/// How often each prompt and their vote were right.
class VoteCount {
 public:
  explicit VoteCount(const std::vector<fs::path>& folders) : folders_(folders), right_(folders.size()) {}

  /// `labels`: (rows), −100 for a row that does not count; `logits`: (prompts, rows, labels).
  void add(const Tensor& logits, const Tensor& labels) {
    const auto counts = labels.ne(-100);
    rows_ += counts.sum().item<int64_t>();
    const auto right = [&](const Tensor& classes) {
      return classes.eq(labels).logical_and(counts).sum().item<int64_t>();
    };
    vote_ += right(peft::majority(logits));
    for (size_t i = 0; i < right_.size(); ++i) right_[i] += right(logits[static_cast<int64_t>(i)].argmax(-1));
  }

  /// Each prompt, then the columns of Lester et al. (arXiv 2104.08691), table 3.
  std::string table() const {
    const auto percent = [&](double right) {
      return fmt::format("{:.2f} %", 100 * right / static_cast<double>(std::max<int64_t>(1, rows_)));
    };
    std::vector<std::vector<std::string>> cells{{"prompt", "accuracy"}};
    for (size_t i = 0; i < right_.size(); ++i)
      cells.push_back({folders_[i].string(), percent(static_cast<double>(right_[i]))});
    const auto sum = static_cast<double>(std::accumulate(right_.begin(), right_.end(), int64_t{0}));
    cells.push_back({"average", percent(sum / static_cast<double>(right_.size()))});
    cells.push_back({"best", percent(static_cast<double>(*std::max_element(right_.begin(), right_.end())))});
    cells.push_back({"ensemble", percent(static_cast<double>(vote_))});
    return aligned(cells);
  }

 private:
  std::vector<fs::path> folders_;
  std::vector<int64_t> right_;
  int64_t vote_ = 0, rows_ = 0;
};

namespace internal {

/// Refuses what cannot be an ensemble's run before anything is read.
inline void check_ensemble(const TrainOptions& options, const std::vector<fs::path>& folders) {
  static const std::set<std::string> methods{"prompt_tuning", "p_tuning", "multitask_prompt"};
  const auto method = read_method(options, options.method);
  if (!methods.count(method.name)) {
    throw std::runtime_error(fmt::format("--ensemble: --method must be one of {}, but got {}",
                                         fmt::join(methods, ", "), method.name));
  }
  if (options.train.size() > 1)
    throw std::runtime_error("--ensemble: its prompts are of one task, but --train has several files");
  check_log(options.log, options.out);
  for (const auto& folder : folders) peft::StagedDirectory::recover(folder);
  std::error_code error;
  for (fs::directory_iterator entry(options.out, error), end; !error && entry != end;
       entry.increment(error)) {
    if (std::find(folders.begin(), folders.end(), entry->path()) != folders.end()) continue;
    throw std::runtime_error(
        fmt::format("--out: '{}' is no prompt of this ensemble; nothing is written", entry->path().string()));
  }
  for (const auto& folder : folders) RunFolder(folder, options.overwrite, options.resume);
}

}  // namespace internal

/// Trains prompts that differ in their seed alone, `seed`, `seed + 1`, …, each in its own folder of
/// `options.out`, and shows how often each and their vote are right.
inline void train_ensemble(const TrainOptions& options, int64_t prompts) {
  std::vector<fs::path> folders;
  for (int64_t i = 1; i <= prompts; ++i) folders.push_back(options.out / std::to_string(i));
  try {
    internal::check_ensemble(options, folders);
    for (size_t i = 0; i < folders.size(); ++i) {
      auto one = options;
      one.out = folders[i];
      one.seed += i;
      if (!one.log.empty()) one.log += fmt::format(".{}", i + 1);
      fmt::print(stderr, "prompt {} of {}\n", i + 1, prompts);
      Run run(one);
      run();
    }
  } catch (...) {
    std::error_code ignored;
    fs::remove(options.out, ignored);  // which only an empty folder allows
    throw;
  }
  if (options.test.empty()) return;
  const BaseOptions base{options.model, internal::parse_dtype(options.dtype), std::nullopt,
                         internal::parse_device(options.device)};
  PromptVote vote(base, folders);
  auto again = options;
  if (vote.settings()) again.known_labels = vote.settings()->labels;
  const auto data = read_data(again);
  VoteCount count(folders);
  const torch::NoGradGuard no_grad;
  for (int64_t i = 0; i < data.test->count(); ++i) {
    const auto batch = internal::to(data.test->get(0, i), base.device);
    count.add(vote.logits(batch.inputs), batch.labels);
  }
  fmt::print("{}", count.table());
}

}  // namespace finetune
