// RoBERTa: the encoder and its tasks. XLM-RoBERTa and CamemBERT are built like it.
#pragma once

#include "peft/core/adapted.h"
#include "peft/models/bert_config.h"
#include "peft/models/bert_stack.h"
#include "peft/models/encoder.h"
#include "peft/models/encoder_task.h"

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/dropout.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// The head of texts: the first token's last hidden state through dropout, a projection, tanh, dropout and a
/// linear layer.
class RobertaClassificationHeadImpl : public nn::Cloneable<RobertaClassificationHeadImpl> {
 public:
  explicit RobertaClassificationHeadImpl(BertConfig settings) : config(std::move(settings)) {
    RobertaClassificationHeadImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size();
    dense = register_module("dense", peft::internal::unset_linear(width, width));
    dropout = register_module(
        "dropout", nn::Dropout(config.classifier_dropout().value_or(config.hidden_dropout_prob())));
    out_proj = register_module("out_proj", peft::internal::unset_linear(width, config.num_labels()));
  }

  Tensor forward(const Tensor& hidden) {
    const auto x = dense->forward(dropout->forward(hidden.select(1, 0))).tanh();
    return out_proj->forward(dropout->forward(x));
  }

  BertConfig config;
  Linear dense{nullptr}, out_proj{nullptr};
  nn::Dropout dropout{nullptr};
};
TORCH_MODULE(RobertaClassificationHead);

/// The head of masked words: a projection, GELU, a norm, and the output layer.
class RobertaLMHeadImpl : public nn::Cloneable<RobertaLMHeadImpl> {
 public:
  explicit RobertaLMHeadImpl(BertConfig settings) : config(std::move(settings)) {
    RobertaLMHeadImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size();
    dense = register_module("dense", peft::internal::unset_linear(width, width));
    layer_norm =
        register_module("layer_norm", LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())));
    decoder = register_module("decoder", peft::internal::unset_linear(width, config.vocab_size()));
  }

  BertConfig config;
  Linear dense{nullptr}, decoder{nullptr};
  LayerNorm layer_norm{nullptr};
};
TORCH_MODULE(RobertaLMHead);

/// What makes a RoBERTa one; see `EncoderTask`.
struct RobertaFamily {
  using Config = BertConfig;
  using Model = BertStack<RobertaFamily>;
  static constexpr const char* prefix = "roberta";

  static Config read(const std::filesystem::path& path) { return RobertaConfig::read(path); }
  static std::string name(const BertConfig& config) {
    return config.model_type() == "xlm-roberta" ? "XLMRoberta"
           : config.model_type() == "camembert" ? "Camembert"
                                                : "Roberta";
  }
  static std::vector<std::string> heads() { return {"lm_head.", "classifier.", "qa_outputs."}; }
  static void check(const BertConfig& config) {
    TORCH_CHECK_VALUE(
        config.counts_from_padding(),
        "RobertaModel: model_type must be \"roberta\", \"xlm-roberta\" or \"camembert\", but got \"",
        config.model_type(), "\" (hint: RobertaConfig)");
    TORCH_CHECK_VALUE(config.pad_token_id().value_or(-1) >= 0 && config.positions() > 0,
                      "RobertaModel: pad_token_id must be from 0 to ", config.max_position_embeddings() - 2,
                      ", but got ",
                      config.pad_token_id() ? std::to_string(*config.pad_token_id()) : std::string("none"));
  }
  static Model make(const BertConfig& config, bool pooler) { return Model(config, pooler, Unset()); }
  static double head_dropout(const BertConfig& config) {
    return config.classifier_dropout().value_or(config.hidden_dropout_prob());
  }
  static Tensor text_loss(const Tensor& logits, const Tensor& labels, ProblemType problem) {
    return classification_loss(logits, labels, problem);
  }

  struct TextHead {
    static constexpr bool with_pooler = false;
    static std::vector<std::string> paths() { return {"classifier"}; }
    void build(nn::Module& model, const BertConfig& config) {
      classifier = model.register_module("classifier", RobertaClassificationHead(config));
    }
    Tensor score(const EncoderOutput& output) { return classifier->forward(output.last_hidden_state); }

    RobertaClassificationHead classifier{nullptr};
  };

  struct WordHead {
    static constexpr bool with_pooler = false;
    static std::vector<std::string> paths() { return {"lm_head"}; }
    static std::string decoder_path() { return "lm_head.decoder"; }
    static bool has_decoder() { return true; }
    static std::vector<std::pair<std::string, std::string>> aliases() {
      return {{"lm_head.bias", "lm_head.decoder.bias"}};
    }
    void build(nn::Module& model, const BertConfig& config) {
      lm_head = model.register_module("lm_head", RobertaLMHead(config));
    }
    Tensor transform(const Tensor& hidden) {
      return lm_head->layer_norm->forward(at::gelu(lm_head->dense->forward(hidden)));
    }
    Linear& decoder() { return lm_head->decoder; }

    RobertaLMHead lm_head{nullptr};
  };
};

/// Paper: RoBERTa: A Robustly Optimized BERT Pretraining Approach, arXiv 1907.11692.
using RobertaModel = BertStack<RobertaFamily>;
using RobertaForSequenceClassification = EncoderTaskHolder<ForSequenceClassificationImpl<RobertaFamily>>;
using RobertaForTokenClassification = EncoderTaskHolder<ForTokenClassificationImpl<RobertaFamily>>;
using RobertaForQuestionAnswering = EncoderTaskHolder<ForQuestionAnsweringImpl<RobertaFamily>>;
using RobertaForMaskedLM = EncoderTaskHolder<ForMaskedLMImpl<RobertaFamily>>;

using RobertaModelImpl = RobertaModel::Impl;
using RobertaForSequenceClassificationImpl = RobertaForSequenceClassification::Impl;
using RobertaForTokenClassificationImpl = RobertaForTokenClassification::Impl;
using RobertaForQuestionAnsweringImpl = RobertaForQuestionAnswering::Impl;
using RobertaForMaskedLMImpl = RobertaForMaskedLM::Impl;

}  // namespace peft::models
