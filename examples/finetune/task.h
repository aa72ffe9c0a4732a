// Task: a base model and its classification head, with or without an adapter, and what is kept of a run.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adapter_form.h"
#include "fusion_folder.h"
#include "method.h"
#include "peft/core/adapter.h"
#include "peft/io/adapterhub.h"
#include "peft/io/peft_directory.h"
#include "peft/io/safetensors.h"
#include "peft/model/add_adapter.h"
#include "peft/models/bert.h"

namespace finetune {

namespace fs = std::filesystem;
using torch::Tensor;

/// What the head sees: the first token's state through the pooler, as transformers' classifiers do it, or the
/// mean of the real tokens' last states.
enum class Pooling { cls, mean };

inline const char* to_string(Pooling pooling) { return pooling == Pooling::cls ? "cls" : "mean"; }

/// What of a run no format of others has a place for, in a file of our own.
struct Settings {
  static constexpr const char* file_name = "peft_finetune.json";

  std::vector<std::string> labels;
  Pooling pooling = Pooling::cls;
  int64_t max_length = 128;

  nlohmann::ordered_json to_json() const {
    return {{"task", "classification"},
            {"labels", labels},
            {"pooling", to_string(pooling)},
            {"max_length", max_length}};
  }

  /// Those of a folder, if it has any. Throws: c10::Error naming the file where it is damaged.
  static std::optional<Settings> read(const fs::path& folder) {
    const auto path = folder / file_name;
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored)) return std::nullopt;
    const auto json = peft::internal::read_json_object(path);
    Settings settings;
    try {
      settings.labels = json.at("labels").get<std::vector<std::string>>();
      settings.max_length = json.at("max_length").get<int64_t>();
      const auto pooling = json.at("pooling").get<std::string>();
      if (pooling != "cls" && pooling != "mean")
        throw std::runtime_error("pooling must be cls or mean, not " + pooling);
      settings.pooling = pooling == "cls" ? Pooling::cls : Pooling::mean;
      if (settings.labels.empty()) throw std::runtime_error("labels must not be empty");
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}: {}", path.string(), error.what()));
    }
    return settings;
  }
};

/// How a base is opened.
struct BaseOptions {
  fs::path folder;
  std::optional<torch::ScalarType> dtype;
  std::optional<double> dropout;
  torch::Device device = torch::kCPU;

  peft::models::PretrainedOptions pretrained() const {
    return peft::models::PretrainedOptions().dtype(dtype).dropout(dropout).name_or_path(folder.string());
  }
};

namespace internal {

/// The head on mean-pooled states, a module so that it can carry a trained copy like any layer.
class PooledHead : public torch::nn::Module {
 public:
  PooledHead(int64_t width, int64_t labels) : torch::nn::Module("PooledHead"), head(width, labels) {
    torch::NoGradGuard no_grad;
    register_module("head", head);
    for (auto& item : head->base_parameters()) item.value().zero_().set_requires_grad(false);
  }
  peft::Linear head;

  /// The base's head, as `Task::save_head` wrote it.
  void read(const fs::path& path) {
    const peft::SafetensorsFile file(path);
    torch::NoGradGuard no_grad;
    for (const auto& item : head->base_parameters()) {
      const auto value = file.tensor(item.key());
      if (value.sizes() != item.value().sizes()) {
        throw std::runtime_error(fmt::format(
            "{}: '{}' expected {}, but got {} (hint: the head of another base?)", path.string(), item.key(),
            peft::internal::shape_text(item.value().sizes()), peft::internal::shape_text(value.sizes())));
      }
      Tensor(item.value()).copy_(value);
    }
  }
};

/// The rows of the head that an adapter's file holds: the number of its labels, if it has one.
inline std::optional<int64_t> labels_in_adapter(const fs::path& folder) {
  for (const auto* tensors : {"adapter_model.safetensors", peft::internal::hub_head_tensors}) {
    std::error_code ignored;
    if (!fs::is_regular_file(folder / tensors, ignored)) continue;
    const peft::SafetensorsFile file(folder / tensors);
    for (const auto& name : file.names()) {
      if (name.ends_with(".classifier.weight") || name == "classifier.weight")
        return file.entry(name).shape.front();
    }
  }
  return std::nullopt;
}

/// Whether an adapter's tensors lie in a model with a task head, so that the encoder's bear its prefix.
inline bool is_for_classifier(const fs::path& folder) {
  if (peft::is_adapterhub(folder) || is_fusion(folder)) return labels_in_adapter(folder).has_value();
  const auto path = folder / "adapter_model.safetensors";
  std::error_code ignored;
  if (fs::is_regular_file(path, ignored)) {
    const peft::SafetensorsFile file(path);
    return std::any_of(file.names().begin(), file.names().end(), [](const std::string& name) {
      return name.starts_with("base_model.model.bert.") || name.starts_with("bert.") ||
             name.find("classifier.") != std::string::npos;
    });
  }
  const auto config = folder / "adapter_config.json";
  return fs::is_regular_file(config, ignored) &&
         peft::internal::read_json_object(config).value("task_type", nlohmann::ordered_json()) == "SEQ_CLS";
}

inline bool has_classifier(const fs::path& folder) {
  const peft::models::PretrainedFolder model(folder);
  return model.tensors().count("classifier.weight") > 0;
}

}  // namespace internal

/// An encoder with or without a head. The adapter, if there is one, is named `adapter_name`; a fusion by
/// those it is made of.
class Task {
 public:
  static constexpr const char* adapter_name = "default";
  static constexpr const char* head_file = "head.safetensors";

  /// A classifier to be trained. With `Pooling::cls` the head is the folder's, or drawn where it has none.
  static Task for_training(const BaseOptions& base, Pooling pooling, int64_t labels) {
    Task task(base);
    task.label_count_ = labels;
    if (pooling == Pooling::cls) {
      task.open_classifier(labels);
    } else {
      task.open_encoder(/*pooler=*/false);
      task.pooled_ = true;
    }
    return task;
  }

  /// The base as it is, or with the adapter of a folder, to be evaluated. `settings`: of the adapter's
  /// folder, else of the model's. Without any head there are no logits.
  static Task for_prediction(const BaseOptions& base, const std::optional<fs::path>& adapter,
                             const std::optional<Settings>& settings, bool trainable = false) {
    Task task(base);
    const bool pooled = settings && settings->pooling == Pooling::mean;
    const bool classifier = adapter && !settings
                                ? internal::is_for_classifier(*adapter)
                                : !pooled && (settings || internal::has_classifier(base.folder));
    if (classifier) {
      std::optional<int64_t> labels;
      if (settings) labels = static_cast<int64_t>(settings->labels.size());
      const auto in_adapter = adapter ? internal::labels_in_adapter(*adapter) : std::nullopt;
      if (!labels) labels = in_adapter;
      task.open_classifier(labels, /*brings_head=*/in_adapter.has_value());
    } else {
      task.open_encoder(std::nullopt);
    }
    if (pooled) {
      task.label_count_ = static_cast<int64_t>(settings->labels.size());
      task.pooled_ = true;
      task.make_head();
      task.head_->read(adapter.value_or(base.folder) / head_file);
    }
    if (adapter) task.load(*adapter, trainable);
    task.finish();
    return task;
  }

  /// Puts a method on the model, and the copy of the head that trains. Draws from the generator as Python
  /// does: the method first, then the head.
  void attach(const Method& method) {
    auto parts = method.parts;
    if (method.head_only() && classifier_)
      parts = {peft::on(peft::ReplaceOptions(), peft::named({"classifier"}))};
    try {
      if (method.fusion) {
        fuse(method);
      } else if (!parts.empty()) {
        adapter_ = peft::add_adapter(*model(), parts, adapter_name);
      }
    } catch (const c10::Error& error) {
      throw std::runtime_error(fmt::format("--method {}: {}", method.name, error.what_without_backtrace()));
    }
    if (pooled_) make_head();
    finish();
    if (pooled_) train_head();
  }

  /// Throws where a method does not fit the model, as `attach` would, and changes nothing.
  void check(const Method& method) const {
    if (method.parts.empty()) return;
    try {
      const auto plan = peft::internal::plan_adapter(*model(), method.parts, adapter_name, /*extends=*/false);
      for (const auto& make_controller : plan.controllers) make_controller();
    } catch (const c10::Error& error) {
      throw std::runtime_error(fmt::format("--method {}: {}", method.text, error.what_without_backtrace()));
    }
  }

  /// Goes on from an adapter on disk: its config says the method, the targets and what else trains.
  void attach(const fs::path& folder) {
    load(folder, /*trainable=*/true);
    if (pooled_) {
      make_head();
      std::error_code ignored;
      if (fs::is_regular_file(folder / head_file, ignored)) head_->read(folder / head_file);
    } else if (!internal::has_classifier(options_.folder) && !internal::labels_in_adapter(folder)) {
      // Nobody has a trained head: the one drawn for the base must train.
      if (internal::is_fusion(folder)) {
        train_classifier();
      } else {
        peft::train_also(*adapter_, *model(), peft::named({"classifier"}));
      }
    }
    finish();
    if (pooled_) train_head();
  }

  /// What carries the adapter: the classifier, or the encoder alone.
  std::shared_ptr<torch::nn::Module> model() const {
    return classifier_ ? std::static_pointer_cast<torch::nn::Module>(classifier_.ptr())
                       : std::static_pointer_cast<torch::nn::Module>(encoder_.ptr());
  }
  /// The adapter on the model; nothing where only a head on pooled states trains.
  const std::optional<peft::Adapter>& adapter() const { return adapter_; }
  /// Everything that trains, the head outside the model too.
  peft::Adapter trained() const {
    const peft::Adapter all(adapter_ ? adapter_->shared_record() : head_adapter_->shared_record());
    for (const auto* part : {&adapter_, &head_adapter_}) {
      if (!*part) continue;
      for (const auto& entry : (*part)->entries()) all.add(entry);
    }
    return all;
  }
  /// Whether a trained tensor's name is the head's.
  static bool is_head(const std::string& name) {
    return name.starts_with("head.") || name.starts_with("classifier.");
  }

  bool has_head() const { return classifier_ || head_; }
  bool has_pooled_head() const { return head_ != nullptr; }
  int64_t labels() const { return label_count_; }
  const peft::models::BertConfig& config() const {
    return classifier_ ? classifier_->config : encoder_->config;
  }
  torch::Device device() const { return options_.device; }

  void train(bool on) {
    model()->train(on);
    if (head_) head_->train(on);
  }
  void gradient_checkpointing(bool on) {
    (classifier_ ? classifier_->base_model : encoder_)->gradient_checkpointing(on);
  }

  peft::models::EncoderOutput encode(const peft::models::EncoderInputs& inputs) {
    auto& encoder = classifier_ ? classifier_->base_model : encoder_;
    return encoder->forward(inputs);
  }
  /// What the head sees of an encoder's output. Shapes: (batch, width).
  Tensor features(const peft::models::EncoderOutput& output,
                  const peft::models::EncoderInputs& inputs) const {
    return classifier_ ? output.pooler_output
                       : peft::models::mean_pool(peft::models::real_tokens(output.last_hidden_state, output),
                                                 inputs.attention_mask);
  }
  /// Shapes: features (batch, width); (batch, labels).
  Tensor logits(const Tensor& features) {
    if (classifier_) return classifier_->classifier->forward(classifier_->dropout->forward(features));
    return head_->head->forward(features.to(torch::kFloat32));
  }
  Tensor logits(const peft::models::EncoderInputs& inputs) {
    const peft::ForwardScope scope;
    return logits(features(encode(inputs), inputs));
  }
  /// The mean over the batch, label −100 left out.
  Tensor loss(const Tensor& logits, const Tensor& labels) const {
    return peft::models::classification_loss(logits, labels, config().problem_type());
  }

  /// Writes adapter, head and settings into a folder that exists; the settings last. Returns what the formats
  /// could not say.
  std::vector<std::string> save(const fs::path& folder, const nlohmann::ordered_json& settings) const {
    std::vector<std::string> notes;
    if (adapter_ && !adapter_->layers<peft::FusionImpl>().empty()) {
      notes = internal::save_fusion(*model(), *adapter_, classifier_ ? head_adapter_ : std::nullopt, folder);
    } else if (adapter_ && in_adapterhub_form(*adapter_)) {
      notes = peft::save_adapterhub(*model(), adapter_name, folder);
    } else if (adapter_) {
      notes = peft::save_adapter(*adapter_, folder);
    }
    save_head(folder);
    peft::write_file(folder / Settings::file_name, settings.dump(2) + "\n");
    return notes;
  }
  /// Writes the head on pooled states, if there is one.
  void save_head(const fs::path& folder) const {
    if (!head_) return;
    std::vector<std::pair<std::string, Tensor>> tensors;
    if (head_adapter_) {
      const auto piece = head_adapter_->layers<peft::ReplaceImpl>().front();
      tensors = {{"weight", piece->weight}, {"bias", piece->bias}};
    } else {
      const auto weights = head_->head->base_weights();
      tensors = {{"weight", weights.weight}, {"bias", weights.bias}};
    }
    peft::save_safetensors(folder / head_file, tensors);
  }

  /// What `load_adapter` had to say.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  explicit Task(BaseOptions options) : options_(std::move(options)) {}

  /// `brings_head`: the adapter will replace the head, so nobody needs to know that the base has none.
  void open_classifier(std::optional<int64_t> labels, bool brings_head = false) {
    auto options = options_.pretrained();
    if (brings_head) options.note([](const std::string&) {});
    classifier_ =
        peft::models::BertForSequenceClassification::from_pretrained(options_.folder, labels, options);
    label_count_ = classifier_->config.num_labels();
  }
  void open_encoder(std::optional<bool> pooler) {
    auto options = options_.pretrained();
    if (pooler) options.pooler(*pooler);
    // The pooler a mean does not need is left out silently.
    options.note([](const std::string&) {});
    encoder_ = peft::models::BertModel::from_pretrained(options_.folder, options);
  }
  void load(const fs::path& folder, bool trainable) {
    std::error_code ignored;
    if (!fs::is_directory(folder, ignored)) {
      throw std::runtime_error(fmt::format("{}: there is no folder '{}'",
                                           trainable ? "--init-adapter" : "--adapter", folder.string()));
    }
    const auto note = [this](const std::string& line) { notes_.push_back(line); };
    if (internal::is_fusion(folder)) {
      std::tie(adapter_, head_adapter_) = internal::load_fusion(*model(), folder, trainable, note);
      return;
    }
    const bool only_head = pooled_ && fs::exists(folder / head_file, ignored) &&
                           !fs::exists(folder / "adapter_config.json", ignored);
    if (only_head) return;
    adapter_ = peft::is_adapterhub(folder)
                   ? peft::load_adapterhub(*model(), folder, adapter_name, trainable, note)
                   : peft::load_adapter(*model(), folder, adapter_name, trainable, note);
  }
  /// A fusion of adapters on disk.
  void fuse(const Method& method) {
    std::vector<std::pair<std::string, fs::path>> adapters;
    for (size_t i = 0; i < method.fused.size(); ++i)
      adapters.emplace_back(method.fusion->adapters()[i], method.fused[i]);
    internal::load_fused(*model(), adapters, [this](const std::string& line) { notes_.push_back(line); });
    adapter_ = peft::add_fusion(*model(), *method.fusion);
    if (classifier_) train_classifier();
  }
  /// A trained copy of the classifier beside a fusion, which has joins only.
  void train_classifier() {
    head_adapter_ = peft::add_adapter(*model(), peft::ReplaceOptions(), peft::named({"classifier"}),
                                      internal::fusion_head);
  }
  void make_head() { head_ = std::make_shared<internal::PooledHead>(config().hidden_size(), label_count_); }
  void train_head() {
    head_adapter_ = peft::add_adapter(*head_, peft::ReplaceOptions(), peft::all(), adapter_name);
  }
  void finish() {
    model()->to(options_.device);
    if (head_) head_->to(options_.device);
  }

  BaseOptions options_;
  bool pooled_ = false;
  int64_t label_count_ = 0;
  peft::models::BertForSequenceClassification classifier_{nullptr};
  peft::models::BertModel encoder_{nullptr};
  std::shared_ptr<internal::PooledHead> head_;
  std::optional<peft::Adapter> adapter_, head_adapter_;
  std::vector<std::string> notes_;
};

}  // namespace finetune
