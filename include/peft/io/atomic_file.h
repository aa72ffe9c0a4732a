// AtomicFile: a file that appears under its final name complete, or not at all.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cerrno>
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
#include <sys/uio.h>
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

/// The machine's name, by which machines and containers that share a folder tell their processes apart.
inline std::string host_name() {
#if PEFT_HAS_POSIX_FILES
  char name[256] = {};
  if (::gethostname(name, sizeof(name) - 1) == 0) return name;
#endif
  return {};
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

/// `.NAME.tmp-PID@HOST`, beside `path`; further attempts add a number.
inline std::filesystem::path temporary_sibling(const std::filesystem::path& path, int attempt) {
  std::string name = "." + path.filename().string() + ".tmp-" + std::to_string(process_id());
  if (attempt > 0) name += "-" + std::to_string(attempt);
  return folder_of(path) / (name + "@" + host_name());
}

/// The temporary siblings of `path` whose process, of this machine, is gone: what a killed program left.
inline std::vector<std::filesystem::path> abandoned_siblings(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> found;
  const std::string start = "." + path.filename().string() + ".tmp-";
  std::error_code ignored;
  for (std::filesystem::directory_iterator entry(folder_of(path), ignored), end; !ignored && entry != end;
       entry.increment(ignored)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(start)) continue;
    const auto at = name.find('@', start.size());
    if (at == std::string::npos || name.substr(at + 1) != host_name()) continue;
    const long id = std::strtol(name.c_str() + start.size(), nullptr, 10);
    if (id > 0 && !process_may_live(id)) found.push_back(entry->path());
  }
  return found;
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
  /// Appends many ranges of bytes in one call of the system where it has such a call, uncopied.
  void write(const std::vector<std::string_view>& parts) {
#if PEFT_HAS_POSIX_FILES
    TORCH_CHECK(file_ != nullptr, "AtomicFile: '", path_.string(), "' must not be written after its commit");
    errno = 0;
    if (std::fflush(file_) != 0) fail(errno);
    std::vector<struct iovec> ranges;
    for (const auto& part : parts) {
      // The system's struct serves reading too, so its address is not const.
      if (!part.empty()) ranges.push_back({const_cast<char*>(part.data()), part.size()});
    }
    constexpr size_t most = 1024;  // that Linux takes at once
    for (size_t first = 0; first < ranges.size();) {
      const auto count = static_cast<int>(std::min(most, ranges.size() - first));
      const auto written = ::writev(::fileno(file_), &ranges[first], count);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail(written < 0 ? errno : EIO);
      auto rest = static_cast<size_t>(written);  // no more than 2 GiB at a time
      for (; first < ranges.size() && rest >= ranges[first].iov_len; ++first) rest -= ranges[first].iov_len;
      if (rest == 0) continue;
      ranges[first].iov_base = static_cast<char*>(ranges[first].iov_base) + rest;
      ranges[first].iov_len -= rest;
    }
#else
    for (const auto& part : parts) write(part);
#endif
  }

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

}  // namespace peft
