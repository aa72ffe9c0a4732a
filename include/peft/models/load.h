// load: opens a Hugging Face folder of any family of encoders, for the task it was made for or another.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/io/config_json.h"
#include "peft/models/bert.h"
#include "peft/models/deberta_v2.h"
#include "peft/models/encoder.h"
#include "peft/models/encoder_task.h"
#include "peft/models/model_type.h"
#include "peft/models/pretrained.h"
#include "peft/models/roberta.h"

#include <torch/arg.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft::models {

/// What an encoder is for.
enum class Task : std::uint8_t {
  embedding,                ///< the encoder alone
  sequence_classification,  ///< classes of texts, or a regression on them
  token_classification,     ///< classes of tokens
  question_answering,       ///< where in a text the answer is
  masked_lm,                ///< the words under masks
};

/// An encoder of any family, with a head or without. It is used as one of a family's types is: `*model` is
/// the module that `add_adapter`, `save_adapter` and the others take.
///
/// Example:
/// ```
/// const auto options = LoadOptions().task(Task::sequence_classification).labels(3);
/// auto model = peft::models::load("roberta-base", options);
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8), peft::named({"query", "value"}));
/// auto logits = model->forward({ids, {}, mask}).logits;
/// ```
class AnyEncoder {
 public:
  /// From a family's type: `AnyEncoder model = BertModel(config);`
  template <class Impl>
  requires std::is_base_of_v<Encoder, Impl> AnyEncoder(const nn::ModuleHolder<Impl>& model)
      : module_(model.ptr()), encoder_(model.ptr().get()) {}

  EncoderOutput forward(const EncoderInputs& inputs) const { return encoder_->forward(inputs); }
  EncoderOutput operator()(const EncoderInputs& inputs) const { return forward(inputs); }

  nn::Module& operator*() const { return *module_; }
  const AnyEncoder* operator->() const { return this; }
  const std::shared_ptr<nn::Module>& ptr() const { return module_; }
  /// What the model says of itself.
  Encoder& encoder() const { return *encoder_; }
  /// The family's type, or nullptr where it is another: `model.as<BertModelImpl>()`.
  template <class Impl>
  Impl* as() const {
    return dynamic_cast<Impl*>(module_.get());
  }

  // What is asked of modules most.

  void train(bool on = true) const { module_->train(on); }
  void eval() const { module_->eval(); }
  bool is_training() const { return module_->is_training(); }
  void to(torch::Device device, bool non_blocking = false) const { module_->to(device, non_blocking); }
  void to(torch::Dtype dtype, bool non_blocking = false) const { module_->to(dtype, non_blocking); }
  std::vector<Tensor> parameters() const { return module_->parameters(); }
  torch::OrderedDict<std::string, Tensor> named_parameters() const { return module_->named_parameters(); }

 private:
  std::shared_ptr<nn::Module> module_;
  Encoder* encoder_;
};

/// How a folder is opened.
struct LoadOptions {
  /// Without one, that of `architectures` in `config.json`; a pretraining's is `masked_lm`, and where nothing
  /// is said, `embedding`. A head that the folder does not have is drawn as transformers draws it.
  TORCH_ARG(std::optional<Task>, task);
  /// Of the classifier; by default as many as the config says.
  TORCH_ARG(std::optional<int64_t>, labels);
  TORCH_ARG(PretrainedOptions, pretrained);
};

}  // namespace peft::models

namespace peft::internal {

/// What transformers' names of classes end with.
inline const std::vector<std::pair<std::string, models::Task>>& task_names() {
  using models::Task;
  static const std::vector<std::pair<std::string, Task>> names{
      {"ForSequenceClassification", Task::sequence_classification},
      {"ForTokenClassification", Task::token_classification},
      {"ForQuestionAnswering", Task::question_answering},
      {"ForMaskedLM", Task::masked_lm},
      {"ForPreTraining", Task::masked_lm},
      {"Model", Task::embedding}};
  return names;
}

template <class Family>
models::AnyEncoder open_as(models::Task task, const std::filesystem::path& directory,
                           const models::LoadOptions& options) {
  using namespace models;
  const auto& how = options.pretrained();
  switch (task) {
    case Task::sequence_classification:
      return EncoderTaskHolder<ForSequenceClassificationImpl<Family>>::from_pretrained(directory,
                                                                                       options.labels(), how);
    case Task::token_classification:
      return EncoderTaskHolder<ForTokenClassificationImpl<Family>>::from_pretrained(directory,
                                                                                    options.labels(), how);
    case Task::question_answering:
      return EncoderTaskHolder<ForQuestionAnsweringImpl<Family>>::from_pretrained(directory, how);
    case Task::masked_lm:
      return EncoderTaskHolder<ForMaskedLMImpl<Family>>::from_pretrained(directory, how);
    default:
      return Family::Model::from_pretrained(directory, how);
  }
}

/// How a family's folders are opened; `name`: as `model_types` has it.
struct FamilyRow {
  const char* name;
  models::AnyEncoder (*open)(models::Task, const std::filesystem::path&, const models::LoadOptions&);
};

inline const std::vector<FamilyRow>& families() {
  static const std::vector<FamilyRow> rows{
      {"Bert", &open_as<models::BertFamily>},
      {"Roberta", &open_as<models::RobertaFamily>},
      {"DebertaV2", &open_as<models::DebertaV2Family>},
  };
  return rows;
}

/// The task a folder was made for. Complains of a class that no task here is.
inline models::Task folder_task(ConfigReader& reader) {
  if (!reader.has("architectures")) return models::Task::embedding;
  const auto& classes = reader.json()["architectures"];
  if (classes.is_array() && classes.empty()) return models::Task::embedding;
  const bool one = classes.is_array() && classes.front().is_string();
  const auto name = one ? classes.front().get<std::string>() : std::string();
  std::string known;
  for (const auto& [end, task] : task_names()) {
    const bool has_head = task == models::Task::embedding && name.ends_with("HeadModel");
    if (name.ends_with(end) && !has_head) return task;
    known += (known.empty() ? "…" : ", …") + end;
  }
  reader.complain("architectures", "must be one of " + known, "LoadOptions::task says which to open instead");
  return models::Task::embedding;
}

}  // namespace peft::internal

namespace peft::models {

/// Opens a Hugging Face folder: `model_type` in its `config.json` says the family, `architectures` the task,
/// unless `options` do. The model is frozen and in evaluation mode; call `train()` before training an adapter
/// with dropout.
///
/// Throws: c10::ValueError for a family or a class that is not known, with those that are; for labels of a
/// task without any; what PretrainedFolder, the config's `read` and load_pretrained throw.
inline AnyEncoder load(const std::filesystem::path& directory, const LoadOptions& options = {}) {
  ConfigReader reader(PretrainedFolder(directory).config_path());
  const auto type = reader.string("model_type", "");
  std::string known;
  const peft::internal::FamilyRow* found = nullptr;
  for (const auto& family : peft::internal::families()) {
    for (const auto& name : peft::internal::model_types_of(family.name)) {
      known += (known.empty() ? "\"" : ", \"") + name + "\"";
      if (name == type) found = &family;
    }
  }
  if (!found) {
    const auto other = peft::internal::family_name(type);
    reader.complain("model_type", "must be one of " + known,
                    other.empty() ? "" : "peft::models::" + other + "Model opens this folder");
    reader.finish();
  }
  const auto task = options.task() ? *options.task() : peft::internal::folder_task(reader);
  reader.finish();
  const bool has_labels = task == Task::sequence_classification || task == Task::token_classification;
  TORCH_CHECK_VALUE(has_labels || !options.labels(),
                    "load: labels are for classifiers of texts or tokens, but '", directory.string(),
                    "' is opened for another task, and got ", options.labels().value_or(0),
                    " (hint: LoadOptions::task)");
  return found->open(task, directory, options);
}

}  // namespace peft::models
