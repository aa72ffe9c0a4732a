// HubFile: the tensors of a file of AdapterHub's, checked against those it is for.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/adapterhub_format.h"
#include "peft/io/tensor_file.h"

namespace peft::internal {

/// One file of tensors: safetensors, or where there is none the pickle Python writes by default.
class HubFile {
 public:
  /// `current`: the key that is meant by one in the file. What is wrong is added to `problems`.
  HubFile(const std::filesystem::path& directory, const std::string& safe_name,
          const std::string& pickle_name, const std::function<std::string(const std::string&)>& current,
          Problems& problems)
      : problems_(problems) {
    const auto file = read_tensor_file(directory, safe_name, pickle_name, problems_);
    file_ = file.name;
    readable_ = file.readable;
    for (const auto& [key, tensor, dtype] : file.items) add(key, current(key), tensor, dtype);
  }

  bool readable() const { return readable_; }
  const std::string& name() const { return file_; }
  /// True if any key holds this text.
  bool mentions(const std::string& text) const {
    for (const auto& [key, item] : tensors_) {
      if (key.find(text) != std::string::npos) return true;
    }
    return false;
  }

  /// Checks that the file holds these tensors and no others.
  void check(const std::vector<HubTensor>& expected) const {
    std::set<std::string> known;
    for (const auto& item : expected) {
      known.insert(item.key);
      known.insert(item.copies.begin(), item.copies.end());
      const auto sizes = item.sizes();
      const auto found = tensors_.find(item.key);
      if (found == tensors_.end()) {
        complain(item.key, "expected " + shape_text(sizes) + ", but it is missing" +
                               (item.hint.empty() ? "" : " (hint: " + item.hint + ")"));
        continue;
      }
      const auto& tensor = found->second.tensor;
      if (tensor.sizes() != c10::IntArrayRef(sizes)) {
        complain(item.key, "expected " + shape_text(sizes) + ", but got " + shape_text(tensor.sizes()) +
                               " (hint: other settings or base model?)");
        continue;
      }
      for (const auto& copy : item.copies) {
        const auto again = tensors_.find(copy);
        const auto type = tensor.scalar_type();
        if (again != tensors_.end() && !again->second.tensor.to(type).equal(tensor)) {
          complain(copy, "expected the values of '" + found->second.key + "', which it repeats");
        }
      }
    }
    for (const auto& [key, item] : tensors_) {
      if (!known.count(key))
        complain(key, "expected no such tensor, but got " + shape_text(item.tensor.sizes()));
    }
  }

  /// Copies the values, rounded or widened to the adapter's types. After `check`.
  void copy_into(const std::vector<HubTensor>& tensors) const {
    const torch::NoGradGuard no_grad;
    for (const auto& item : tensors) {
      const auto& values = tensors_.at(item.key).tensor;
      int64_t row = 0;
      for (auto part : item.parts) {
        part.copy_(item.parts.size() == 1 ? values : values.narrow(0, row, part.size(0)));
        row += part.dim() ? part.size(0) : 0;
      }
    }
  }

  /// Keys of tensors that hold NaN or infinity.
  std::vector<std::string> not_finite() const { return internal::not_finite(tensors_); }

 private:
  struct Item {
    std::string key;  ///< in the file
    Tensor tensor;
  };

  void add(const std::string& key, const std::string& meant, const Tensor& tensor, const std::string& dtype) {
    if (!is_floating(dtype)) problems_.add(not_floating(file_, key, dtype));
    const auto [other, fresh] = tensors_.emplace(meant, Item{key, tensor});
    if (!fresh) problems_.add(file_ + ": '" + key + "' means the same as '" + other->second.key + "'");
  }
  void complain(const std::string& key, const std::string& text) const {
    const auto found = tensors_.find(key);
    problems_.add(file_ + ": '" + (found == tensors_.end() ? key : found->second.key) + "' " + text);
  }

  Problems& problems_;
  std::map<std::string, Item> tensors_;
  std::string file_;
  bool readable_ = true;
};

/// Every tensor under all its keys, as `save_safetensors` takes them.
inline std::vector<std::pair<std::string, Tensor>> written_tensors(const std::vector<HubTensor>& tensors) {
  std::vector<std::pair<std::string, Tensor>> written;
  for (const auto& item : tensors) {
    const auto tensor = item.tensor();
    written.emplace_back(item.key, tensor);
    for (const auto& copy : item.copies) written.emplace_back(copy, tensor);
  }
  return written;
}

}  // namespace peft::internal
