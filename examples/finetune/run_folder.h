// RunFolder: the folder of a training run. What stands in it is complete at every moment, also after `kill
// -9`.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "peft/io/atomic_file.h"
#include "peft/io/staged_directory.h"
#include "task.h"

namespace finetune {

/// The user stopped the program.
struct Interrupted : std::runtime_error {
  Interrupted(int signal_number, const std::string& message)
      : std::runtime_error(message), signal(signal_number) {}
  int signal;
};

/// The loss is no number any more.
struct Diverged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace internal {
inline volatile std::sig_atomic_t signal_seen = 0;
}  // namespace internal

/// While it lives, the first Ctrl-C or SIGTERM is only noted; the second ends the program at once.
class SignalGuard {
 public:
  SignalGuard() {
    internal::signal_seen = 0;
    struct sigaction action {};
    action.sa_handler = [](int number) { internal::signal_seen = number; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < signals.size(); ++i) sigaction(signals[i], &action, &before_[i]);
  }
  ~SignalGuard() {
    for (size_t i = 0; i < signals.size(); ++i) sigaction(signals[i], &before_[i], nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

  /// The signal that came, or 0.
  static int seen() { return internal::signal_seen; }

 private:
  static constexpr std::array<int, 2> signals{SIGINT, SIGTERM};
  std::array<struct sigaction, 2> before_{};
};

/// Options and their values as the user gave them, in the order of their names.
using Arguments = std::vector<std::pair<std::string, std::string>>;

/// The folder of a run, from before anything is read to its end.
class RunFolder {
 public:
  /// Of methods that change ranks.
  static constexpr const char* rank_picture = "ranks.svg";
  /// What there is to go on from.
  enum class State { fresh, checkpoint, finished };

  /// Throws: std::runtime_error where the folder is in use and neither to be overwritten nor gone on with, or
  /// holds what this program did not write.
  RunFolder(fs::path path, bool overwrite, bool resume) : path_(std::move(path)) {
    if (!path_.has_filename()) path_ = path_.parent_path();
    peft::StagedDirectory::recover(path_);
    peft::StagedDirectory::recover(checkpoint_folder());
    std::error_code error;
    const auto status = fs::status(path_, error);
    if (fs::exists(status) && !fs::is_directory(status)) {
      throw std::runtime_error(fmt::format("--out: '{}' is a file", path_.string()));
    }
    const bool used = fs::exists(status) && !fs::is_empty(path_, error);
    if (!used) {
      // Found out now, not after hours of training: can the folder be made?
      const peft::StagedDirectory trial(path_);
      return;
    }
    if (!overwrite && !resume) {
      throw std::runtime_error(
          fmt::format("--out: the folder '{}' exists and is not empty (hint: another name, --overwrite, or "
                      "--resume to go on)",
                      path_.string()));
    }
    if (!is_ours(path_)) {
      throw std::runtime_error(
          fmt::format("--out: the folder '{}' holds files this program did not write; it is not "
                      "overwritten",
                      path_.string()));
    }
    if (!resume) return;
    if (fs::exists(path_ / Settings::file_name, error)) {
      state_ = State::finished;
    } else if (fs::exists(checkpoint_file(), error)) {
      state_ = State::checkpoint;
      begun_ = true;
    }
  }
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const fs::path& path() const { return path_; }
  State state() const { return state_; }
  fs::path checkpoint_folder() const { return path_ / "checkpoint"; }
  fs::path checkpoint_file() const { return checkpoint_folder() / "checkpoint.safetensors"; }
  bool has_checkpoint() const {
    std::error_code ignored;
    return begun_ && fs::exists(checkpoint_file(), ignored);
  }

  /// A checkpoint in place of the one before. `write` gets the file's name.
  void write_checkpoint(const std::function<void(const fs::path&)>& write) {
    begin();
    peft::StagedDirectory staged(checkpoint_folder(), /*overwrite=*/true);
    write_into(staged, [&](const fs::path& folder) { write(folder / checkpoint_file().filename()); });
    staged.commit();
  }
  /// The best adapter so far. `write` gets a folder that exists.
  void write_best(const std::function<void(const fs::path&)>& write) {
    begin();
    peft::StagedDirectory staged(path_ / "best", /*overwrite=*/true);
    write_into(staged, write);
    staged.commit();
  }
  /// The last adapter; the best stays and the checkpoint goes, all in one step.
  void finish(const std::function<void(const fs::path&)>& write) {
    peft::StagedDirectory staged(path_, /*overwrite=*/true);
    write_into(staged, write);
    std::error_code error;
    if (begun_ && fs::exists(path_ / "best", error)) {
      fs::copy(path_ / "best", staged.path() / "best", fs::copy_options::recursive, error);
      if (error) {
        throw std::runtime_error(
            fmt::format("'{}' cannot be written: {}", (path_ / "best").string(), error.message()));
      }
    }
    staged.commit();
    begun_ = true;
  }

  /// After a failure: takes away what cannot be gone on with. `keep_best`: a best adapter is worth keeping.
  void abandon(bool keep_best) {
    std::error_code ignored;
    if (!begun_ || has_checkpoint() || (keep_best && fs::exists(path_ / "best", ignored))) return;
    fs::remove_all(path_, ignored);
  }

 private:
  /// Errors name the file the user gets, not the temporary one.
  static void write_into(const peft::StagedDirectory& staged,
                         const std::function<void(const fs::path&)>& write) {
    try {
      write(staged.path());
    } catch (const c10::Error& error) {
      std::string text = error.what_without_backtrace();
      const auto temporary = staged.path().string();
      for (size_t at = 0; (at = text.find(temporary, at)) != std::string::npos;) {
        text.replace(at, temporary.size(), staged.final_path().string());
        at += staged.final_path().string().size();
      }
      throw std::runtime_error(text);
    }
  }

  /// Whether everything in a folder is what a run leaves.
  static bool is_ours(const fs::path& path) {
    static const std::vector<std::string> names{"adapter_config.json",
                                                "adapter_model.safetensors",
                                                "adapter.safetensors",
                                                peft::internal::hub_head_config,
                                                peft::internal::hub_head_tensors,
                                                peft::internal::hub_fusion_config,
                                                peft::internal::hub_fusion_tensors,
                                                internal::fused_folder,
                                                "README.md",
                                                "best",
                                                "checkpoint",
                                                rank_picture,
                                                Task::head_file,
                                                Settings::file_name};
    std::error_code error;
    for (fs::directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error)) {
      const auto name = entry->path().filename().string();
      const bool temporary = name.starts_with(".best.") || name.starts_with(".checkpoint.");
      if (!temporary && std::find(names.begin(), names.end(), name) == names.end()) return false;
    }
    return !error;
  }

  /// Before the first write: an empty folder, in place of an older run's.
  void begin() {
    if (begun_) return;
    peft::StagedDirectory(path_, /*overwrite=*/true).commit();
    begun_ = true;
  }

  fs::path path_;
  State state_ = State::fresh;
  bool begun_ = false;
};

/// Throws: std::runtime_error where a log lies in the folder of its run, which is replaced as a whole.
inline void check_log(const fs::path& log, const fs::path& out) {
  if (log.empty()) return;
  const auto folder = fs::weakly_canonical(fs::absolute(out / "")),
             file = fs::weakly_canonical(fs::absolute(log));
  const auto end = folder.has_filename() ? folder.end() : std::prev(folder.end());
  if (std::mismatch(folder.begin(), end, file.begin(), file.end()).first != end) return;
  throw std::runtime_error(fmt::format(
      "--log: '{}' must not lie in --out, '{}', which is replaced as a whole", log.string(), out.string()));
}

/// Throws: std::runtime_error naming the first option whose value is not the one the run was begun with.
inline void require_same_arguments(const Arguments& now, const nlohmann::ordered_json& then,
                                   const fs::path& folder) {
  const auto complain = [&](const std::string& name, const std::string& was, const std::string& is) {
    throw std::runtime_error(
        fmt::format("--resume: {} was {} when the run in '{}' began, but is {} now (hint: a run goes "
                    "on with the same arguments only)",
                    name, was, folder.string(), is));
  };
  for (const auto& [name, value] : now) {
    if (!then.contains(name)) complain(name, "not given", "'" + value + "'");
    const auto was = then[name].get<std::string>();
    if (was != value) complain(name, "'" + was + "'", "'" + value + "'");
  }
  for (const auto& [name, value] : then.items()) {
    const auto same = [&name = name](const auto& argument) { return argument.first == name; };
    if (std::none_of(now.begin(), now.end(), same)) {
      complain(name, "'" + value.template get<std::string>() + "'", "not given");
    }
  }
}

/// The log of a run: a JSON object a line, each on the disk before the next step.
class StepLog {
 public:
  StepLog() = default;
  /// `done`: the steps of the file that stay; what comes after them is cut off.
  StepLog(fs::path path, int64_t done) : path_(std::move(path)) {
    const auto kept = done > 0 ? head_of(path_, done) : std::string();
    peft::write_file(path_, kept);
    file_ = std::fopen(path_.c_str(), "ab");
    if (file_ == nullptr) fail();
  }
  ~StepLog() {
    if (file_ != nullptr) std::fclose(file_);
  }
  StepLog(const StepLog&) = delete;
  StepLog& operator=(const StepLog&) = delete;

  /// A step and what was before it. `penalty`: of a method that adds one to the task's loss (AdaLoRA,
  /// IncreLoRA); "loss" is the sum. `rate`: of the adapter, or of the head where nothing else trains.
  void step(int64_t step, double task_loss, std::optional<double> penalty, double rate) {
    write(fmt::format("{{\"step\":{},\"loss\":{:.17g},\"task_loss\":{:.17g}{},\"lr\":{:.17g}}}\n", step,
                      task_loss + penalty.value_or(0), task_loss,
                      penalty ? fmt::format(",\"penalty\":{:.17g}", *penalty) : "", rate));
  }
  void evaluation(int64_t step, double loss, double accuracy) {
    write(fmt::format("{{\"step\":{},\"loss\":{:.17g},\"accuracy\":{:.17g}}}\n", step, loss, accuracy));
  }

 private:
  /// The lines up to a step; one that a kill cut short is none.
  static std::string head_of(const fs::path& path, int64_t done) {
    std::ifstream file(path, std::ios::binary);
    std::string kept;
    for (std::string line; std::getline(file, line) && !file.eof();) {
      const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) break;
      if (json["step"].get<int64_t>() > done) break;
      kept += line + "\n";
    }
    return kept;
  }
  void write(const std::string& line) {
    if (file_ == nullptr) return;
    if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0) fail();
  }
  [[noreturn]] void fail() const {
    throw std::runtime_error(fmt::format("--log: '{}' cannot be written: {}", path_.string(),
                                         std::generic_category().message(errno)));
  }

  fs::path path_;
  std::FILE* file_ = nullptr;
};

}  // namespace finetune
