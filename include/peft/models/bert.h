// BERT: the encoder and its tasks.
#pragma once

#include "peft/core/adapted.h"
#include "peft/models/bert_config.h"
#include "peft/models/bert_layers.h"
#include "peft/models/bert_stack.h"
#include "peft/models/encoder.h"
#include "peft/models/encoder_task.h"

#include <torch/nn/cloneable.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// What finds words under masks: the transform and the output layer.
class BertPredictionsImpl : public nn::Cloneable<BertPredictionsImpl> {
 public:
  explicit BertPredictionsImpl(BertConfig settings) : config(std::move(settings)) {
    BertPredictionsImpl::reset();
  }

  void reset() override {
    transform = register_module("transform", BertPredictionTransform(config, config.hidden_size()));
    decoder =
        register_module("decoder", peft::internal::unset_linear(config.hidden_size(), config.vocab_size()));
  }

  BertConfig config;
  BertPredictionTransform transform{nullptr};
  Linear decoder{nullptr};
};
TORCH_MODULE(BertPredictions);

/// All that a BERT's pretraining had beside the encoder, of which the masked words are kept.
class BertPretrainingHeadImpl : public nn::Cloneable<BertPretrainingHeadImpl> {
 public:
  explicit BertPretrainingHeadImpl(BertConfig settings) : config(std::move(settings)) {
    BertPretrainingHeadImpl::reset();
  }

  void reset() override { predictions = register_module("predictions", BertPredictions(config)); }

  BertConfig config;
  BertPredictions predictions{nullptr};
};
TORCH_MODULE(BertPretrainingHead);

/// What makes a BERT one; see `EncoderTask`.
struct BertFamily {
  using Config = BertConfig;
  using Model = BertStack<BertFamily>;
  static constexpr const char* prefix = "bert";

  static Config read(const std::filesystem::path& path) { return BertConfig::read(path); }
  static std::string name(const BertConfig&) { return "Bert"; }
  static std::vector<std::string> heads() {
    return {"cls.", "cls.seq_relationship.", "classifier.", "qa_outputs."};
  }
  static void check(const BertConfig& config) {
    TORCH_CHECK_VALUE(config.model_type() == "bert", "BertModel: model_type must be \"bert\", but got \"",
                      config.model_type(), "\"");
  }
  static Model make(const BertConfig& config, bool pooler) { return Model(config, pooler, Unset()); }
  static double head_dropout(const BertConfig& config) {
    return config.classifier_dropout().value_or(config.hidden_dropout_prob());
  }
  static Tensor text_loss(const Tensor& logits, const Tensor& labels, ProblemType problem) {
    return classification_loss(logits, labels, problem);
  }

  /// Dropout and a linear layer on the pooler's output.
  struct TextHead : TokenHead<BertFamily> {
    static constexpr bool with_pooler = true;
    Tensor score(const EncoderOutput& output) {
      return classifier->forward(dropout->forward(output.pooler_output));
    }
  };

  struct WordHead {
    static constexpr bool with_pooler = false;
    static std::vector<std::string> paths() { return {"cls"}; }
    static std::string decoder_path() { return "cls.predictions.decoder"; }
    static bool has_decoder() { return true; }
    static std::vector<std::pair<std::string, std::string>> aliases() {
      return {{"cls.predictions.bias", "cls.predictions.decoder.bias"}};
    }
    void build(nn::Module& model, const BertConfig& config) {
      cls = model.register_module("cls", BertPretrainingHead(config));
    }
    Tensor transform(const Tensor& hidden) { return cls->predictions->transform->forward(hidden); }
    Linear& decoder() { return cls->predictions->decoder; }

    BertPretrainingHead cls{nullptr};
  };
};

/// Paper: BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, arXiv 1810.04805.
using BertModel = BertStack<BertFamily>;
using BertForSequenceClassification = EncoderTaskHolder<ForSequenceClassificationImpl<BertFamily>>;
using BertForTokenClassification = EncoderTaskHolder<ForTokenClassificationImpl<BertFamily>>;
using BertForQuestionAnswering = EncoderTaskHolder<ForQuestionAnsweringImpl<BertFamily>>;
using BertForMaskedLM = EncoderTaskHolder<ForMaskedLMImpl<BertFamily>>;

using BertModelImpl = BertModel::Impl;
using BertForSequenceClassificationImpl = BertForSequenceClassification::Impl;
using BertForTokenClassificationImpl = BertForTokenClassification::Impl;
using BertForQuestionAnsweringImpl = BertForQuestionAnswering::Impl;
using BertForMaskedLMImpl = BertForMaskedLM::Impl;

}  // namespace peft::models
