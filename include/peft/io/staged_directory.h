// StagedDirectory: a folder that appears under its final name complete, or not at all.
#pragma once

#include <c10/util/Exception.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#endif

#include "peft/io/atomic_file.h"

namespace peft {
namespace internal {

/// Exchanges two folders in one step where the system can. Returns 0 or the error number.
inline int exchange_paths([[maybe_unused]] const std::filesystem::path& a,
                          [[maybe_unused]] const std::filesystem::path& b) {
#if defined(__linux__) && defined(RENAME_EXCHANGE)
  return ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

}  // namespace internal

/// A folder that appears complete or not at all: its files are collected in `.NAME.tmp-PID@HOST` beside the
/// final name, and `commit()` renames that. Without a commit nothing is left.
///
/// Throws: c10::Error from the constructor, before anything is written, when the final name is a file, or a
/// folder with files in it and `overwrite` is false.
///
/// Example:
/// ```
/// peft::StagedDirectory staged("out/checkpoint", /*overwrite=*/true);
/// peft::save_safetensors(staged.path() / "adapter_model.safetensors", tensors);
/// staged.commit();
/// ```
class StagedDirectory {
 public:
  explicit StagedDirectory(const std::filesystem::path& path, bool overwrite = false)
      : path_(usable_name(path)), overwrite_(overwrite) {
    TORCH_CHECK(path_.has_filename() && path_.filename() != "." && path_.filename() != "..",
                "StagedDirectory: path must name a folder, but got '", path_.string(), "'");
    recover(path_);
    check_target();
    create_parents();
    std::error_code error;
    for (int attempt = 0; staging_.empty(); ++attempt) {
      const auto candidate = internal::temporary_sibling(path_, attempt);
      const bool created = std::filesystem::create_directory(candidate, error);
      if (error) fail(error.value());
      if (created) staging_ = candidate;
    }
  }
  StagedDirectory(const StagedDirectory&) = delete;
  StagedDirectory& operator=(const StagedDirectory&) = delete;
  ~StagedDirectory() { discard(); }

  /// Where to put the files until the commit.
  const std::filesystem::path& path() const { return staging_; }
  /// The name the folder gets.
  const std::filesystem::path& final_path() const { return path_; }

  /// Flushes every file to the disk and gives the folder its final name. A folder it replaces is removed
  /// after that, so that one of the two is complete at every moment.
  void commit() {
    TORCH_CHECK(!staging_.empty(), "StagedDirectory: '", path_.string(), "' must not be committed twice");
    check_target();
    std::error_code error;
    for (std::filesystem::recursive_directory_iterator entry(staging_, error), end; !error && entry != end;
         entry.increment(error)) {
      if (!entry->is_regular_file() && !entry->is_directory()) continue;
      if (const int failed = internal::sync_path(entry->path())) fail(failed);
    }
    if (error) fail(error.value());
    if (const int failed = internal::sync_path(staging_)) fail(failed);

    std::filesystem::path replaced;
    if (!std::filesystem::exists(path_, error)) {
      std::filesystem::rename(staging_, path_, error);
    } else if (internal::exchange_paths(staging_, path_) == 0) {
      replaced = staging_;
    } else {
      replaced = set_aside_name(path_);
      std::filesystem::rename(path_, replaced, error);
      if (!error) {
        std::filesystem::rename(staging_, path_, error);
        std::error_code ignored;
        if (error) std::filesystem::rename(replaced, path_, ignored);
      }
    }
    if (error) fail(error.value());
    staging_.clear();
    created_parents_.clear();
    const int failed = internal::sync_path(internal::folder_of(path_));
    std::error_code ignored;
    if (!replaced.empty()) std::filesystem::remove_all(replaced, ignored);
    if (failed) fail(failed);
  }

  /// Tidies up after a program that was killed in the middle of a commit: where the system cannot exchange
  /// two folders in one step, the older folder may still be set aside and is put back. Also removes what is
  /// left of folders that were never committed. The constructor does this too; a reader calls it before it
  /// looks.
  static void recover(const std::filesystem::path& path) {
    const auto name = usable_name(path);
    std::error_code ignored;
    const auto aside = set_aside_name(name);
    if (std::filesystem::exists(aside, ignored)) {
      if (std::filesystem::exists(name, ignored)) {
        std::filesystem::remove_all(aside, ignored);
      } else {
        std::filesystem::rename(aside, name, ignored);
      }
    }
    for (const auto& old : internal::abandoned_siblings(name)) std::filesystem::remove_all(old, ignored);
  }

 private:
  static std::filesystem::path usable_name(const std::filesystem::path& path) {
    const bool trailing_slash = !path.has_filename() && path.has_parent_path();
    return internal::without_link(trailing_slash ? path.parent_path() : path);
  }

  static std::filesystem::path set_aside_name(const std::filesystem::path& path) {
    return internal::folder_of(path) / ("." + path.filename().string() + ".peft-old");
  }

  void check_target() const {
    std::error_code error;
    const auto status = std::filesystem::status(path_, error);
    if (!std::filesystem::exists(status)) return;
    TORCH_CHECK(std::filesystem::is_directory(status), "StagedDirectory: '", path_.string(),
                "' must be a folder or not exist, but it is a file");
    const bool empty = std::filesystem::is_empty(path_, error);
    TORCH_CHECK(!error, "StagedDirectory: cannot read '", path_.string(), "': ", error.message());
    TORCH_CHECK(
        empty || overwrite_, "StagedDirectory: '", path_.string(),
        "' must be empty or not exist, but it has files in it (hint: choose another name, or overwrite)");
  }

  void create_parents() {
    std::error_code error;
    std::vector<std::filesystem::path> missing;
    for (auto parent = internal::folder_of(path_); !std::filesystem::exists(parent, error);
         parent = internal::folder_of(parent)) {
      if (error) fail(error.value());
      missing.push_back(parent);
      if (!parent.has_parent_path()) break;
    }
    for (auto parent = missing.rbegin(); parent != missing.rend(); ++parent) {
      std::filesystem::create_directory(*parent, error);
      if (error) fail(error.value());
      created_parents_.insert(created_parents_.begin(), *parent);
    }
  }

  void discard() {
    std::error_code ignored;
    if (!staging_.empty()) std::filesystem::remove_all(staging_, ignored);
    // Innermost first; `remove` leaves a folder alone that someone else has used meanwhile.
    for (const auto& parent : created_parents_) std::filesystem::remove(parent, ignored);
    staging_.clear();
    created_parents_.clear();
  }

  [[noreturn]] void fail(int error) {
    discard();
    TORCH_CHECK(false, "StagedDirectory: cannot write '", path_.string(), "': ", internal::errno_text(error));
  }

  std::filesystem::path path_, staging_;
  std::vector<std::filesystem::path> created_parents_;
  bool overwrite_ = false;
};

namespace internal {

/// Calls `write(folder)` for a folder that is there, or for a new one, which then appears complete or not at
/// all.
template <class Write>
void write_directory(const std::filesystem::path& directory, const Write& write) {
  std::error_code ignored;
  if (std::filesystem::exists(directory, ignored)) {
    write(directory);
    return;
  }
  StagedDirectory staged(directory);
  write(staged.path());
  staged.commit();
}

}  // namespace internal
}  // namespace peft
