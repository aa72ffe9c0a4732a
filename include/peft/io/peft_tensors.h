// PEFT tensors: the names an adapter's tensors have on disk, and reading the file that holds them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/problems.h"
#include "peft/io/pickle.h"
#include "peft/io/safetensors.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"

namespace peft::internal {

/// A tensor as it is on disk: its name after the layer's path, and its values.
struct DiskTensor {
  std::string suffix;
  Tensor tensor;
};

// One function a piece type: tensor → suffix on disk. `wrapped`: a LoRA of the same adapter sits on the
// layer, so that what belongs to the layer itself is one level down in Python.

inline std::vector<DiskTensor> disk_form(const LoraImpl& piece, bool) {
  // Several blocks of rows, each with factors of its own, are in Python one LoRA with a block-diagonal B.
  const auto B = piece.full_B();
  if (piece.site().lookup) return {{"lora_embedding_A", piece.lora_A}, {"lora_embedding_B", B}};
  std::vector<DiskTensor> tensors{{"lora_A.weight", piece.lora_A}, {"lora_B.weight", B}};
  if (piece.lora_B_bias.defined()) tensors.push_back({"lora_B.bias", piece.lora_B_bias});
  return tensors;
}

inline std::vector<DiskTensor> disk_form(const BiasImpl& piece, bool wrapped) {
  return {{wrapped ? "base_layer.bias" : "bias", piece.bias}};
}

inline std::vector<DiskTensor> disk_form(const ReplaceImpl& piece, bool wrapped) {
  const std::string level = wrapped ? "base_layer." : "";
  std::vector<DiskTensor> tensors{{level + "weight", piece.weight}};
  if (piece.bias.defined()) tensors.push_back({level + "bias", piece.bias});
  return tensors;
}

/// The table's rows in turn, until one is the piece's type.
template <class... Types>
std::vector<DiskTensor> disk_form_among(const PieceImpl& piece, bool wrapped) {
  std::vector<DiskTensor> tensors;
  const auto attempt = [&]<class Type>(const Type*) {
    if (const auto* typed = dynamic_cast<const Type*>(&piece)) tensors = disk_form(*typed, wrapped);
  };
  (attempt(static_cast<const Types*>(nullptr)), ...);
  return tensors;
}

inline std::vector<DiskTensor> disk_tensors(const PieceImpl& piece, bool wrapped) {
  return disk_form_among<LoraImpl, BiasImpl, ReplaceImpl>(piece, wrapped);
}

/// Every tensor of some pieces under its key: the path, a dot, the suffix. Pieces without a form on disk have
/// none.
inline std::vector<std::pair<std::string, Tensor>> keyed_tensors(const std::vector<Adapter::Entry>& entries) {
  std::set<const SiteImpl*> wrapped;
  for (const auto& entry : entries) {
    if (std::dynamic_pointer_cast<LoraImpl>(entry.piece)) wrapped.insert(entry.site.get());
  }
  std::vector<std::pair<std::string, Tensor>> keyed;
  for (const auto& entry : entries) {
    const auto prefix = entry.site->path().empty() ? "" : entry.site->path() + ".";
    for (auto& [suffix, tensor] : disk_tensors(*entry.piece, wrapped.count(entry.site.get()) > 0)) {
      keyed.emplace_back(prefix + suffix, tensor);
    }
  }
  return keyed;
}

inline constexpr const char* tensor_file_name = "adapter_model.safetensors";
inline constexpr const char* pickle_file_name = "adapter_model.bin";
/// What Python's wrapper puts before every path of the model.
inline constexpr std::string_view model_prefix = "base_model.model.";

/// The tensors of an adapter's directory.
class AdapterTensors {
 public:
  /// Reads `adapter_model.safetensors`, or without one `adapter_model.bin`. `names`: the adapter's possible
  /// names, which some files keep in their keys.
  AdapterTensors(const std::filesystem::path& directory, std::vector<std::string> names, Problems& problems)
      : names_(std::move(names)), problems_(problems) {
    std::error_code ignored;
    try {
      if (std::filesystem::exists(directory / tensor_file_name, ignored)) {
        file_ = tensor_file_name;
        read(SafetensorsFile(directory / tensor_file_name));
      } else if (std::filesystem::exists(directory / pickle_file_name, ignored)) {
        file_ = pickle_file_name;
        for (const auto& [key, tensor] : load_pickle(directory / pickle_file_name)) {
          add(key, tensor, c10::toString(tensor.scalar_type()));
        }
      } else {
        readable_ = false;
        problems_.add(std::string(tensor_file_name) + " is missing, and there is no " + pickle_file_name);
      }
    } catch (const c10::Error& error) {
      readable_ = false;
      problems_.add(error.what_without_backtrace());
    }
  }

  bool readable() const { return readable_; }
  const std::string& file() const { return file_; }

  /// Checks that the file holds the `expected` tensors and no others. `repeated`: tensors of the base that it
  /// may hold too, with the base's values. Everything that is wrong is added to the problems.
  void check(const std::vector<std::pair<std::string, Tensor>>& expected,
             const std::map<std::string, Tensor>& repeated) {
    std::set<std::string> keys;
    for (const auto& [key, tensor] : expected) keys.insert(key);
    settle_names(keys);
    for (const auto& [key, tensor] : expected) {
      const auto found = tensors_.find(key);
      if (found == tensors_.end()) {
        complain(key, "expected " + shape_text(tensor.sizes()) + ", but it is missing" + shifted_hint(key));
      } else if (found->second.tensor.sizes() != tensor.sizes()) {
        complain(key, "expected " + shape_text(tensor.sizes()) + ", but got " +
                          shape_text(found->second.tensor.sizes()) + " (hint: other rank or base model?)");
      }
    }
    for (const auto& [key, item] : tensors_) {
      if (keys.count(key) || is_read_past(key)) continue;
      const auto base = repeated.find(key);
      if (base == repeated.end()) {
        complain(key,
                 "expected no such tensor, but got " + shape_text(item.tensor.sizes()) +
                     (key.ends_with("lora_magnitude_vector") ? " (hint: DoRA is not supported yet)" : ""));
      } else if (base->second.sizes() != item.tensor.sizes() ||
                 !base->second.equal(item.tensor.to(base->second.options()))) {
        complain(key,
                 "expected the base's own values, but got others (hint: a resized or trained embedding)");
      }
    }
  }

  /// Copies the values, rounded or widened to the adapter's types. After `check`.
  void copy_into(const std::vector<std::pair<std::string, Tensor>>& tensors) const {
    torch::NoGradGuard no_grad;
    for (const auto& [key, tensor] : tensors) Tensor(tensor).copy_(tensors_.at(key).tensor);
  }

  /// Keys of tensors that hold NaN or infinity.
  std::vector<std::string> not_finite() const {
    std::vector<std::string> keys;
    for (const auto& [key, item] : tensors_) {
      if (!item.tensor.isfinite().all().item<bool>()) keys.push_back(item.key);
    }
    return keys;
  }

 private:
  struct Item {
    std::string key;  ///< in the file
    Tensor tensor;
  };

  void read(const SafetensorsFile& file) {
    for (const auto& key : file.names()) {
      const auto& entry = file.entry(key);
      const auto known = entry.dtype != torch::ScalarType::Undefined;
      add(key, known ? file.tensor(key) : torch::empty(entry.shape), entry.dtype_name);
    }
  }

  void add(const std::string& key, const Tensor& tensor, const std::string& dtype) {
    static const std::set<std::string> floating{"F32",   "F16",  "BF16",     "F64",
                                                "Float", "Half", "BFloat16", "Double"};
    if (!floating.count(dtype)) {
      problems_.add(file_ + ": '" + key + "' expected F32, F16, BF16 or F64 values, but got " + dtype);
    }
    const auto inner = key.starts_with(model_prefix) ? key.substr(model_prefix.size()) : key;
    if (!tensors_.emplace(inner, Item{key, tensor}).second) {
      problems_.add(file_ + ": '" + inner + "' is there twice, with and without '" +
                    std::string(model_prefix) + "'");
    }
  }

  /// `q.lora_A.default.weight` is `q.lora_A.weight` of the adapter "default".
  void settle_names(const std::set<std::string>& expected) {
    std::map<std::string, Item> settled;
    for (auto& [key, item] : tensors_) {
      auto plain = key;
      if (!expected.count(key)) {
        for (const auto& name : names_) {
          const auto shorter = without_name(key, name);
          if (expected.count(shorter) && !tensors_.count(shorter)) plain = shorter;
        }
      }
      settled.emplace(plain, item);
    }
    tensors_ = std::move(settled);
  }
  static std::string without_name(const std::string& key, const std::string& name) {
    if (key.ends_with("." + name)) return key.substr(0, key.size() - name.size() - 1);
    const auto last = key.rfind('.');
    if (last == std::string::npos || !key.substr(0, last).ends_with("." + name)) return key;
    return key.substr(0, last - name.size() - 1) + key.substr(last);
  }

  /// Python's copies of what stands elsewhere: of a saved module, in the files of bias = "all".
  bool is_read_past(const std::string& key) const {
    return key.find(".modules_to_save.") != std::string::npos ||
           key.find(".original_module.") != std::string::npos;
  }
  /// Points out a file made for the same model with another wrapper around it: `bert.encoder…` for
  /// `encoder…`.
  std::string shifted_hint(const std::string& key) const {
    for (const auto& [other, item] : tensors_) {
      if (!other.ends_with("." + key) && !key.ends_with("." + other)) continue;
      return " (hint: the file has '" + item.key + "', as for a model with another prefix)";
    }
    return {};
  }
  void complain(const std::string& key, const std::string& text) {
    const auto found = tensors_.find(key);
    problems_.add(file_ + ": '" +
                  (found == tensors_.end() ? std::string(model_prefix) + key : found->second.key) + "' " +
                  text);
  }

  std::vector<std::string> names_;
  Problems& problems_;
  std::map<std::string, Item> tensors_;
  std::string file_;
  bool readable_ = true;
};

}  // namespace peft::internal
