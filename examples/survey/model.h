// SurveyModel: the model that the methods are put on, whatever its family.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "peft/models/load.h"

namespace survey {

using torch::Tensor;

/// A frozen classifier of texts.
struct SurveyModel {
  peft::models::AnyEncoder encoder;
  int64_t words;

  peft::models::EncoderOutput forward(const peft::models::EncoderInputs& inputs) const {
    return encoder.forward(inputs);
  }
  torch::nn::Module& module() const { return *encoder; }
  /// Paths of the task head's modules.
  std::vector<std::string> heads() const { return encoder.encoder().head(); }
  /// transformers' `model_type`.
  std::string type() const { return encoder.encoder().describe().model_type; }
  /// Random tokens. Shapes: (batch, length).
  peft::models::EncoderInputs inputs(int64_t batch, int64_t length) const {
    peft::models::EncoderInputs inputs;
    const auto first = std::min<int64_t>(words / 2, 1000);  // special tokens lie below
    inputs.input_ids = torch::randint(first, words, {batch, length}, torch::kLong);
    return inputs;
  }
};

/// The folder's own name, without the way to it.
inline std::string model_name(const std::filesystem::path& folder) {
  const auto path = std::filesystem::absolute(folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

/// Opens a Hugging Face folder; a head it does not have is drawn. Throws: what `peft::models::load` throws.
inline SurveyModel open_model(const std::filesystem::path& folder) {
  const auto options = peft::models::PretrainedOptions()
                           .dtype(torch::kFloat32)
                           .name_or_path(model_name(folder))
                           .note([](const std::string&) {});
  const auto model = peft::models::load(
      folder,
      peft::models::LoadOptions().task(peft::models::Task::sequence_classification).pretrained(options));
  int64_t words = 0;
  for (const auto& item : model.named_parameters()) {
    if (item.key().ends_with("embeddings.word_embeddings.weight")) words = item.value().size(0);
  }
  TORCH_CHECK(words > 0, "'", folder.string(), "' must hold an encoder of texts, but has no word_embeddings");
  return {model, words};
}

}  // namespace survey
