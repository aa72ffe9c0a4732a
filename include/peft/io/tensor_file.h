// TensorFile: the tensors of an adapter's folder, from safetensors or from the pickle older programs wrote.
#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/pickle.h"
#include "peft/io/safetensors.h"
#include "peft/kernels/is_finite.h"

namespace peft::internal {

/// What a file of tensors holds.
struct TensorFile {
  struct Item {
    std::string key;
    Tensor tensor;  ///< of the file's shape alone, where LibTorch has not its type
    std::string dtype;
  };
  std::string name;  ///< of the file; empty where there is none
  std::vector<Item> items;
  bool readable = true;
};

/// Reads the file `safe_name` of a folder, or without one the pickle `pickle_name`. What is wrong is added to
/// `problems`.
inline TensorFile read_tensor_file(const std::filesystem::path& directory, const std::string& safe_name,
                                   const std::string& pickle_name, Problems& problems) {
  TensorFile result;
  std::error_code ignored;
  try {
    if (std::filesystem::exists(directory / safe_name, ignored)) {
      result.name = safe_name;
      const SafetensorsFile file(directory / safe_name);
      for (const auto& key : file.names()) {
        const auto& entry = file.entry(key);
        const bool known = entry.dtype != torch::ScalarType::Undefined;
        result.items.push_back({key, known ? file.tensor(key) : torch::empty(entry.shape), entry.dtype_name});
      }
    } else if (std::filesystem::exists(directory / pickle_name, ignored)) {
      result.name = pickle_name;
      for (const auto& [key, tensor] : load_pickle(directory / pickle_name)) {
        result.items.push_back({key, tensor, c10::toString(tensor.scalar_type())});
      }
    } else {
      result.readable = false;
      problems.add(safe_name + " is missing, and there is no " + pickle_name);
    }
  } catch (const c10::Error& error) {
    result.readable = false;
    problems.add(error.what_without_backtrace());
  }
  return result;
}

/// True for the types of values, as either kind of file names them.
inline bool is_floating(const std::string& dtype) {
  static const std::set<std::string> floating{"F32",   "F16",  "BF16",     "F64",
                                              "Float", "Half", "BFloat16", "Double"};
  return floating.count(dtype) > 0;
}
inline std::string not_floating(const std::string& file, const std::string& key, const std::string& dtype) {
  return file + ": '" + key + "' expected F32, F16, BF16 or F64 values, but got " + dtype;
}

/// Keys of the tensors that hold NaN or infinity; `items`: of maps to things with a key and a tensor.
template <class Items>
std::vector<std::string> not_finite(const Items& items) {
  std::vector<std::string> keys;
  for (const auto& [meant, item] : items) {
    if (!is_finite(item.tensor)) keys.push_back(item.key);
  }
  return keys;
}

}  // namespace peft::internal
