// FileBytes: the contents of a file, mapped into memory or read into it.
#pragma once

#include "peft/io/atomic_file.h"

#include <c10/util/Exception.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#if PEFT_HAS_POSIX_FILES
#include <sys/mman.h>
#include <sys/stat.h>
#endif

namespace peft::internal {

/// The bytes of a file, mapped into memory or read into it.
class FileBytes {
 public:
  FileBytes(const std::filesystem::path& path, bool map) {
    const std::string complaint = "SafetensorsFile: cannot read '" + path.string() + "': ";
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    TORCH_CHECK(std::filesystem::exists(status), complaint, std::generic_category().message(ENOENT));
    TORCH_CHECK(std::filesystem::is_regular_file(status), complaint, "it is not a file");
#if PEFT_HAS_POSIX_FILES
    if (map) {
      const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
      TORCH_CHECK(descriptor >= 0, complaint, errno_text(errno));
      struct stat info {};
      if (::fstat(descriptor, &info) != 0) {
        const int reason = errno;
        ::close(descriptor);
        TORCH_CHECK(false, complaint, errno_text(reason));
      }
      size_ = static_cast<size_t>(info.st_size);
      if (size_ > 0) {
        // Private: a page that is written to becomes the process's own, the file stays as it is.
        void* address = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
        const int reason = errno;
        ::close(descriptor);
        TORCH_CHECK(address != MAP_FAILED, complaint, errno_text(reason));
        data_ = static_cast<const char*>(address);
        mapped_ = true;
      } else {
        ::close(descriptor);
      }
      return;
    }
#endif
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    TORCH_CHECK(stream, complaint, errno_text(errno));
    size_ = static_cast<size_t>(stream.tellg());
    copy_.reset(new char[size_]);
    stream.seekg(0);
    stream.read(copy_.get(), static_cast<std::streamsize>(size_));
    TORCH_CHECK(stream, complaint, "it ended early");
    data_ = copy_.get();
  }
  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;
  ~FileBytes() {
#if PEFT_HAS_POSIX_FILES
    if (mapped_) ::munmap(const_cast<char*>(data_), size_);
#endif
  }

  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
  [[maybe_unused]] bool mapped_ = false;
  std::unique_ptr<char[]> copy_;
};

}  // namespace peft::internal
