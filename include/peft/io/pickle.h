// load_pickle: reads the tensors of a `.bin` file that Python's torch.save wrote.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/io/pickle_reader.h"

#include <caffe2/serialize/inline_container.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <system_error>

namespace peft {
namespace internal {

/// Refuses what is no zip archive, with the reason where it can be known.
inline void check_is_archive(const std::filesystem::path& path, const std::string& title) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  TORCH_CHECK(std::filesystem::exists(status), title, std::generic_category().message(ENOENT));
  TORCH_CHECK(std::filesystem::is_regular_file(status), title, "it is not a file");
  std::ifstream stream(path, std::ios::binary);
  TORCH_CHECK(stream, title, std::generic_category().message(errno));
  std::string start(16, '\0');
  stream.read(start.data(), static_cast<std::streamsize>(start.size()));
  // The magic number, a pickled long, of files from before PyTorch 1.6.
  constexpr std::string_view legacy("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 14);
  TORCH_CHECK(
      !start.starts_with(legacy), title,
      "it must be a zip archive, but has torch.save's format from before PyTorch 1.6 (hint: load and save "
      "it again in Python, best with safetensors)");
  TORCH_CHECK(start.starts_with("PK\x03\x04"), title,
              "it must be a zip archive written by torch.save, but is not");
}

}  // namespace internal

/// Reads a `.bin` file: a dict of tensors saved by Python's `torch.save`, such as a state dict or PEFT's
/// `adapter_model.bin`. The tensors lie on the CPU, with the types and strides they were saved with; those
/// that shared memory still do. Nothing a file names is ever called. There is no writer: use safetensors.
///
/// Throws: c10::Error naming the file, and every entry that is no tensor.
///
/// Example:
/// ```
/// for (const auto& [name, tensor] : peft::load_pickle("adapter_model.bin")) std::cout << name << '\n';
/// ```
inline std::map<std::string, Tensor> load_pickle(const std::filesystem::path& path) {
  using Kind = internal::PickleValue::Kind;
  const std::string title = "load_pickle: cannot read '" + path.string() + "': ";
  internal::check_is_archive(path, title);
  std::map<std::string, Tensor> tensors;
  internal::Problems problems;
  try {
    caffe2::serialize::PyTorchStreamReader archive(path.string());
    TORCH_CHECK(archive.hasRecord("data.pkl"), "it must be written by torch.save, but has no data.pkl");
    if (archive.hasRecord("byteorder")) {
      const auto [order, size] = archive.getRecord("byteorder");
      TORCH_CHECK(std::string_view(static_cast<const char*>(order.get()), size) == "little",
                  "it must be little-endian");
    }
    const auto [pickle, size] = archive.getRecord("data.pkl");
    internal::PickleReader reader(archive);
    const auto& root = reader.read(std::string_view(static_cast<const char*>(pickle.get()), size));
    TORCH_CHECK(root.kind == Kind::dict, "it must hold a dict of tensors, but holds ",
                internal::pickle_kind(root), " (hint: save model.state_dict(), not the model)");
    for (size_t i = 0; i < root.items.size(); i += 2) {
      const auto& key = *root.items[i];
      const auto& value = *root.items[i + 1];
      if (key.kind != Kind::string) {
        problems.add("every name must be a string, but one is " + internal::pickle_kind(key));
      } else if (value.kind != Kind::tensor) {
        problems.add("'" + key.text + "' must be a tensor, but is " + internal::pickle_kind(value));
      } else if (!tensors.emplace(key.text, value.tensor).second) {
        problems.add("'" + key.text + "' is given twice");
      }
    }
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, title, error.what_without_backtrace());
  }
  problems.raise(title.substr(0, title.size() - 2));
  return tensors;
}

}  // namespace peft
