// GlueModel: a classifier of texts of any family, with the method that is trained.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data.h"
#include "finetune/adapter_form.h"
#include "finetune/batches.h"
#include "finetune/family_targets.h"
#include "finetune/method.h"
#include "finetune/task.h"
#include "peft/models/load.h"
#include "recipe.h"

namespace glue {

namespace fs = std::filesystem;
using torch::Tensor;

/// A base with its task head, and an adapter on it.
class GlueModel {
 public:
  static constexpr const char* adapter_name = "default";

  /// Opens a folder. The head for so many labels (1: a regression) is the folder's, or drawn.
  /// Throws: what `peft::models::load` throws.
  GlueModel(const fs::path& folder, const Recipe& recipe, std::int64_t labels)
      : model_(open(folder, recipe.dropout, labels)), heads_(model_.encoder().head()) {
    if (recipe.pooler) add_pooler();
    const bool bound = bind<peft::models::BertFamily>() || bind<peft::models::RobertaFamily>() ||
                       bind<peft::models::DebertaV2Family>();
    TORCH_CHECK(bound, model_.encoder().architecture(), " is no classifier that this program knows");
    if (recipe.head_dropout) set_head_dropout(*recipe.head_dropout);
  }

  /// Reads a recipe's method for this model. Throws: what `parse_method` throws.
  finetune::Method read(const std::string& text, std::int64_t steps) const {
    const auto name = finetune::internal::split_method(text).first;
    finetune::internal::method_entry(name);
    auto method = finetune::parse_method(text, finetune::family_targets(name, type()), heads_, steps);
    if (method.fusion)
      throw std::runtime_error("--method fusion: it needs adapters that are trained already");
    if (method.head_only()) method.parts = {peft::on(peft::ReplaceOptions(), peft::named(heads_))};
    finetune::leave_out_heads(method, *model(), heads_);
    return method;
  }

  /// Throws where a method does not fit the model, and changes nothing.
  void check(const finetune::Method& method) const {
    guarded(method, [&] {
      const auto plan = peft::internal::plan_adapter(*model_, method.parts, adapter_name, /*extends=*/false);
      for (const auto& make_controller : plan.controllers) make_controller();
    });
  }
  void attach(const finetune::Method& method) {
    guarded(method, [&] { adapter_ = peft::add_adapter(*model_, method.parts, adapter_name); });
  }

  const std::optional<peft::Adapter>& adapter() const { return adapter_; }
  std::shared_ptr<torch::nn::Module> model() const { return model_.ptr(); }
  torch::Device device() const { return torch::kCPU; }
  /// transformers' name of the family.
  std::string type() const { return model_.encoder().describe().model_type; }
  /// Whether a trained tensor's name is the head's.
  bool is_head(const std::string& name) const {
    return std::any_of(heads_.begin(), heads_.end(),
                       [&](const std::string& head) { return name.starts_with(head + "."); });
  }
  bool has_pooled_head() const { return false; }
  void train(bool on) const { model_.train(on); }

  /// What the head and the pooler below it see of each text: the first of the last states.
  /// Shapes: (batch, 1, hidden).
  Tensor features(const peft::models::EncoderInputs& inputs) const {
    return encode_(inputs).last_hidden_state.narrow(1, 0, 1);
  }
  /// Shapes: features as `features` gives them; (batch, labels).
  Tensor logits(const Tensor& features) const { return score_(features); }
  Tensor logits(const peft::models::EncoderInputs& inputs) const { return model_.forward(inputs).logits; }
  peft::models::EncoderOutput encode(const peft::models::EncoderInputs& inputs) const {
    return encode_(inputs);
  }
  /// The family's own, of one label a row.
  Tensor loss(const Tensor& logits, const Tensor& labels) const { return loss_(logits, labels); }

  /// Writes the adapter with its head, and settings, into a folder that exists.
  void save(const fs::path& folder, const nlohmann::ordered_json& settings) const {
    if (finetune::in_adapterhub_form(*adapter_)) {
      peft::save_adapterhub(*model_, adapter_name, folder);
    } else {
      peft::save_adapter(*adapter_, folder);
    }
    peft::write_file(folder / finetune::Settings::file_name, settings.dump(2) + "\n");
  }

 private:
  static peft::models::AnyEncoder open(const fs::path& folder, std::optional<double> dropout,
                                       std::int64_t labels) {
    const auto pretrained = peft::models::PretrainedOptions()
                                .dropout(dropout)
                                .name_or_path(folder.string())
                                .note([](const std::string&) {});  // that a head is drawn goes without saying
    return peft::models::load(folder, peft::models::LoadOptions()
                                          .task(peft::models::Task::sequence_classification)
                                          .labels(labels)
                                          .pretrained(pretrained));
  }

  /// Finds the parts of a classifier that only its family's type has. False where it is of another family.
  template <class Family>
  bool bind() {
    auto* classifier = model_.as<peft::models::ForSequenceClassificationImpl<Family>>();
    if (!classifier) return false;
    encode_ = [classifier](const peft::models::EncoderInputs& inputs) {
      return classifier->base_model->forward(inputs);
    };
    score_ = [classifier](const Tensor& features) {
      peft::models::EncoderOutput output;
      output.last_hidden_state = features;
      if constexpr (Family::TextHead::with_pooler)
        output.pooler_output = classifier->base_model->pooler->forward(features);
      return classifier->score(output);
    };
    loss_ = [classifier](const Tensor& logits, const Tensor& labels) {
      return Family::text_loss(logits, labels, classifier->config.problem_type());
    };
    return true;
  }

  /// The pooler of an encoder that has one is the first part of the head.
  void add_pooler() {
    for (const auto& item : (*model_).named_modules()) {
      if (item.key().ends_with(".pooler.dense")) heads_.insert(heads_.begin(), item.key());
    }
  }

  /// Sets the dropout before the head's last layer, which the recipe's `dropout` sets alike with all others.
  void set_head_dropout(double rate) const {
    for (const auto& item : (*model_).named_modules()) {
      auto* dropout = dynamic_cast<torch::nn::DropoutImpl*>(item.value().get());
      if (dropout && (item.key() == "dropout" || item.key() == "classifier.dropout"))
        dropout->options.p(rate);
    }
  }

  template <class Work>
  static void guarded(const finetune::Method& method, const Work& work) {
    try {
      work();
    } catch (const c10::Error& error) {
      throw std::runtime_error(fmt::format("--method {}: {}", method.text, error.what_without_backtrace()));
    }
  }

  peft::models::AnyEncoder model_;
  std::vector<std::string> heads_;
  std::function<peft::models::EncoderOutput(const peft::models::EncoderInputs&)> encode_;
  std::function<Tensor(const Tensor&)> score_;
  std::function<Tensor(const Tensor&, const Tensor&)> loss_;
  std::optional<peft::Adapter> adapter_;
};

/// What the head sees of each row, computed once for a head that trains alone.
class FeatureTable {
 public:
  FeatureTable(const GlueModel& model, const EncodedRows& rows, std::int64_t pad_id) {
    const torch::NoGradGuard no_grad;
    constexpr std::size_t at_once = 64;
    const auto order = order_by_length(rows);
    std::vector<std::int64_t> where(order.begin(), order.end());
    std::vector<Tensor> states;
    for (std::size_t begin = 0; begin < order.size(); begin += at_once) {
      std::vector<const finetune::Example*> part;
      for (auto i = begin; i < std::min(order.size(), begin + at_once); ++i)
        part.push_back(&rows.examples[order[i]]);
      states.push_back(model.features(finetune::internal::pad(part, pad_id).inputs));
    }
    const auto all = torch::cat(states);
    states_ = torch::empty_like(all).index_copy_(0, torch::tensor(where, torch::kLong), all);
  }

  /// Shapes: (rows, 1, hidden).
  Tensor rows(const std::vector<std::int64_t>& which) const {
    return states_.index_select(0, torch::tensor(which, torch::kLong));
  }

 private:
  Tensor states_;  ///< in the file's order
};

}  // namespace glue
