// BERT: the encoder, and the classifiers of texts and of tokens on it.
#pragma once

#include "peft/core/adapted.h"
#include "peft/models/bert_config.h"
#include "peft/models/bert_layers.h"
#include "peft/models/encoder.h"
#include "peft/models/pretrained.h"

#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft::internal {

/// Reads a classifier of texts or of tokens from a folder.
template <class Model>
Model read_bert_classifier(const std::filesystem::path& directory, std::optional<int64_t> labels,
                           const models::PretrainedOptions& options) {
  const models::PretrainedFolder folder(directory);
  auto config = read_config<models::BertConfig>(folder, options);
  if (labels) config.num_labels(*labels);
  return filled(Model(config, typename Model::Impl::Unset()), folder, options);
}

}  // namespace peft::internal

namespace peft::models {

/// The encoder: `BertModel` of transformers. Constructing it draws transformers' initial values.
/// Paper: BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, arXiv 1810.04805.
class BertModelImpl : public nn::Cloneable<BertModelImpl>, public Pretrained {
 public:
  /// For those who set the values next.
  struct Unset {};

  explicit BertModelImpl(BertConfig settings, bool with_pooler = true)
      : BertModelImpl(std::move(settings), with_pooler, Unset()) {
    peft::internal::initialize(*this, config.initializer_range());
  }
  BertModelImpl(BertConfig settings, bool with_pooler, Unset)
      : config(std::move(settings)), has_pooler(with_pooler) {
    BertModelImpl::reset();
  }

  void reset() override {
    embeddings = register_module("embeddings", BertEmbeddings(config));
    encoder = register_module("encoder", BertEncoder(config));
    pooler = has_pooler ? register_module("pooler", BertPooler(config)) : BertPooler(nullptr);
  }

  EncoderOutput forward(const EncoderInputs& inputs) {
    const ForwardScope scope;
    const auto embedded = embeddings->forward(inputs);
    const auto bias = peft::internal::attention_bias(embedded.mask, embedded.values.scalar_type());
    EncoderOutput output;
    output.virtual_tokens = embedded.virtual_tokens;
    output.last_hidden_state = encoder->forward(
        embedded.values, bias, inputs.output_hidden_states ? &output.hidden_states : nullptr);
    if (pooler) output.pooler_output = pooler->forward(output.last_hidden_state);
    return output;
  }

  ModelDescription describe() const override { return {"FEATURE_EXTRACTION", name_or_path, "bert"}; }
  std::string architecture() const override { return "BertModel"; }
  void gradient_checkpointing(bool on) override { encoder->gradient_checkpointing = on; }
  std::string base_prefix() const override { return "bert"; }
  std::vector<std::string> others() const override {
    std::vector<std::string> keys{"cls.", "classifier.", "qa_outputs."};
    if (!has_pooler) keys.push_back("pooler.");
    return keys;
  }

  BertConfig config;
  bool has_pooler;
  BertEmbeddings embeddings{nullptr};
  BertEncoder encoder{nullptr};
  BertPooler pooler{nullptr};
};

/// Holder of `BertModelImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::BertModel::from_pretrained("all-MiniLM-L6-v2");
/// auto vectors = peft::models::embed(model->forward({ids, {}, mask}).last_hidden_state, mask);
/// ```
class BertModel : public nn::ModuleHolder<BertModelImpl> {
 public:
  using nn::ModuleHolder<BertModelImpl>::ModuleHolder;
  using Impl = BertModelImpl;

  /// Reads a Hugging Face folder, with or without a task head. The model is frozen and in evaluation mode;
  /// call `train()` before training an adapter with dropout. Throws: what PretrainedFolder, BertConfig::read
  /// and load_pretrained throw.
  static BertModel from_pretrained(const std::filesystem::path& directory,
                                   const PretrainedOptions& options = {}) {
    const PretrainedFolder folder(directory);
    const auto config = peft::internal::read_config<BertConfig>(folder, options);
    const auto& tensors = folder.tensors();
    const bool pooler = options.pooler().value_or(tensors.count("pooler.dense.weight") > 0 ||
                                                  tensors.count("bert.pooler.dense.weight") > 0);
    return peft::internal::filled(BertModel(config, pooler, BertModelImpl::Unset()), folder, options);
  }
};

/// What the classifiers have in common: the encoder, with a pooler where `Derived::with_pooler` says so,
/// dropout and a linear head.
template <class Derived>
class BertClassifier : public nn::Cloneable<Derived>, public Pretrained {
 public:
  using Unset = BertModelImpl::Unset;

  explicit BertClassifier(BertConfig settings) : BertClassifier(std::move(settings), Unset()) {
    peft::internal::initialize(*this, config.initializer_range());
  }
  BertClassifier(BertConfig settings, Unset) : config(std::move(settings)) { BertClassifier::reset(); }

  void reset() override {
    bert = this->register_module("bert", BertModel(config, Derived::with_pooler, Unset()));
    bert->embeddings->input->options.keeps_types(true);
    dropout = this->register_module(
        "dropout", nn::Dropout(config.classifier_dropout().value_or(config.hidden_dropout_prob())));
    classifier = this->register_module(
        "classifier", peft::internal::unset_linear(config.hidden_size(), config.num_labels()));
  }

  void gradient_checkpointing(bool on) override { bert->gradient_checkpointing(on); }
  std::string base_prefix() const override { return "bert"; }
  std::string head() const override { return "classifier"; }
  void initialize_head() override { peft::internal::initialize(*classifier, config.initializer_range()); }

  BertConfig config;
  BertModel bert{nullptr};
  nn::Dropout dropout{nullptr};
  Linear classifier{nullptr};

 protected:
  /// As often as an active `Parallel` repeats the texts.
  Tensor repeated_labels(const EncoderInputs& inputs) {
    return peft::internal::repeated(inputs.labels, bert->embeddings->input->branches());
  }
};

/// The encoder, dropout and a linear head on the pooler's output: `BertForSequenceClassification` of
/// transformers. Constructing it draws transformers' initial values.
class BertForSequenceClassificationImpl : public BertClassifier<BertForSequenceClassificationImpl> {
 public:
  using BertClassifier::BertClassifier;
  static constexpr bool with_pooler = true;

  EncoderOutput forward(const EncoderInputs& inputs) {
    const ForwardScope scope;
    auto output = bert->forward(inputs);
    output.logits = classifier->forward(dropout->forward(output.pooler_output));
    if (inputs.labels.defined()) {
      output.loss = classification_loss(output.logits, repeated_labels(inputs), config.problem_type());
    }
    return output;
  }

  ModelDescription describe() const override { return {"SEQ_CLS", name_or_path, "bert"}; }
  std::string architecture() const override { return "BertForSequenceClassification"; }
  std::vector<std::string> others() const override { return {"cls.", "qa_outputs."}; }
};

/// Holder of `BertForSequenceClassificationImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::BertForSequenceClassification::from_pretrained(directory, /*labels=*/10);
/// auto logits = model->forward({ids, {}, mask}).logits;
/// ```
class BertForSequenceClassification : public nn::ModuleHolder<BertForSequenceClassificationImpl> {
 public:
  using nn::ModuleHolder<BertForSequenceClassificationImpl>::ModuleHolder;
  using Impl = BertForSequenceClassificationImpl;

  /// Reads a Hugging Face folder. `labels`: how many; without a word, as many as the config says. A head the
  /// folder does not have is drawn as transformers draws it. The model is frozen and in evaluation mode; call
  /// `train()` before training an adapter with dropout. Throws: what PretrainedFolder, BertConfig::read and
  /// load_pretrained throw.
  static BertForSequenceClassification from_pretrained(const std::filesystem::path& directory,
                                                       std::optional<int64_t> labels = {},
                                                       const PretrainedOptions& options = {}) {
    return peft::internal::read_bert_classifier<BertForSequenceClassification>(directory, labels, options);
  }
};

/// The encoder without pooler, dropout and a linear head on every token's last hidden state:
/// `BertForTokenClassification` of transformers. Constructing it draws transformers' initial values.
class BertForTokenClassificationImpl : public BertClassifier<BertForTokenClassificationImpl> {
 public:
  using BertClassifier::BertClassifier;
  static constexpr bool with_pooler = false;

  EncoderOutput forward(const EncoderInputs& inputs) {
    const ForwardScope scope;
    auto output = bert->forward(inputs);
    output.logits = classifier->forward(dropout->forward(output.last_hidden_state));
    if (inputs.labels.defined()) {
      output.loss = token_loss(real_tokens(output.logits, output.virtual_tokens), repeated_labels(inputs));
    }
    return output;
  }

  ModelDescription describe() const override { return {"TOKEN_CLS", name_or_path, "bert"}; }
  std::string architecture() const override { return "BertForTokenClassification"; }
  std::vector<std::string> others() const override { return {"cls.", "qa_outputs.", "pooler."}; }
};

/// Holder of `BertForTokenClassificationImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::BertForTokenClassification::from_pretrained(directory, /*labels=*/9);
/// auto of_each_token = model->forward({ids, {}, mask}).logits.argmax(-1);
/// ```
class BertForTokenClassification : public nn::ModuleHolder<BertForTokenClassificationImpl> {
 public:
  using nn::ModuleHolder<BertForTokenClassificationImpl>::ModuleHolder;
  using Impl = BertForTokenClassificationImpl;

  /// Reads a Hugging Face folder, as `BertForSequenceClassification::from_pretrained` does.
  static BertForTokenClassification from_pretrained(const std::filesystem::path& directory,
                                                    std::optional<int64_t> labels = {},
                                                    const PretrainedOptions& options = {}) {
    return peft::internal::read_bert_classifier<BertForTokenClassification>(directory, labels, options);
  }
};

}  // namespace peft::models
