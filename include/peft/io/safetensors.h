// safetensors: a strict, memory-mapped reader and an atomic writer of safetensors files.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/io/atomic_file.h"
#include "peft/io/file_bytes.h"
#include "peft/io/safetensors_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

static_assert(std::endian::native == std::endian::little,
              "peft: safetensors files need a little-endian machine");

/// A safetensors file open for reading. The header is checked in full before any data is touched: a file
/// whose names, shapes, types and ranges do not describe its data exactly, byte for byte, is refused.
///
/// Tensors are views of the mapped file, which stays mapped as long as one of them lives. Writing to
/// such a tensor copies the pages it touches and leaves the file as it is. The file must not be changed in
/// place meanwhile; AtomicFile, which replaces files, is safe.
///
/// Throws: c10::Error naming the file, and every tensor at fault.
///
/// Example:
/// ```
/// peft::SafetensorsFile file("model.safetensors");
/// for (const auto& name : file.names()) std::cout << name << ' ' << file.tensor(name).sizes() << '\n';
/// ```
class SafetensorsFile {
 public:
  /// What the file says of one tensor. `begin` and `end` count bytes from the start of the data.
  struct Entry {
    torch::ScalarType dtype = torch::ScalarType::Undefined;  ///< Undefined when `tensor()` cannot give it
    std::vector<int64_t> shape;
    size_t begin = 0, end = 0;
    std::string dtype_name;  ///< as in the file: "BF16"
  };

  /// Opens a file. With `map` false it is read into memory of its own, whose tensors may be written to.
  explicit SafetensorsFile(const std::filesystem::path& path, bool map = true)
      : path_(path.string()), bytes_(std::make_shared<internal::FileBytes>(path, map)) {
    read_header();
  }

  /// The file's own notes; Hugging Face writes {"format": "pt"}.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// The tensors' names in the order their data lies in the file.
  const std::vector<std::string>& names() const { return names_; }

  bool contains(const std::string& name) const { return entries_.count(name) > 0; }

  const Entry& entry(const std::string& name) const {
    const auto found = entries_.find(name);
    TORCH_CHECK_VALUE(found != entries_.end(), "SafetensorsFile: '", path_, "' has no tensor '", name,
                      "'; closest: ", internal::closest(name, names_));
    return found->second;
  }

  /// One tensor: a view of the file, or a copy where the data does not lie at a multiple of its element's
  /// size.
  Tensor tensor(const std::string& name) const {
    const Entry& found = entry(name);
    TORCH_CHECK(found.dtype != torch::ScalarType::Undefined, "SafetensorsFile: '", path_, "': dtype ",
                found.dtype_name, " of tensor '", name,
                "' is not supported (hint: convert it to F32, F16, BF16 or an integer type)");
    const auto options = torch::TensorOptions().dtype(found.dtype);
    if (found.begin == found.end) return torch::empty(found.shape, options);
    // from_blob has no form for memory that may not be written; the class comment passes the duty on.
    char* data = const_cast<char*>(data_ + found.begin);
    if (reinterpret_cast<std::uintptr_t>(data) % c10::elementSize(found.dtype) != 0) {
      Tensor copy = torch::empty(found.shape, options);
      std::memcpy(copy.data_ptr(), data, found.end - found.begin);
      return copy;
    }
    return torch::from_blob(
        data, found.shape, [bytes = bytes_](void*) {}, options);
  }

 private:
  void read_header() {
    const std::string title = "SafetensorsFile: '" + path_ + "' is not a valid safetensors file";
    const size_t size = bytes_->size();
    TORCH_CHECK(size >= 8, title, ": it has ", size, " bytes, but needs at least 8");
    uint64_t length = 0;
    std::memcpy(&length, bytes_->data(), 8);
    constexpr uint64_t most = 100'000'000;
    TORCH_CHECK(length <= most, title, ": its header must have at most ", most, " bytes, but has ", length);
    TORCH_CHECK(length <= size - 8, title, ": its header has ", length, " bytes, but only ", size - 8,
                " follow (hint: was the download cut short?)");
    std::string_view header(bytes_->data() + 8, static_cast<size_t>(length));
    TORCH_CHECK(header.starts_with('{'), title, ": its header must start with '{'");
    // The parser takes a NUL for the end and would not look behind it.
    TORCH_CHECK(header.find('\0') == std::string_view::npos, title,
                ": invalid JSON: the header has a NUL byte");
    // npos + 1 is 0 and leaves the error to the parser.
    header = header.substr(0, header.find_last_not_of(' ') + 1);
    TORCH_CHECK(header.ends_with('}'), title, ": its header must end with '}' and spaces");

    internal::SafetensorsHeaderParser parser;
    const bool parsed = nlohmann::json::sax_parse(header.begin(), header.end(), &parser);
    TORCH_CHECK(parsed, title, ": ", parser.problem);
    metadata_ = std::move(parser.metadata);
    data_ = bytes_->data() + 8 + length;
    check_entries(parser.entries, size - 8 - static_cast<size_t>(length), title);
  }

  void check_entries(std::vector<internal::SafetensorsEntry>& entries, size_t data_size,
                     const std::string& title) {
    using internal::SafetensorsEntry;
    std::sort(entries.begin(), entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
      return std::tie(a.offsets, a.name) < std::tie(b.offsets, b.name);
    });
    internal::Problems problems;
    uint64_t covered = 0;
    for (auto& raw : entries) {
      const std::string where = "'" + raw.name + "': ";
      const uint64_t begin = raw.offsets[0], end = raw.offsets[1];
      const std::string range = "bytes " + std::to_string(begin) + " to " + std::to_string(end);
      const auto* dtype =
          std::find_if(internal::safetensors_dtypes.begin(), internal::safetensors_dtypes.end(),
                       [&](const auto& known) { return known.name == raw.dtype; });
      Entry entry;
      const auto bits = dtype == internal::safetensors_dtypes.end()
                            ? std::nullopt
                            : checked_bits(raw.shape, dtype->bits, entry.shape);
      if (dtype == internal::safetensors_dtypes.end()) {
        problems.add(where + "its dtype must be one of the format's, but it is '" + raw.dtype + "'");
      } else if (!bits) {
        problems.add(where + "the shape " + internal::shape_text(raw.shape) + " is too large");
      } else if (end < begin || end > data_size) {
        problems.add(where + range + " lie outside the " + std::to_string(data_size) + " bytes of data");
      } else if (*bits % 8 != 0 || end - begin != static_cast<uint64_t>(*bits / 8)) {
        problems.add(where + raw.dtype + " " + internal::shape_text(raw.shape) + " needs " +
                     std::to_string((*bits + 7) / 8) + " bytes, but has " + std::to_string(end - begin));
      } else if (begin != covered) {
        problems.add(where + range + (begin > covered ? " follow a hole" : " overlap another tensor's"));
      }
      if (end >= begin) covered = std::max(covered, end);
      if (dtype != internal::safetensors_dtypes.end()) entry.dtype = dtype->type;
      entry.begin = static_cast<size_t>(begin);
      entry.end = static_cast<size_t>(end);
      entry.dtype_name = raw.dtype;
      names_.push_back(raw.name);
      entries_.emplace(raw.name, std::move(entry));
    }
    if (problems.empty() && covered != data_size) {
      problems.add("its tensors cover " + std::to_string(covered) + " bytes of data, but it has " +
                   std::to_string(data_size));
    }
    problems.raise(title);
  }

  static std::optional<int64_t> checked_bits(const std::vector<uint64_t>& sizes, int64_t bits,
                                             std::vector<int64_t>& shape) {
    for (const uint64_t size : sizes) {
      if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      shape.push_back(static_cast<int64_t>(size));
    }
    auto factors = shape;
    factors.push_back(bits);
    return internal::checked_product(factors);
  }

  std::string path_;
  std::shared_ptr<const internal::FileBytes> bytes_;
  const char* data_ = nullptr;
  std::map<std::string, std::string> metadata_;
  std::vector<std::string> names_;
  std::map<std::string, Entry> entries_;
};

/// Every tensor of a file, as `SafetensorsFile::tensor` gives them: views of the mapped file.
inline std::map<std::string, Tensor> load_safetensors(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  std::map<std::string, Tensor> tensors;
  for (const auto& name : file.names()) tensors.emplace(name, file.tensor(name));
  return tensors;
}

namespace internal {

/// `"text"`, as JSON. Throws where the text is no UTF-8.
inline std::string json_string(const std::string& text) {
  std::string json;
  try {
    json = nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    TORCH_CHECK_VALUE(false, "save_safetensors: names and metadata must be UTF-8, but got '", text, "'");
  }
  return json;
}

}  // namespace internal

/// Writes tensors to a safetensors file, byte for byte as Python's writer does: through AtomicFile, so that
/// the file is complete or absent. Tensors on other devices or with gaps are copied one at a time.
///
/// `metadata`: the file's own notes; {"format": "pt"}, which transformers asks for, is added unless given.
///
/// Throws: c10::ValueError, before anything is written, listing names that are given twice or are not UTF-8
/// and tensors the format or this library does not have.
///
/// Example:
/// ```
/// peft::save_safetensors("out.safetensors", {{"weight", layer->weight}, {"bias", layer->bias}});
/// ```
inline void save_safetensors(const std::filesystem::path& path,
                             const std::vector<std::pair<std::string, Tensor>>& tensors,
                             std::map<std::string, std::string> metadata = {}) {
  using internal::safetensors_dtypes;
  const std::string title = "save_safetensors: '" + path.string() + "' was not written";
  struct Item {
    const std::string* name;
    const Tensor* tensor;
    const internal::SafetensorsDtype* dtype;
  };
  std::vector<Item> items;
  internal::Problems problems;
  for (const auto& pair : tensors) {
    const std::string& name = pair.first;
    const Tensor& tensor = pair.second;
    const auto complain = [&](const std::string& text) { problems.add("'" + name + "' " + text); };
    if (name == "__metadata__") {
      complain("must not be a tensor's name: the format keeps it for itself");
    } else if (!tensor.defined()) {
      complain("must be defined");
    } else if (tensor.layout() != torch::kStrided || tensor.is_quantized() || tensor.is_meta()) {
      complain("must be dense and have data");
    } else {
      const auto* dtype = std::find_if(safetensors_dtypes.begin(), safetensors_dtypes.end(),
                                       [&](const auto& known) { return known.type == tensor.scalar_type(); });
      if (dtype == safetensors_dtypes.end()) {
        complain(std::string("has dtype ") + c10::toString(tensor.scalar_type()) +
                 ", which is not supported");
      } else {
        items.push_back({&name, &tensor, dtype});
      }
    }
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.dtype != b.dtype ? a.dtype > b.dtype : *a.name < *b.name;
  });
  std::map<std::string, int> counts;
  for (const auto& pair : tensors) {
    if (++counts[pair.first] == 2) problems.add("'" + pair.first + "' is given twice");
  }
  problems.raise(title);

  metadata.emplace("format", "pt");
  std::string header = "{\"__metadata__\":{";
  for (const auto& [key, value] : metadata) {
    if (header.back() != '{') header += ',';
    header += internal::json_string(key) + ":" + internal::json_string(value);
  }
  header += "}";
  size_t offset = 0;
  for (const auto& item : items) {
    const size_t end = offset + item.tensor->nbytes();
    header += "," + internal::json_string(*item.name) + ":{\"dtype\":\"" + std::string(item.dtype->name) +
              "\",\"shape\":" + nlohmann::json(item.tensor->sizes().vec()).dump() + ",\"data_offsets\":[" +
              std::to_string(offset) + "," + std::to_string(end) + "]}";
    offset = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');

  AtomicFile file(path);
  const uint64_t length = header.size();
  file.write(&length, sizeof length);
  std::vector<std::string_view> parts{header};
  for (const auto& item : items) {
    const Tensor data = item.tensor->detach().resolve_neg().to(torch::kCPU).contiguous();
    parts.emplace_back(static_cast<const char*>(data.data_ptr()), data.nbytes());
    if (data.is_alias_of(*item.tensor)) continue;
    file.write(parts);  // before the copy goes
    parts.clear();
  }
  file.write(parts);
  file.commit();
}

/// The same for a map, such as `load_safetensors` gives. (A template, so that a braced list means the form
/// above.)
template <class Order>
void save_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor, Order>& tensors,
                      std::map<std::string, std::string> metadata = {}) {
  save_safetensors(path, std::vector<std::pair<std::string, Tensor>>(tensors.begin(), tensors.end()),
                   std::move(metadata));
}

}  // namespace peft
