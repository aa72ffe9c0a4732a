// Table: all cells of methods × tasks × seeds, those that are finished left alone.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cell.h"
#include "data.h"
#include "finetune/child.h"
#include "finetune/compare.h"
#include "finetune/threads.h"
#include "peer.h"
#include "peft/io/staged_directory.h"
#include "recipe.h"
#include "report.h"
#include "train_cell.h"

namespace glue {

inline std::vector<std::string> task_names() {
  std::vector<std::string> names;
  for (const auto& task : glue_tasks()) names.push_back(task.name);
  return names;
}

/// The tokens a model of this config takes at most.
inline std::int64_t positions_of(const nlohmann::ordered_json& config) {
  const auto positions = config.value("max_position_embeddings", std::int64_t{512});
  const auto type = config.value("model_type", "");
  const bool offset = type == "roberta" || type == "xlm-roberta" || type == "camembert";
  // Whose first position is the one after that of padding.
  return offset ? positions - config.value("pad_token_id", std::int64_t{1}) - 1 : positions;
}

/// The arguments of the program.
struct TableOptions {
  fs::path data, model, out;
  std::vector<std::string> tasks, methods;  ///< empty: all
  std::string preset = "default";
  std::int64_t seeds = 3, more_seeds = 5;
  std::uint64_t first_seed = 0;
  std::map<std::string, std::int64_t> train_rows, dev_rows;  ///< by task, or "" for all
  std::optional<std::int64_t> epochs, batch_size, max_length;
  std::int64_t eval_every = 0;
  Peer peer;
  bool keep_best = true, report_only = false;
  int threads = 0;
};

/// Runs what is not finished and writes the tables.
class Table {
 public:
  /// `program` runs work in a child: prints what it throws and turns that into the exit status.
  Table(TableOptions options, std::function<int(const std::function<void()>&)> program)
      : options_(std::move(options)), program_(std::move(program)), cells_(options_.out) {}

  /// Throws: what is wrong with arguments, data or finished cells, before anything is trained; at the end, if
  /// there are cells that failed.
  void operator()() {
    read_tasks();
    name_methods();
    const auto last = options_.first_seed + static_cast<std::uint64_t>(options_.seeds);
    std::vector<CellSettings> wanted;
    for (auto seed = options_.first_seed; seed < last; ++seed) {
      for (const auto& task : tasks_) {
        for (const auto& method : methods_) add_cells(wanted, *task.task, method, seed);
      }
    }
    if (wanted.empty()) throw std::runtime_error("no method has a published recipe of any of the tasks");
    for (const auto& settings : wanted) cells_.read(settings);
    if (!options_.report_only) check_methods(wanted);
    run(wanted);
    if (const auto more = cells_that_differ(last); !more.empty()) {
      fmt::print(stderr, "{} cells more, of {} more seeds, where the two programs differ\n", more.size(),
                 options_.more_seeds);
      run(more);
    }
    report();
    if (failed_ > 0) throw std::runtime_error(fmt::format("{} cells failed (see above)", failed_));
  }

 private:
  /// A task with its rows.
  struct ReadTask {
    const GlueTask* task;
    GlueSplits splits;
    std::string hash;
  };

  static void say(const std::string& line) { fmt::print(stderr, "{}\n", line); }

  void read_tasks() {
    std::error_code ignored;
    if (!fs::is_directory(options_.data, ignored))
      throw std::runtime_error(fmt::format("--data: there is no folder '{}'", options_.data.string()));
    const auto limit = [](const std::map<std::string, std::int64_t>& limits, const std::string& task) {
      const auto own = limits.find(task), all = limits.find("");
      return own != limits.end() ? own->second : all != limits.end() ? all->second : 0;
    };
    for (const auto& name : options_.tasks.empty() ? task_names() : options_.tasks) {
      const auto& task = glue_task(name);
      const auto is_this = [&task](const ReadTask& read) { return read.task == &task; };
      if (std::any_of(tasks_.begin(), tasks_.end(), is_this)) continue;
      auto splits =
          read_splits(options_.data, task,
                      {limit(options_.train_rows, task.name), limit(options_.dev_rows, task.name)}, say);
      if (!splits) continue;
      auto hash = hash_of(*splits);
      tasks_.push_back({&task, std::move(*splits), std::move(hash)});
    }
    if (tasks_.empty())
      throw std::runtime_error(fmt::format("--data: '{}' has none of the tasks", options_.data.string()));
    config_ = peft::internal::read_json_object(options_.model / "config.json");
    tokenizer_.emplace(
        finetune::read_tokenizer(options_.model, config_.value("vocab_size", std::int64_t{0})));
    model_ = hash_of_folder(options_.model);
  }

  /// Each method by the name it has in the table: its own, with a number where it comes again.
  void name_methods() {
    const auto texts = options_.methods.empty() ? recipe_names(is_published()) : options_.methods;
    const auto names = finetune::internal::folder_names(texts);
    for (std::size_t i = 0; i < texts.size(); ++i) methods_.emplace_back(names[i], texts[i]);
  }
  bool is_published() const { return options_.preset == "published"; }

  void add_cells(std::vector<CellSettings>& cells, const GlueTask& task,
                 const std::pair<std::string, std::string>& method, std::uint64_t seed) const {
    CellSettings settings;
    settings.task = task.name;
    settings.method = method.first;
    settings.seed = seed;
    const auto recipe = is_published() ? published_recipe(method.second, task.name)
                                       : std::optional<Recipe>(default_recipe(method.second));
    if (!recipe) {
      if (seed == options_.first_seed)
        say(fmt::format("{} {}: skipped: it has no published recipe", task.name, method.first));
      return;
    }
    settings.recipe = *recipe;
    if (options_.epochs) settings.recipe.epochs = *options_.epochs;
    if (options_.batch_size) settings.recipe.batch_size = *options_.batch_size;
    const auto positions = positions_of(config_);
    settings.recipe.max_length =
        options_.max_length.value_or(std::min(settings.recipe.max_length, positions));
    if (settings.recipe.max_length > positions) {
      throw std::runtime_error(
          fmt::format("--max-length must be at most {}, the model's positions, but got {}", positions,
                      settings.recipe.max_length));
    }
    settings.eval_every = options_.eval_every;
    settings.model = model_;
    settings.data = task_of(task.name).hash;
    cells.push_back(settings);
    if (options_.peer.python.empty() || !has_peer(method.second)) return;
    check_peer(settings.recipe, method.first);
    settings.program = "python";
    cells.push_back(settings);
  }

  const ReadTask& task_of(const std::string& name) const {
    return *std::find_if(tasks_.begin(), tasks_.end(),
                         [&](const auto& task) { return task.task->name == name; });
  }

  /// Throws where a method does not fit the model or its task, before the first is trained.
  void check_methods(const std::vector<CellSettings>& wanted) {
    finetune::internal::in_child(
        [&] {
          std::map<std::int64_t, GlueModel> models;  // by the number of labels
          for (const auto& settings : wanted) {
            if (settings.seed != options_.first_seed || settings.program != "peft") continue;
            const auto& task = task_of(settings.task);
            const auto labels =
                task.task->is_regression() ? 1 : static_cast<std::int64_t>(task.task->labels.size());
            const auto model = models.try_emplace(labels, options_.model, settings.recipe, labels).first;
            const auto steps =
                settings.recipe.epochs * steps_per_epoch(settings.recipe, task.splits.train.size());
            model->second.check(model->second.read(settings.recipe.method, steps));
          }
          return std::string();
        },
        program_, "the check of the methods");
  }

  /// Runs those that are not finished.
  void run(const std::vector<CellSettings>& wanted) {
    std::size_t number = 0;
    for (const auto& settings : wanted) {
      ++number;
      auto result = cells_.read(settings);
      if (!result && !options_.report_only) result = run(settings, number, wanted.size());
      if (result) finished_.push_back({settings, std::move(*result)});
    }
  }

  std::optional<CellResult> run(const CellSettings& settings, std::size_t number, std::size_t all) {
    std::string text;
    try {
      text = finetune::internal::in_child(
          [&] {
            finetune::set_threads(options_.threads);
            const auto& task = task_of(settings.task);
            const auto data = encode_splits(*tokenizer_, *task.task, task.splits, settings.recipe.max_length);
            return internal::to_json(train(settings, data)).dump();
          },
          program_, settings.name());
    } catch (const finetune::Interrupted&) {
      throw;
    } catch (const std::exception& error) {
      say(error.what());
      ++failed_;
      return std::nullopt;
    }
    auto result = internal::result_of(nlohmann::ordered_json::parse(text));
    cells_.write(settings, result);
    const auto& best = result.best();
    std::vector<std::string> scores;
    for (const auto& one : best.scores) {
      scores.push_back(
          fmt::format("{} {}", one.name, one.value ? fmt::format("{:.2f}", 100 * *one.value) : "undefined"));
    }
    say(fmt::format("{} of {}: {}: {} after step {} of {}; {:.0f} s, {}", number, all, settings.name(),
                    fmt::join(scores, ", "), best.step, result.steps, result.seconds,
                    finetune::internal::size_text(result.peak_bytes)));
    return result;
  }

  CellResult train(const CellSettings& settings, const GlueData& data) const {
    if (settings.program != "peft") {
      auto peer = options_.peer;
      peer.threads = at::get_num_threads();
      // Never committed, so that nothing of it is left.
      const peft::StagedDirectory work(
          options_.out / fmt::format("peer-{}-{}-{}", settings.task, settings.method, settings.seed));
      return train_in_python(peer, options_.model, settings, data, work.path());
    }
    const auto best =
        options_.keep_best ? options_.out / "best" / settings.file().replace_extension() : fs::path();
    return CellTraining(options_.model, settings, data, best)();
  }

  /// More seeds of the cells in which the two programs are apart.
  std::vector<CellSettings> cells_that_differ(std::uint64_t first) const {
    std::vector<CellSettings> more;
    for (const auto& [settings, pairs] : pairs_of(finished_)) {
      if (pairs.size() == 0 || pairs.agree()) continue;
      for (std::uint64_t i = 0; i < static_cast<std::uint64_t>(options_.more_seeds); ++i) {
        for (const auto& program : {"peft", "python"}) {
          more.push_back(settings);
          more.back().program = program;
          more.back().seed = first + i;
        }
      }
    }
    return more;
  }

  void report() const {
    if (finished_.empty()) throw std::runtime_error("no cell is finished yet");
    // In the order of the command, whatever was finished first.
    const auto table = table_cells(finished_);
    const auto peers = peer_cells(finished_);
    auto text = finetune::aligned(table);
    auto for_github = markdown(table);
    if (peers.size() > 1) {
      text += "\n" + finetune::aligned(peers);
      for_github += "\n" + markdown(peers);
    }
    fmt::print("{}", text);
    fs::create_directories(options_.out);
    peft::write_file(options_.out / "table.txt", text);
    peft::write_file(options_.out / "table.md", for_github);
    peft::write_file(options_.out / "results.csv", csv(finished_));
  }

  TableOptions options_;
  std::function<int(const std::function<void()>&)> program_;
  Cells cells_;
  std::vector<ReadTask> tasks_;
  std::vector<std::pair<std::string, std::string>> methods_;  ///< name and `--method`
  nlohmann::ordered_json config_;
  std::optional<text::Tokenizer> tokenizer_;
  std::string model_;
  std::vector<FinishedCell> finished_;
  std::size_t failed_ = 0;
};

}  // namespace glue
