// DeBERTa-v2 and -v3: the encoder and its tasks.
#pragma once

#include "peft/core/activation_function.h"
#include "peft/core/adapted.h"
#include "peft/models/deberta_v2_config.h"
#include "peft/models/deberta_v2_layers.h"
#include "peft/models/encoder.h"
#include "peft/models/encoder_task.h"
#include "peft/models/pretrained.h"

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/dropout.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// The encoder: `DebertaV2Model` of transformers, of DeBERTa-v2 and DeBERTa-v3. Constructing it draws
/// transformers' initial values.
class DebertaV2ModelImpl : public nn::Cloneable<DebertaV2ModelImpl>, public Encoder {
 public:
  explicit DebertaV2ModelImpl(DebertaV2Config settings) : DebertaV2ModelImpl(std::move(settings), Unset()) {
    peft::internal::initialize(*this, config.initializer_range());
  }
  DebertaV2ModelImpl(DebertaV2Config settings, Unset) : config(std::move(settings)) {
    DebertaV2ModelImpl::reset();
  }

  void reset() override {
    embeddings = register_module("embeddings", DebertaV2Embeddings(config));
    encoder = register_module("encoder", DebertaV2Encoder(config));
  }

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    const auto embedded = embeddings->forward(inputs);
    EncoderOutput output;
    output.virtual_tokens = embedded.virtual_tokens;
    output.num_virtual_tokens = embedded.num_virtual_tokens;
    output.last_hidden_state = encoder->forward(
        embedded.values, embedded.mask, inputs.output_hidden_states ? &output.hidden_states : nullptr);
    return output;
  }

  ModelDescription describe() const override { return {"FEATURE_EXTRACTION", name_or_path, "deberta-v2"}; }
  std::string architecture() const override { return "DebertaV2Model"; }
  void gradient_checkpointing(bool on) override { encoder->gradient_checkpointing = on; }
  nlohmann::ordered_json config_json() const override { return config.json(); }
  std::string base_prefix() const override { return "deberta"; }
  std::vector<std::string> others() const override;

  DebertaV2Config config;
  DebertaV2Embeddings embeddings{nullptr};
  DebertaV2Encoder encoder{nullptr};
};

/// Holder of `DebertaV2ModelImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::DebertaV2Model::from_pretrained("deberta-v3-base");
/// auto hidden = model->forward({ids, {}, mask}).last_hidden_state;
/// ```
class DebertaV2Model : public nn::ModuleHolder<DebertaV2ModelImpl> {
 public:
  using nn::ModuleHolder<DebertaV2ModelImpl>::ModuleHolder;
  using Impl = DebertaV2ModelImpl;

  /// Reads a Hugging Face folder, with or without a task head. The model is frozen and in evaluation mode;
  /// call `train()` before training an adapter with dropout. Throws: what PretrainedFolder,
  /// DebertaV2Config::read and load_pretrained throw.
  static DebertaV2Model from_pretrained(const std::filesystem::path& directory,
                                        const PretrainedOptions& options = {}) {
    const PretrainedFolder folder(directory);
    const auto config = peft::internal::read_config<DebertaV2Config>(folder, options);
    return peft::internal::filled(DebertaV2Model(config, Unset()), folder, options);
  }
};

/// The first token's last hidden state through dropout, a projection and the activation.
class DebertaV2PoolerImpl : public nn::Cloneable<DebertaV2PoolerImpl> {
 public:
  explicit DebertaV2PoolerImpl(DebertaV2Config settings)
      : config(std::move(settings)), activation(activation_function(config.pooler_hidden_act())) {
    DebertaV2PoolerImpl::reset();
  }
  void reset() override {
    const auto width = config.hidden_size();
    dense = register_module("dense", peft::internal::unset_linear(width, width));
    dropout = register_module("dropout", nn::Dropout(config.pooler_dropout()));
  }
  Tensor forward(const Tensor& hidden) {
    return activation(dense->forward(dropout->forward(hidden.select(1, 0))));
  }

  DebertaV2Config config;
  ActivationFunction activation;
  Linear dense{nullptr};
  nn::Dropout dropout{nullptr};
};
TORCH_MODULE(DebertaV2Pooler);

/// What finds words under masks: the transform, whose layers the head that is not `legacy` has as its own,
/// and the output layer.
class DebertaV2PredictionsImpl : public nn::Cloneable<DebertaV2PredictionsImpl> {
 public:
  explicit DebertaV2PredictionsImpl(DebertaV2Config settings) : config(std::move(settings)) {
    DebertaV2PredictionsImpl::reset();
  }
  void reset() override {
    transform = BertPredictionTransform(config.of_blocks(), config.word_width());
    if (config.legacy()) {
      register_module("transform", transform);
    } else {
      register_module("dense", transform->dense);
      register_module("LayerNorm", transform->LayerNorm);
    }
    decoder =
        register_module("decoder", peft::internal::unset_linear(config.word_width(), config.vocab_size()));
  }

  DebertaV2Config config;
  BertPredictionTransform transform{nullptr};
  Linear decoder{nullptr};
};
TORCH_MODULE(DebertaV2Predictions);

/// The head under the name it has in each form.
class DebertaV2WordHeadImpl : public nn::Cloneable<DebertaV2WordHeadImpl> {
 public:
  explicit DebertaV2WordHeadImpl(DebertaV2Config settings) : config(std::move(settings)) {
    DebertaV2WordHeadImpl::reset();
  }
  void reset() override {
    predictions = register_module(config.legacy() ? "predictions" : "lm_head", DebertaV2Predictions(config));
  }

  DebertaV2Config config;
  DebertaV2Predictions predictions{nullptr};
};
TORCH_MODULE(DebertaV2WordHead);

/// The loss transformers' DeBERTa computes where its config names no kind of problem: of several labels a
/// row, cross entropy with them as probabilities; of one a row, cross entropy, where any below 0 is ignored,
/// and 0 where all are. Else `classification_loss`. Shapes: as there.
inline Tensor deberta_v2_text_loss(const Tensor& logits, const Tensor& labels, ProblemType problem) {
  if (problem != ProblemType::automatic || logits.size(1) == 1) {
    return classification_loss(logits, labels, problem);
  }
  if (labels.dim() > 1 && labels.size(-1) > 1) {
    TORCH_CHECK_VALUE(
        labels.sizes() == logits.sizes(), "classification_loss: labels must have the shape of the logits, ",
        peft::internal::shape_text(logits.sizes()), ", but got ", peft::internal::shape_text(labels.sizes()));
    return -(logits.log_softmax(-1) * labels).sum(-1).mean();
  }
  TORCH_CHECK_VALUE(labels.numel() == logits.size(0), "classification_loss: labels must be one a row, ",
                    logits.size(0), " of them, but got ", peft::internal::shape_text(labels.sizes()));
  const auto targets = labels.reshape(-1).to(torch::kLong);
  const auto sum = at::cross_entropy_loss(logits.to(torch::kFloat32), targets.masked_fill(targets < 0, -100),
                                          /*weight=*/{}, at::Reduction::Sum);
  return sum / (targets >= 0).sum().clamp_min(1);
}

/// What makes a DeBERTa-v2 or -v3 one; see `EncoderTask`.
struct DebertaV2Family {
  using Config = DebertaV2Config;
  using Model = DebertaV2Model;
  static constexpr const char* prefix = "deberta";

  static std::string name(const DebertaV2Config&) { return "DebertaV2"; }
  /// The last: files of models that only look at distances may hold the positions of their training.
  static std::vector<std::string> heads() {
    return {"cls.",
            "lm_predictions.",
            "mask_predictions.",
            "pooler.",
            "classifier.",
            "qa_outputs.",
            "embeddings.position_embeddings."};
  }
  static DebertaV2Config read(const std::filesystem::path& path) { return DebertaV2Config::read(path); }
  static Model make(const DebertaV2Config& config, bool /*pooler*/) { return Model(config, Unset()); }
  static double head_dropout(const DebertaV2Config& config) { return config.hidden_dropout_prob(); }
  static Tensor text_loss(const Tensor& logits, const Tensor& labels, ProblemType problem) {
    return deberta_v2_text_loss(logits, labels, problem);
  }

  /// A pooler, dropout and a linear layer on the first token's last hidden state.
  struct TextHead {
    static constexpr bool with_pooler = false;  // the encoder has none
    static std::vector<std::string> paths() { return {"pooler", "classifier"}; }
    void build(nn::Module& model, const DebertaV2Config& config) {
      pooler = model.register_module("pooler", DebertaV2Pooler(config));
      classifier = model.register_module(
          "classifier", peft::internal::unset_linear(config.hidden_size(), config.num_labels()));
      dropout = model.register_module(
          "dropout", nn::Dropout(config.cls_dropout().value_or(config.hidden_dropout_prob())));
    }
    Tensor score(const EncoderOutput& output) {
      return classifier->forward(dropout->forward(pooler->forward(output.last_hidden_state)));
    }

    DebertaV2Pooler pooler{nullptr};
    Linear classifier{nullptr};
    nn::Dropout dropout{nullptr};
  };

  /// The head's form, and so its names, are the config's.
  struct WordHead {
    static constexpr bool with_pooler = false;
    std::vector<std::string> paths() const { return {legacy ? "cls" : "lm_predictions"}; }
    std::string decoder_path() const {
      return legacy ? "cls.predictions.decoder" : "lm_predictions.lm_head.decoder";
    }
    bool has_decoder() const { return legacy; }
    std::vector<std::pair<std::string, std::string>> aliases() const {
      return {{legacy ? "cls.predictions.bias" : "lm_predictions.lm_head.bias", decoder_path() + ".bias"}};
    }
    void build(nn::Module& model, const DebertaV2Config& config) {
      legacy = config.legacy();
      TORCH_CHECK_VALUE(
          legacy || (config.word_width() == config.hidden_size() && config.tie_word_embeddings()),
          "DebertaV2ForMaskedLM: a head that is not 'legacy' must have words of the model's "
          "width, ",
          config.hidden_size(), ", and tied, but got words of ", config.word_width(),
          config.tie_word_embeddings() ? "" : ", not tied");
      head = model.register_module(legacy ? "cls" : "lm_predictions", DebertaV2WordHead(config));
    }
    Tensor transform(const Tensor& hidden) { return head->predictions->transform->forward(hidden); }
    Linear& decoder() { return head->predictions->decoder; }

    DebertaV2WordHead head{nullptr};
    bool legacy = true;
  };
};

inline std::vector<std::string> DebertaV2ModelImpl::others() const { return DebertaV2Family::heads(); }

/// Papers: DeBERTa: Decoding-enhanced BERT with Disentangled Attention, arXiv 2006.03654; DeBERTaV3, arXiv
/// 2111.09543.
using DebertaV2ForSequenceClassification = EncoderTaskHolder<ForSequenceClassificationImpl<DebertaV2Family>>;
using DebertaV2ForTokenClassification = EncoderTaskHolder<ForTokenClassificationImpl<DebertaV2Family>>;
using DebertaV2ForQuestionAnswering = EncoderTaskHolder<ForQuestionAnsweringImpl<DebertaV2Family>>;
using DebertaV2ForMaskedLM = EncoderTaskHolder<ForMaskedLMImpl<DebertaV2Family>>;

}  // namespace peft::models
