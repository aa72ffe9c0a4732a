// AtomicFile, StagedDirectory: files and folders that appear under their final name complete, or not at all.
#pragma once

#include <c10/util/Exception.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#define PEFT_HAS_POSIX_FILES 1
#include <fcntl.h>
#include <unistd.h>
#include <csignal>
#else
#define PEFT_HAS_POSIX_FILES 0
#include <process.h>
#endif

namespace peft {
namespace internal {

/// "No space left on device (hint: …)" for an error number.
inline std::string errno_text(int error) {
  std::string text = std::generic_category().message(error);
  const bool full = std::error_code(error, std::generic_category()) == std::errc::no_space_on_device;
  if (full) text += " (hint: the disk is full; free some space or choose another folder)";
  return text;
}

inline long process_id() {
#if PEFT_HAS_POSIX_FILES
  return static_cast<long>(::getpid());
#else
  return static_cast<long>(::_getpid());
#endif
}

/// Whether a process of this number may still be running; where that cannot be asked, yes.
inline bool process_may_live([[maybe_unused]] long id) {
#if PEFT_HAS_POSIX_FILES
  return ::kill(static_cast<pid_t>(id), 0) == 0 || errno != ESRCH;
#else
  return true;
#endif
}

/// Waits until an open file or folder has reached the disk. Returns 0 or the error number.
inline int sync_descriptor([[maybe_unused]] int descriptor) {
#if PEFT_HAS_POSIX_FILES
  while (::fsync(descriptor) != 0) {
    if (errno == EINTR) continue;
    // Some file systems have no such call for folders; there is nothing more to be done on them.
    return errno == EINVAL || errno == ENOTSUP ? 0 : errno;
  }
#endif
  return 0;
}

/// The same for a path. Returns 0 or the error number.
inline int sync_path([[maybe_unused]] const std::filesystem::path& path) {
#if PEFT_HAS_POSIX_FILES
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return errno;
  const int error = sync_descriptor(descriptor);
  ::close(descriptor);
  return error;
#else
  return 0;
#endif
}

/// The folder a path lies in, never empty.
inline std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

/// The path a link leads to, so that a file or folder is written beside it and not in place of the link.
inline std::filesystem::path without_link(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_symlink(path, error)) return path;
  const auto target = std::filesystem::weakly_canonical(path, error);
  return error ? path : target;
}

/// `.NAME.tmp-PID`, beside `path`; further attempts add a number.
inline std::filesystem::path temporary_sibling(const std::filesystem::path& path, int attempt) {
  std::string name = "." + path.filename().string() + ".tmp-" + std::to_string(process_id());
  if (attempt > 0) name += "-" + std::to_string(attempt);
  return folder_of(path) / name;
}

/// The temporary siblings of `path` whose process is gone: what a killed program left.
inline std::vector<std::filesystem::path> abandoned_siblings(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> found;
  const std::string start = "." + path.filename().string() + ".tmp-";
  std::error_code ignored;
  for (std::filesystem::directory_iterator entry(folder_of(path), ignored), end; !ignored && entry != end;
       entry.increment(ignored)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(start)) continue;
    char* rest = nullptr;
    const long id = std::strtol(name.c_str() + start.size(), &rest, 10);
    if (id > 0 && (*rest == '\0' || *rest == '-') && !process_may_live(id)) found.push_back(entry->path());
  }
  return found;
}

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

/// Writes a file under a temporary name in the same folder; `commit()` moves it to its final name once every
/// byte is on the disk. Without a commit nothing is left and an older file of that name is untouched.
///
/// Throws: c10::Error naming the final path and the system's reason, from any call.
///
/// Example:
/// ```
/// peft::AtomicFile file("out/adapter_config.json");
/// file.write(json.dump(2));
/// file.commit();
/// ```
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path) : path_(internal::without_link(path)) {
    TORCH_CHECK(path_.has_filename(), "AtomicFile: path must name a file, but got '", path_.string(), "'");
    std::error_code ignored;
    TORCH_CHECK(!std::filesystem::is_directory(path_, ignored), "AtomicFile: cannot write '", path_.string(),
                "': it is a folder");
    for (const auto& old : internal::abandoned_siblings(path_)) std::filesystem::remove_all(old, ignored);
    for (int attempt = 0; file_ == nullptr; ++attempt) {
      temporary_ = internal::temporary_sibling(path_, attempt);
      file_ = std::fopen(temporary_.string().c_str(), "wbx");
      if (file_ == nullptr && errno != EEXIST) fail(errno);
    }
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() { discard(); }

  /// Appends bytes.
  void write(const void* data, size_t bytes) {
    TORCH_CHECK(file_ != nullptr, "AtomicFile: '", path_.string(), "' must not be written after its commit");
    if (bytes == 0) return;  // an empty tensor has no address, which fwrite may not be given
    errno = 0;
    if (std::fwrite(data, 1, bytes, file_) != bytes) fail(errno);
  }
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// Flushes to the disk and gives the file its final name, replacing what was there.
  void commit() {
    TORCH_CHECK(file_ != nullptr, "AtomicFile: '", path_.string(), "' must not be committed twice");
    errno = 0;
    if (std::fflush(file_) != 0) fail(errno);
#if PEFT_HAS_POSIX_FILES
    if (const int error = internal::sync_descriptor(::fileno(file_))) fail(error);
#endif
    // Some systems report a failed write only here.
    if (std::fclose(std::exchange(file_, nullptr)) != 0) fail(errno);
    std::error_code error;
    std::filesystem::rename(temporary_, path_, error);
    if (error) fail(error.value());
    temporary_.clear();
    if (const int failed = internal::sync_path(internal::folder_of(path_))) fail(failed);
  }

  /// The final name.
  const std::filesystem::path& path() const { return path_; }

 private:
  void discard() {
    if (file_ != nullptr) std::fclose(std::exchange(file_, nullptr));
    std::error_code ignored;
    if (!temporary_.empty()) std::filesystem::remove(temporary_, ignored);
    temporary_.clear();
  }

  [[noreturn]] void fail(int error) {
    discard();
    TORCH_CHECK(false, "AtomicFile: cannot write '", path_.string(), "': ", internal::errno_text(error));
  }

  std::filesystem::path path_, temporary_;
  std::FILE* file_ = nullptr;
};

/// Writes a whole file at once through AtomicFile.
inline void write_file(const std::filesystem::path& path, std::string_view contents) {
  AtomicFile file(path);
  file.write(contents);
  file.commit();
}

/// A folder that appears complete or not at all: its files are collected in `.NAME.tmp-PID` beside the final
/// name, and `commit()` renames that. Without a commit nothing is left.
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
