// train: one run, from the arguments to the adapter on disk.
#pragma once

#include <fmt/format.h>
#include <sys/resource.h>
#include <torch/utils.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lora_start.h"
#include "method.h"
#include "peft/methods/adalora.h"
#include "peft/methods/increlora.h"
#include "peft/model/summary.h"
#include "peft/train/adafactor.h"
#include "peft/train/checkpoint.h"
#include "peft/train/lora_plus.h"
#include "peft/train/optimizer.h"
#include "peft/train/schedule.h"
#include "progress.h"
#include "rank_picture.h"
#include "result_row.h"
#include "run_data.h"
#include "run_folder.h"
#include "selective_start.h"
#include "task.h"
#include "terminal_table.h"

namespace finetune {

/// Accuracy and mean loss on data the model was not trained on.
struct Evaluation {
  double accuracy = 0, loss = 0;
  int64_t correct = 0, rows = 0;
  std::vector<double> tasks;  ///< the accuracy of each task, where there are several
};

inline Evaluation evaluate(Task& task, Batches& data) {
  const torch::NoGradGuard no_grad;
  task.train(false);
  Evaluation result;
  double loss = 0;
  std::map<int64_t, std::pair<int64_t, int64_t>> tasks;  // right and all
  for (int64_t i = 0; i < data.count(); ++i) {
    const auto batch = internal::to(data.get(0, i), task.device());
    const auto logits = finetune::logits(task, batch);
    const auto counted = batch.labels.ne(-100);
    const auto rows = counted.sum().item<int64_t>();
    if (rows == 0) continue;
    const auto right = logits.argmax(-1).eq(batch.labels).logical_and(counted);
    result.correct += right.sum().item<int64_t>();
    result.rows += rows;
    for (int64_t row = 0; batch.tasks.defined() && row < right.size(0); ++row) {
      auto& [own_right, own_rows] = tasks[batch.tasks[row].item<int64_t>()];
      own_right += right[row].item<bool>();
      ++own_rows;
    }
    loss += task.loss(logits, batch.labels).item<double>() * static_cast<double>(rows);
  }
  task.train(true);
  const auto rows = static_cast<double>(std::max<int64_t>(1, result.rows));
  result.accuracy = static_cast<double>(result.correct) / rows;
  result.loss = loss / rows;
  for (const auto& [id, counts] : tasks) {
    result.tasks.push_back(static_cast<double>(counts.first) / static_cast<double>(counts.second));
  }
  return result;
}

namespace internal {

inline std::optional<torch::ScalarType> parse_dtype(const std::string& name) {
  if (name.empty()) return std::nullopt;
  const auto type = peft::internal::dtype_of_name(name);
  if (!type)
    throw std::runtime_error(
        fmt::format("--dtype must be float32, float16, bfloat16 or float64, but got '{}'", name));
  return type;
}

inline torch::Device parse_device(const std::string& name) {
  try {
    const torch::Device device(name);
    if (device.is_cuda() && !torch::cuda::is_available()) {
      throw std::runtime_error(fmt::format("--device {}: this LibTorch sees no GPU", name));
    }
    return device;
  } catch (const c10::Error&) {
    throw std::runtime_error(fmt::format("--device must be cpu, cuda or cuda:N, but got '{}'", name));
  }
}

/// The most memory this process has held.
inline int64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

inline int64_t bytes_of_weights(const fs::path& folder) {
  int64_t bytes = 0;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().extension() == ".safetensors") bytes += static_cast<int64_t>(entry->file_size());
  }
  return bytes;
}

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// The matrices whose ranks a method changes while it trains, and their ranks now.
inline std::vector<std::pair<std::string, int64_t>> changing_ranks(const peft::Adapter& adapter) {
  std::vector<std::pair<std::string, int64_t>> ranks;
  for (const auto& entry : adapter.entries()) {
    if (const auto* piece = dynamic_cast<const peft::AdaLoraImpl*>(entry.piece.get())) {
      // By the last masking: between two the optimizer moves masked values away from 0.
      const auto left = std::count(piece->kept.begin(), piece->kept.end(), true);
      ranks.emplace_back(entry.site->path(),
                         piece->kept.empty() ? static_cast<int64_t>(piece->rows.size()) : left);
    } else if (const auto* growing = dynamic_cast<const peft::IncreLoraImpl*>(entry.piece.get())) {
      ranks.emplace_back(entry.site->path(), growing->rank());
    }
  }
  return ranks;
}

/// `lr=` of a `--method` given beside `--init-adapter`, whose config says all else.
inline std::optional<double> rate_beside_adapter(const std::string& method, const fs::path& folder) {
  if (method.empty()) return std::nullopt;
  const auto parsed = parse_method(method, {}, "");
  for (const auto& [key, value] : split_method(method).second) {
    if (key == "lr") continue;
    throw std::runtime_error(fmt::format(
        "--method {}: {} is what the config in '{}' says; beside --init-adapter only lr= may be given",
        parsed.name, key, folder.string()));
  }
  return parsed.rate;
}

/// `lora_plus`: the rate of B over that of A, if they are to differ. The groups: the head's, the adapter's,
/// and what else LoRA+ parts it in.
inline std::unique_ptr<peft::AdapterOptimizer> make_optimizer(const peft::Adapter& trained,
                                                              const TrainOptions& options, double rate,
                                                              std::optional<double> lora_plus) {
  const auto with = [&](double lr) {
    return torch::optim::AdamWOptions(lr).weight_decay(options.weight_decay).eps(options.eps);
  };
  std::vector<peft::ParameterGroup> groups;
  const auto named = trained.named_parameters();
  if (std::any_of(named.begin(), named.end(), [](const auto& item) { return Task::is_head(item.first); })) {
    groups.push_back({&Task::is_head, with(options.head_rate.value_or(options.rate))});
  }
  if (lora_plus) {
    for (auto& group : peft::lora_plus(trained, with(rate), *lora_plus)) {
      const auto belongs = [&](const auto& item) {
        return !Task::is_head(item.first) && group.matches(item.first);
      };
      if (std::any_of(named.begin(), named.end(), belongs)) groups.push_back(std::move(group));
    }
  }
  if (options.optimizer == "adafactor") {
    // As transformers' Trainer sets it: with the schedule's rate, and no other scale.
    const auto adafactor = [](const torch::optim::AdamWOptions& given) {
      return peft::AdafactorOptions(given.lr()).scale_parameter(false).weight_decay(given.weight_decay());
    };
    std::vector<peft::AdafactorGroup> own;
    for (const auto& group : groups) own.push_back({group.matches, adafactor(group.options)});
    return std::make_unique<peft::Adafactor>(trained, own, adafactor(with(rate)), options.clip);
  }
  auto adamw = std::make_unique<peft::AdamW>(trained, groups, with(rate), options.clip);
  if (options.optimizer == "adamw_hf") {
    // As transformers' Trainer had it: what it calls biases and norms does not decay.
    adamw->form(peft::AdamWForm::transformers).no_decay([](const std::string& name) {
      return name.find("bias") != std::string::npos || name.find("LayerNorm") != std::string::npos;
    });
  }
  return adamw;
}

/// Steps of warm-up of a run of `total`.
inline int64_t warmup_steps(const TrainOptions& options, int64_t total) {
  return static_cast<int64_t>(options.warmup < 1
                                  ? std::floor(options.warmup * static_cast<double>(total) + 1e-9)
                                  : std::floor(options.warmup));
}

inline std::unique_ptr<peft::Schedule> make_schedule(peft::AdapterOptimizer& optimizer,
                                                     const TrainOptions& options, int64_t total) {
  const auto warmup = warmup_steps(options, total);
  if (options.schedule == "linear") return std::make_unique<peft::LinearSchedule>(optimizer, warmup, total);
  if (options.schedule == "cosine") return std::make_unique<peft::CosineSchedule>(optimizer, warmup, total);
  return std::make_unique<peft::ConstantSchedule>(optimizer, warmup);
}

}  // namespace internal

/// A method for a run with these options. `steps`: of the run, 0 as long as they are not known.
inline Method read_method(const TrainOptions& options, const std::string& text, int64_t steps = 0) {
  const auto tasks = std::max<int64_t>(1, static_cast<int64_t>(options.train.size()));
  auto method =
      parse_method(text, options.targets, options.pooling == Pooling::cls ? "classifier" : "", steps, tasks);
  if (tasks > 1 && method.name != "multitask_prompt") {
    throw std::runtime_error(
        fmt::format("--train: several files are several tasks, which only "
                    "--method multitask_prompt has, but got {}",
                    method.name));
  }
  return method;
}

/// Trains and leaves the adapter in `options.out`. Messages go to stderr.
/// Throws: Interrupted after Ctrl-C, a checkpoint being written; Diverged where the loss is no number; else
/// what is wrong with arguments, data, model or disk, and then nothing is left at `out` that was not there.
class Run {
 public:
  explicit Run(TrainOptions options)
      : options_(std::move(options)), folder_(options_.out, options_.overwrite, options_.resume) {
    check_log(options_.log, options_.out);
  }

  ResultRow operator()() {
    try {
      if (folder_.state() == RunFolder::State::finished) return report_finished();
      prepare();
      loop();
      return finish();
    } catch (const Interrupted&) {
      throw;
    } catch (const Diverged&) {
      folder_.abandon(/*keep_best=*/true);
      throw;
    } catch (...) {
      folder_.abandon(/*keep_best=*/false);
      throw;
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  void say(const std::string& line) {
    if (progress_) {
      progress_->line(line);
    } else {
      fmt::print(stderr, "{}\n", line);
    }
  }

  ResultRow report_finished() {
    const auto json = peft::internal::read_json_object(folder_.path() / Settings::file_name);
    if (json.contains("arguments"))
      require_same_arguments(options_.arguments, json["arguments"], folder_.path());
    say(fmt::format("the run in '{}' is finished: nothing to do", folder_.path().string()));
    return {};
  }

  void prepare() {
    std::string position;
    if (folder_.state() == RunFolder::State::checkpoint) {
      position = peft::checkpoint_position(folder_.checkpoint_file());
      position_ = nlohmann::ordered_json::parse(position);
      require_same_arguments(options_.arguments, position_.at("arguments"), folder_.path());
    } else if (options_.resume) {
      say(fmt::format("no checkpoint in '{}' yet: starting from the beginning", folder_.path().string()));
    }
    if (!options_.init_adapter.empty()) {
      init_rate_ = internal::rate_beside_adapter(options_.method, options_.init_adapter);
      go_on_as_trained();
    } else {
      method_ = read_method(options_, options_.method);
      check_targets();
    }
    const BaseOptions base{options_.model, internal::parse_dtype(options_.dtype), options_.dropout,
                           internal::parse_device(options_.device)};
    data_ = read_data(options_);
    steps_per_epoch_ = data_.steps_per_epoch(options_);
    total_ = data_.steps(options_);
    if (method_) method_ = read_method(options_, options_.method, total_);
    torch::manual_seed(options_.seed);
    task_ = std::make_unique<Task>(
        Task::for_training(base, options_.pooling, static_cast<int64_t>(data_.labels.size())));
    task_->gradient_checkpointing(options_.gradient_checkpointing);
    if (options_.init_adapter.empty()) {
      task_->attach(*method_);
      if (starts_from_data(*method_)) {
        say("the start of the adapter is computed from the data");
        start_from_data(*method_, *task_, *data_.train);
      }
      if (chooses_entries(*method_)) {
        say("what the adapter trains is chosen");
        choose_entries(*method_, *task_, *data_.train);
      }
    } else {
      task_->attach(options_.init_adapter);
      compare_labels();
    }
    for (const auto& note : task_->notes()) say("note: " + note);
    check_sizes();
    trained_ = std::make_unique<peft::Adapter>(task_->trained());
    rate_ = method_ && method_->rate ? *method_->rate : init_rate_.value_or(options_.rate);
    if (head_only() && method_->rate) options_.head_rate = rate_;

    optimizer_ =
        internal::make_optimizer(*trained_, options_, rate_, method_ ? method_->lora_plus : std::nullopt);
    schedule_ = internal::make_schedule(*optimizer_, options_, total_);
    const auto named = trained_->named_parameters();
    const bool head =
        std::any_of(named.begin(), named.end(), [](const auto& item) { return Task::is_head(item.first); });
    adapter_group_ = head && schedule_->last().size() > 1 ? 1 : 0;
    begin_ranks();
    data_hash_ = fmt::format("{:016x}", data_.train->hash());

    if (!position_.is_null()) {
      if (position_.at("data") != data_hash_) {
        throw std::runtime_error(
            fmt::format("--resume: the training data is not what it was when the run in '{}' began",
                        folder_.path().string()));
      }
      peft::load_checkpoint(folder_.checkpoint_file(), *trained_, *optimizer_, *schedule_);
      done_ = position_.at("step").get<int64_t>();
      best_accuracy_ = position_.at("best_accuracy").get<double>();
      best_step_ = position_.at("best_step").get<int64_t>();
      if (position_.contains("ranks")) row_.ranks = RankHistory::from_json(position_.at("ranks"));
    }
    if (!options_.log.empty()) log_ = std::make_unique<StepLog>(options_.log, done_);
    describe();
  }

  /// Takes over what the folder of `--init-adapter` says of its run, and refuses what contradicts it.
  void go_on_as_trained() {
    const auto folder = options_.init_adapter.string();
    if (!options_.targets.empty()) {
      throw std::runtime_error(fmt::format(
          "--targets: the config in '{}' says the targets (hint: leave --targets out beside --init-adapter)",
          folder));
    }
    const auto settings = Settings::read(options_.init_adapter);
    if (!settings) return;
    if (options_.pooling_given && options_.pooling != settings->pooling) {
      throw std::runtime_error(fmt::format("--pooling {}: the adapter in '{}' was trained with {}",
                                           to_string(options_.pooling), folder,
                                           to_string(settings->pooling)));
    }
    options_.pooling = settings->pooling;
    options_.known_labels = settings->labels;
  }

  /// `--targets` for a method without any: an error, or a note where several methods share the option.
  void check_targets() {
    const auto& keys = internal::method_entry(method_->name).keys;
    if (options_.targets.empty() || std::find(keys.begin(), keys.end(), "targets") != keys.end()) return;
    if (!options_.quiet)
      throw std::runtime_error(fmt::format("--targets: {} has no targets to choose", method_->name));
    say(fmt::format("note: {} has no targets to choose; --targets is of the other methods", method_->name));
  }

  /// A head of the right size for other labels is taken as it is.
  void compare_labels() {
    const auto& known = options_.known_labels;
    if (known.empty() || known == data_.labels) return;
    say(fmt::format("note: the head in '{}' was trained for the labels {}; it goes on with {}",
                    options_.init_adapter.string(), fmt::join(known, ", "), fmt::join(data_.labels, ", ")));
  }

  /// The ranks before training, and what their schedule says of this run.
  void begin_ranks() {
    const auto ranks = internal::changing_ranks(*trained_);
    if (ranks.empty()) return;
    std::vector<std::string> paths;
    for (const auto& [path, rank] : ranks) paths.push_back(path);
    row_.ranks = RankHistory(std::move(paths));
    record_ranks();
    const auto pieces = trained_->layers<peft::AdaLoraImpl>();
    const auto last = pieces.empty() ? 0 : pieces[0]->options.total_step() - pieces[0]->options.tfinal() + 1;
    if (last > total_) {
      say(fmt::format("note: AdaLoRA's ranks come down to their target in step {}, but the run has {}", last,
                      total_));
    }
  }
  void record_ranks() {
    if (row_.ranks.empty()) return;
    std::vector<int64_t> ranks;
    for (const auto& [path, rank] : internal::changing_ranks(*trained_)) ranks.push_back(rank);
    row_.ranks.record(done_, ranks);
  }

  bool head_only() const { return method_ && method_->head_only(); }

  void check_sizes() const {
    if (data_.test && task_->labels() < 2) {
      throw std::runtime_error("--test: accuracy needs two classes, but the model has one output");
    }
  }

  void describe() {
    const auto summary = peft::summary(*task_->model());
    row_.method = method_ ? method_->text : "adapter " + options_.init_adapter.string();
    base_weights_ = summary.total;
    count_trainable();
    say(fmt::format("{}: {} of {} weights train ({:.3f} %), {} rows, {} steps{}", row_.method,
                    peft::internal::count_text(row_.trainable), peft::internal::count_text(base_weights_),
                    row_.percent, peft::internal::count_text(data_.train->rows()), total_,
                    done_ > 0 ? fmt::format(", going on after step {}", done_) : ""));
  }

  void count_trainable() {
    row_.trainable = trained_->count();
    row_.percent = 100.0 * static_cast<double>(row_.trainable) /
                   static_cast<double>(std::max<int64_t>(1, base_weights_));
  }

  void loop() {
    const SignalGuard signals;
    progress_ = std::make_unique<Progress>(total_, isatty(STDERR_FILENO) == 1);
    task_->train(true);
    auto start = Clock::now();
    if (head_only() && options_.dropout == 0) {
      say("the head trains alone: computing its features once");
      task_->train(false);
      data_.train->cache_features(*task_);
      row_.train_seconds += seconds_since(start);
      if (data_.test) data_.test->cache_features(*task_);
      task_->train(true);
      if (SignalGuard::seen() != 0) stop();
    }
    while (done_ < total_) {
      start = Clock::now();
      const auto rate = schedule_->last()[adapter_group_];
      const auto penalty = log_ ? penalty_now() : std::nullopt;
      const auto loss = step();
      const auto seconds = seconds_since(start);
      times_.push_back(seconds);
      row_.train_seconds += seconds;
      row_.loss.push_back({done_, loss});
      record_ranks();
      if (log_) log_->step(done_, loss, penalty, rate);
      progress_->step(done_, loss, rate);
      if (data_.test && (done_ % steps_per_epoch_ == 0 || done_ == total_)) evaluate_now();
      const bool signalled = SignalGuard::seen() != 0;
      const bool due = options_.checkpoint_every > 0 && done_ % options_.checkpoint_every == 0;
      if (done_ < total_ && signalled) stop();
      if (done_ < total_ && due) checkpoint();
    }
    progress_->finish();
  }

  /// After Ctrl-C: a checkpoint, and how to go on from it.
  [[noreturn]] void stop() {
    const auto signal = SignalGuard::seen();
    progress_->finish();
    if (options_.command.empty())
      throw Interrupted(signal, fmt::format("stopped after step {} of {}", done_, total_));
    checkpoint();
    throw Interrupted(signal, fmt::format("stopped after step {} of {}; to go on:\n  {} --resume", done_,
                                          total_, options_.command));
  }

  /// What the method adds to the loss, if it is one that does.
  std::optional<double> penalty_now() const {
    const auto& controllers = trained_->shared_record()->controllers;
    if (controllers.empty()) return std::nullopt;
    return trained_->penalty().item<double>();
  }

  /// One step of the optimizer; returns the task's loss before it.
  double step() {
    const auto epoch = done_ / steps_per_epoch_;
    const auto first = done_ % steps_per_epoch_ * options_.accumulate;
    const auto last = std::min(first + options_.accumulate, data_.train->count());
    std::vector<Batch> batches;
    std::vector<double> rows;
    double all_rows = 0;
    for (auto i = first; i < last; ++i) {
      batches.push_back(internal::to(data_.train->get(epoch, i), task_->device()));
      const auto& labels = batches.back().labels;
      const auto counted = last - first > 1 ? labels.ne(-100).sum().item<double>() : 1.0;
      rows.push_back(counted);
      all_rows += counted;
    }
    optimizer_->zero_grad();
    double sum = 0;
    for (size_t i = 0; i < batches.size(); ++i) {
      if (rows[i] == 0) continue;
      const auto& batch = batches[i];
      auto loss = task_->loss(logits(*task_, batch), batch.labels);
      if (batches.size() > 1) loss = loss * (rows[i] / all_rows);
      sum += loss.item<double>();
      if (!std::isfinite(sum))
        diverged(fmt::format("the loss is {} at step {}", std::isnan(sum) ? "NaN" : "infinite", done_ + 1));
      loss.backward();
    }
    optimizer_->step();
    schedule_->step();
    ++done_;
    return sum;
  }

  [[noreturn]] void diverged(const std::string& what) {
    progress_->finish();
    throw Diverged(fmt::format(
        "{}: stopped (hint: a smaller --lr, or --clip 1)\n  {}", what,
        folder_.has_checkpoint()
            ? fmt::format("the last good checkpoint is kept in '{}'", folder_.checkpoint_folder().string())
            : "no checkpoint had been written yet (hint: --checkpoint-every)"));
  }

  void require_finite() {
    for (const auto& [name, tensor] : trained_->named_parameters()) {
      if (!tensor.isfinite().all().item<bool>())
        diverged(fmt::format("'{}' holds NaN or infinity after step {}", name, done_));
    }
  }

  void evaluate_now() {
    const auto result = evaluate(*task_, *data_.test);
    row_.accuracy_curve.push_back({done_, result.accuracy});
    if (log_) log_->evaluation(done_, result.loss, result.accuracy);
    say(fmt::format("step {}: accuracy {:.2f} % ({} of {}), loss {:.4f}", done_, 100 * result.accuracy,
                    result.correct, result.rows, result.loss));
    for (size_t i = 0; i < result.tasks.size(); ++i)
      say(fmt::format("  task {}: {:.2f} %  '{}'", i, 100 * result.tasks[i], options_.test[i].string()));
    if (result.accuracy <= best_accuracy_) return;
    require_finite();
    best_accuracy_ = result.accuracy;
    best_step_ = done_;
    folder_.write_best([&](const fs::path& path) { task_->save(path, settings(/*whole=*/false)); });
  }

  void checkpoint() {
    require_finite();
    nlohmann::ordered_json position{{"step", done_},
                                    {"best_accuracy", best_accuracy_},
                                    {"best_step", best_step_},
                                    {"data", data_hash_},
                                    {"arguments", arguments()}};
    if (!row_.ranks.empty()) position["ranks"] = row_.ranks.to_json();
    folder_.write_checkpoint([&](const fs::path& path) {
      peft::save_checkpoint(path, *trained_, *optimizer_, *schedule_, position.dump());
    });
  }

  nlohmann::ordered_json arguments() const {
    auto json = nlohmann::ordered_json::object();
    for (const auto& [name, value] : options_.arguments) json[name] = value;
    return json;
  }

  nlohmann::ordered_json settings(bool whole) const {
    auto json = Settings{data_.labels, options_.pooling, data_.max_length}.to_json();
    json["method"] = row_.method;
    json["step"] = done_;
    if (best_step_ > 0) {
      json["best_accuracy"] = best_accuracy_;
      json["best_step"] = best_step_;
    }
    if (whole) json["arguments"] = arguments();
    return json;
  }

  ResultRow finish() {
    require_finite();
    std::vector<std::string> notes;
    for (const auto& controller : trained_->shared_record()->controllers) {
      const auto* grower = dynamic_cast<const peft::RankGrower*>(controller.get());
      if (grower && grower->total_rank() < grower->target()) {
        say(fmt::format(
            "note: IncreLoRA's ranks came to {} in all, not to the target of {} (hint: more steps, or a "
            "smaller incre_interval)",
            grower->total_rank(), grower->target()));
      }
    }
    folder_.finish([&](const fs::path& path) {
      if (!row_.ranks.empty()) peft::write_file(path / RunFolder::rank_picture, rank_svg(row_.ranks));
      notes = task_->save(path, settings(/*whole=*/true));
    });
    for (const auto& note : notes) say("note: " + note);
    count_trainable();  // more than at the start, where a method grows
    row_.accuracy = std::max(0.0, best_accuracy_);
    row_.seconds_per_step = internal::median(times_);
    row_.peak_bytes = internal::peak_memory();
    row_.adapter_bytes = internal::bytes_of_weights(folder_.path());
    if (!options_.quiet) {
      say(fmt::format("{}: {} steps in {:.1f} s ({:.3f} s a step){}; adapter in '{}' ({})", row_.method,
                      times_.size(), row_.train_seconds, row_.seconds_per_step,
                      best_step_ > 0 ? fmt::format(", best accuracy {:.2f} % after step {}",
                                                   100 * best_accuracy_, best_step_)
                                     : "",
                      folder_.path().string(), peft::internal::bytes_text(row_.adapter_bytes)));
      if (method_ && method_->fusion && data_.test) fmt::print("{}", fusion_table());
      if (!row_.ranks.empty()) {
        say(fmt::format("ranks over training: '{}'", (folder_.path() / RunFolder::rank_picture).string()));
        fmt::print("{}", rank_table(row_.ranks));
      }
    }
    return row_;
  }

  /// The accuracy of each adapter of a fusion, with its own head where that has the run's labels, and the
  /// fusion's after the last step.
  std::string fusion_table() {
    std::vector<std::vector<std::string>> cells{{"adapter", "accuracy"}};
    const auto percent = [](double accuracy) { return fmt::format("{:.2f} %", 100 * accuracy); };
    const BaseOptions base{options_.model, internal::parse_dtype(options_.dtype), std::nullopt,
                           task_->device()};
    for (const auto& folder : method_->fused) {
      const auto settings = Settings::read(folder);
      std::string shown = "- (other labels)";
      if (settings && settings->labels == data_.labels) {
        auto alone = Task::for_prediction(base, folder, settings);
        shown = percent(evaluate(alone, *data_.test).accuracy);
      }
      cells.push_back({folder, shown});
    }
    cells.push_back({"fusion", percent(row_.accuracy_curve.back().value)});
    return aligned(cells);
  }

  TrainOptions options_;
  RunFolder folder_;
  std::optional<Method> method_;
  RunData data_;
  std::unique_ptr<Task> task_;
  std::unique_ptr<peft::Adapter> trained_;
  std::unique_ptr<peft::AdapterOptimizer> optimizer_;
  std::unique_ptr<peft::Schedule> schedule_;
  std::unique_ptr<StepLog> log_;
  std::unique_ptr<Progress> progress_;
  nlohmann::ordered_json position_;
  std::string data_hash_;
  std::optional<double> init_rate_;
  double rate_ = 0;
  int64_t steps_per_epoch_ = 1, total_ = 0, done_ = 0, base_weights_ = 0;
  double best_accuracy_ = -1;
  int64_t best_step_ = 0;
  size_t adapter_group_ = 0;  ///< of the optimizer: the adapter's, or the head's where nothing else trains
  std::vector<double> times_;
  ResultRow row_;
};

}  // namespace finetune
