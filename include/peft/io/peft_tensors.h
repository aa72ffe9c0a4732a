// PEFT tensors: the names an adapter's tensors have on disk, and reading the file that holds them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/peft_format.h"
#include "peft/io/peft_places.h"
#include "peft/io/peft_second_names.h"
#include "peft/io/tensor_file.h"
#include "peft/methods/bias.h"
#include "peft/methods/replace.h"

namespace peft::internal {

inline constexpr const char* tensor_file_name = "adapter_model.safetensors";
inline constexpr const char* pickle_file_name = "adapter_model.bin";

/// Every tensor of some pieces under its key in the file: those of layers, then those no layer owns. Pieces
/// without a form on disk have none. `loading`: values will be copied into them.
inline std::vector<DiskTensor> keyed_tensors(const Entries& entries, const PeftFormat* format,
                                             bool loading = false) {
  Entries owned;
  if (format) {
    std::copy_if(entries.begin(), entries.end(), std::back_inserter(owned),
                 [&](const Adapter::Entry& entry) { return format->owns(*entry.piece); });
  }
  const PeftPlaces places(owned);
  std::vector<DiskTensor> keyed;
  for (const auto& entry : entries) {
    const auto info = entry.site->info();
    if (format && format->owns(*entry.piece)) {
      const auto prefix = places.method_prefix(info);
      for (auto& [name, tensor] :
           loading ? format->loaded_tensors(*entry.piece) : format->written_tensors(entry, owned))
        keyed.push_back({prefix + name, tensor});
    } else if (const auto* bias = dynamic_cast<const BiasImpl*>(entry.piece.get())) {
      keyed.push_back({places.own_key(info, /*bias=*/true), bias->bias});
    } else if (const auto* replace = dynamic_cast<const ReplaceImpl*>(entry.piece.get())) {
      keyed.push_back({places.own_key(info, /*bias=*/false), replace->weight});
      if (replace->bias.defined()) keyed.push_back({places.own_key(info, /*bias=*/true), replace->bias});
    }
  }
  if (owned.empty()) return keyed;
  if (!format->wraps_layers()) {
    for (auto& tensor : keyed) tensor.name = "base_model." + tensor.name.substr(model_prefix.size());
  }
  for (auto& tensor : format->shared_tensors(owned)) keyed.push_back(std::move(tensor));
  return keyed;
}

/// The tensors of an adapter's directory.
class AdapterTensors {
 public:
  /// Reads `adapter_model.safetensors`, or without one `adapter_model.bin`. `names`: the adapter's possible
  /// names, which some files keep in their keys.
  AdapterTensors(const std::filesystem::path& directory, std::vector<std::string> names, Problems& problems)
      : names_(std::move(names)), problems_(problems) {
    const auto file = read_tensor_file(directory, tensor_file_name, pickle_file_name, problems_);
    file_ = file.name;
    readable_ = file.readable;
    for (const auto& [key, tensor, dtype] : file.items) add(key, tensor, dtype);
  }

  bool readable() const { return readable_; }
  const std::string& file() const { return file_; }
  /// Whether it holds the bias of a module, trained beside the method's tensors.
  bool has_bias(const std::string& path) const {
    return tensors_.count(std::string(model_prefix) + path + ".bias") > 0;
  }

  /// Checks that the file holds the `expected` tensors and no others. `repeated`: tensors of the base that it
  /// may hold too, with the base's values. Everything that is wrong is added to the problems.
  /// `format`: the method's, which may know older names. `second_names`: the base's.
  void check(const std::vector<DiskTensor>& expected, const std::map<std::string, Tensor>& repeated,
             const PeftFormat* format, const std::vector<SecondName>& second_names) {
    std::set<std::string> keys;
    for (const auto& [key, tensor] : expected) keys.insert(key);
    settle_names(keys, format);
    for (const auto& names : second_names) settle_second_name(keys, names);
    for (const auto& [key, tensor] : expected) {
      const auto found = tensors_.find(key);
      if (found == tensors_.end()) {
        complain(key, "expected " + shape_text(tensor.sizes()) + ", but it is missing" + shifted_hint(key));
      } else if (found->second.tensor.sizes() != tensor.sizes()) {
        complain(key, "expected " + shape_text(tensor.sizes()) + ", but got " +
                          shape_text(found->second.tensor.sizes()) + " (hint: other rank or base model?)");
      } else if (!tensor.is_floating_point() && found->second.tensor.is_floating_point()) {
        complain(key, "expected I32 or I64 values, but got others");
      }
      if (tensor.is_floating_point()) check_floating(key);
    }
    for (const auto& [key, item] : tensors_) {
      if (keys.count(key) || is_read_past(key)) continue;
      check_floating(key);
      const auto base = repeated.find(key);
      if (base == repeated.end()) {
        complain(key, "expected no such tensor, but got " + shape_text(item.tensor.sizes()));
      } else if (base->second.sizes() != item.tensor.sizes() ||
                 !base->second.equal(item.tensor.to(base->second.options()))) {
        complain(key,
                 "expected the base's own values, but got others (hint: a resized or trained embedding)");
      }
    }
  }

  /// Copies the values, rounded or widened to the adapter's types. After `check`.
  void copy_into(const std::vector<DiskTensor>& tensors) const {
    torch::NoGradGuard no_grad;
    for (const auto& [key, tensor] : tensors) Tensor(tensor).copy_(tensors_.at(key).tensor);
  }

  /// Keys of tensors that hold NaN or infinity.
  std::vector<std::string> not_finite() const { return internal::not_finite(tensors_); }

 private:
  struct Item {
    std::string key;  ///< in the file
    Tensor tensor;
    std::string integer;  ///< the file's name of its type, of integers
  };

  void check_floating(const std::string& key) {
    const auto found = tensors_.find(key);
    if (found == tensors_.end() || found->second.integer.empty()) return;
    problems_.add(not_floating(file_, found->second.key, found->second.integer));
  }

  void add(const std::string& key, const Tensor& tensor, const std::string& dtype) {
    // Which a few methods have: `check` knows whether this one has them here.
    static const std::set<std::string> integers{"I32", "I64", "Int", "Long"};
    if (!is_floating(dtype) && !integers.count(dtype)) problems_.add(not_floating(file_, key, dtype));
    const auto whole = key.starts_with("base_model.") ? key : std::string(model_prefix) + key;
    const auto integer = integers.count(dtype) ? dtype : "";
    if (!tensors_.emplace(whole, Item{key, tensor, integer}).second) {
      problems_.add(file_ + ": '" + inner(whole) + "' is there twice, with and without '" +
                    std::string(model_prefix) + "'");
    }
  }

  static std::string inner(const std::string& key) {
    return key.starts_with(model_prefix) ? key.substr(model_prefix.size()) : key;
  }

  /// `q.lora_A.default.weight` is `q.lora_A.weight` of the adapter "default".
  void settle_names(const std::set<std::string>& expected, const PeftFormat* format) {
    std::map<std::string, Item> settled;
    for (auto& [key, item] : tensors_) {
      auto plain = key;
      const auto attempt = [&](const std::string& other) {
        const auto current = format ? format->current_key(other) : other;
        if (expected.count(current) && !tensors_.count(current)) plain = current;
      };
      if (!expected.count(key)) {
        attempt(key);
        for (const auto& name : names_) attempt(without_name(key, name));
      }
      const auto [at, is_new] = settled.emplace(plain, item);
      if (!is_new)
        problems_.add(file_ + ": '" + at->second.key + "' and '" + item.key + "' are both '" + inner(plain) +
                      "', of two adapters?");
    }
    tensors_ = std::move(settled);
  }
  static std::string without_name(const std::string& key, const std::string& name) {
    if (key.ends_with("." + name)) return key.substr(0, key.size() - name.size() - 1);
    const auto last = key.rfind('.');
    if (last == std::string::npos || !key.substr(0, last).ends_with("." + name)) return key;
    return key.substr(0, last - name.size() - 1) + key.substr(last);
  }

  /// What the file has under a second name gets the tensor's own.
  void settle_second_name(const std::set<std::string>& expected, const SecondName& names) {
    const bool one = names.kind != SecondName::Kind::unused;
    for (const auto& key : expected) {
      const auto second = tensors_.find(second_key(key, names));
      if (second == tensors_.end()) continue;
      const auto own = tensors_.find(key);
      if (own == tensors_.end() && !one) continue;
      if (own == tensors_.end()) {
        tensors_.emplace(key, second->second);
      } else if (const auto& a = own->second.tensor, &b = second->second.tensor;
                 one && (a.sizes() != b.sizes() || !a.equal(b.to(a.scalar_type())))) {
        problems_.add(file_ + ": '" + second->second.key + "' and '" + own->second.key +
                      "' are one tensor of the base and must be equal, but differ");
      }
      tensors_.erase(second);
    }
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
      if (!other.ends_with("." + inner(key)) && !key.ends_with("." + inner(other))) continue;
      return " (hint: the file has '" + item.key + "', as for a model with another prefix)";
    }
    return {};
  }
  void complain(const std::string& key, const std::string& text) {
    const auto found = tensors_.find(key);
    problems_.add(file_ + ": '" + (found == tensors_.end() ? key : found->second.key) + "' " + text);
  }

  std::vector<std::string> names_;
  Problems& problems_;
  std::map<std::string, Item> tensors_;
  std::string file_;
  bool readable_ = true;
};

}  // namespace peft::internal
