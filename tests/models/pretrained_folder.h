// What the tests of pretrained models share: the tensors and the folder of a model, and what loading one
// says.
#pragma once

#include "io/temporary_folder.h"
#include "peft/io/safetensors.h"
#include "peft/models/pretrained.h"

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace peft_test {

using peft::models::PretrainedOptions;
using torch::Tensor;
using Json = nlohmann::ordered_json;
using Tensors = std::map<std::string, Tensor>;

inline Tensors tensors_of(const torch::nn::Module& model) {
  Tensors tensors;
  for (const auto& item : model.named_parameters())
    tensors.emplace(item.key(), item.value().detach().clone());
  return tensors;
}

inline void write_pretrained(const std::filesystem::path& folder, const Tensors& tensors,
                             const Json& config) {
  std::filesystem::create_directories(folder);
  peft::save_safetensors(folder / "model.safetensors", tensors);
  write_bytes(folder / "config.json", config.dump());
}

inline double difference(const Tensor& a, const Tensor& b) {
  return (a.to(torch::kFloat64).reshape(-1) - b.to(torch::kFloat64).reshape(-1)).abs().max().item<double>();
}

/// What a call complains of, or an empty string.
template <class Call>
std::string complaint(const Call& call) {
  try {
    call();
    return {};
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

inline PretrainedOptions noting(std::vector<std::string>& notes) {
  return PretrainedOptions().note([&notes](const std::string& line) { notes.push_back(line); });
}

}  // namespace peft_test
