// Tasks of encoders: texts, tokens, answers and masked words, each written once for every family.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/compat.h"
#include "peft/core/input.h"
#include "peft/models/encoder.h"
#include "peft/models/pretrained.h"
#include "peft/models/tied_output.h"

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// What every encoder is, with a task head or without.
class Encoder : public Pretrained {
 public:
  virtual EncoderOutput forward(const EncoderInputs& inputs) = 0;
};

/// A model with a task head. A family of encoders says what differs from one to another:
/// ```
/// struct BertFamily {
///   using Config = BertConfig;                      // num_labels, initializer_range, problem_type, json
///   static Config read(path);                       // of a config.json
///   using Model = BertModel;                        // the holder of the encoder, an `Encoder`
///   static Model make(const Config&, bool pooler);  // one whose values are not set
///   static constexpr const char* prefix;            // the encoder's name in a model with a head: "bert"
///   static std::string name(const Config&);         // what transformers' classes begin with: "Bert"
///   static std::vector<std::string> heads();        // beginnings of the keys of all heads
///   static double head_dropout(const Config&);      // before the classifier of tokens
///   static Tensor text_loss(const Tensor& logits, const Tensor& labels, ProblemType);
///   struct TextHead;                                // as `TokenHead` below
///   struct WordHead;                                // of masked words, see `ForMaskedLMImpl`
/// };
/// ```
/// The encoder has `embeddings`, and these `word_embeddings`, `input` and `output`, a word embedding and the
/// two sites where virtual tokens enter. `Head` is a base class whose members, the layers of the head, are
/// reset by `build`, which registers them with the model under transformers' names.
template <class Derived, class Family, class Head, class Base = nn::Cloneable<Derived>>
class EncoderTask : public Base, public Encoder, public Head {
 public:
  using Kind = Family;
  using Config = typename Family::Config;

  explicit EncoderTask(Config settings) : EncoderTask(std::move(settings), Unset()) {
    peft::internal::initialize(*this, config.initializer_range());
  }
  EncoderTask(Config settings, Unset) : config(std::move(settings)) { EncoderTask::reset(); }

  void reset() override {
    base_model = this->register_module(Family::prefix, Family::make(config, Head::with_pooler));
    base_model->embeddings->input->options.keeps_types(true);
    Head::build(*this, config);
  }

  ModelDescription describe() const override {
    auto description = base_model->describe();
    description.task_type = Derived::task_type;
    description.name_or_path = name_or_path;
    return description;
  }
  std::string architecture() const override { return Family::name(config) + Derived::task; }
  std::string base_prefix() const override { return Family::prefix; }
  std::vector<std::string> head() const override { return Head::paths(); }
  std::vector<std::string> others() const override {
    auto keys = Family::heads();
    for (const auto& own : head()) std::erase(keys, own + ".");
    if (!Head::with_pooler) keys.push_back("pooler.");
    return keys;
  }
  void initialize_head() override {
    const auto modules = this->named_modules("", /*include_self=*/false);
    for (const auto& path : head()) peft::internal::initialize(*modules[path], config.initializer_range());
  }
  void gradient_checkpointing(bool on) override { base_model->gradient_checkpointing(on); }
  nlohmann::ordered_json config_json() const override { return config.json(); }

  Config config;
  typename Family::Model base_model{nullptr};

 protected:
  /// What the encoder makes of a batch whose labels are the head's.
  EncoderOutput encode(EncoderInputs inputs) {
    inputs.labels = Tensor();
    return base_model->forward(inputs);
  }
  /// Labels as often as an active `Parallel` repeats the texts.
  Tensor repeated(const Tensor& labels) {
    return peft::internal::repeated(labels, base_model->embeddings->input->branches());
  }
};

/// Dropout and a linear layer on every token's last hidden state.
template <class Family>
struct TokenHead {
  static constexpr bool with_pooler = false;
  static std::vector<std::string> paths() { return {"classifier"}; }
  void build(nn::Module& model, const typename Family::Config& config) {
    dropout = model.register_module("dropout", nn::Dropout(Family::head_dropout(config)));
    classifier = model.register_module(
        "classifier", peft::internal::unset_linear(config.hidden_size(), config.num_labels()));
  }

  nn::Dropout dropout{nullptr};
  Linear classifier{nullptr};
};

/// A linear layer on every token's last hidden state.
template <class Family>
struct SpanHead {
  static constexpr bool with_pooler = false;
  static std::vector<std::string> paths() { return {"qa_outputs"}; }
  void build(nn::Module& model, const typename Family::Config& config) {
    qa_outputs = model.register_module("qa_outputs", peft::internal::unset_linear(config.hidden_size(), 2));
  }

  Linear qa_outputs{nullptr};
};

/// A classifier of texts, or a regression on them: transformers' `…ForSequenceClassification`. Its loss is
/// the family's, `classification_loss` or one like it. The family's head has `Tensor score(EncoderOutput)`,
/// the logits. Constructing a task draws transformers' initial values.
template <class Family>
class ForSequenceClassificationImpl
    : public EncoderTask<ForSequenceClassificationImpl<Family>, Family, typename Family::TextHead> {
 public:
  using ForSequenceClassificationImpl::EncoderTask::EncoderTask;
  static constexpr const char* task = "ForSequenceClassification";
  static constexpr const char* task_type = "SEQ_CLS";
  static constexpr bool has_labels = true;

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    auto output = this->encode(inputs);
    output.logits = this->score(output);
    if (inputs.labels.defined()) {
      output.loss =
          Family::text_loss(output.logits, this->repeated(inputs.labels), this->config.problem_type());
    }
    return output;
  }
};

/// A classifier of tokens: transformers' `…ForTokenClassification`. Its loss is `token_loss`, on the text's
/// own tokens.
template <class Family>
class ForTokenClassificationImpl
    : public EncoderTask<ForTokenClassificationImpl<Family>, Family, TokenHead<Family>> {
 public:
  using ForTokenClassificationImpl::EncoderTask::EncoderTask;
  static constexpr const char* task = "ForTokenClassification";
  static constexpr const char* task_type = "TOKEN_CLS";
  static constexpr bool has_labels = true;

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    auto output = this->encode(inputs);
    output.logits = this->classifier->forward(this->dropout->forward(output.last_hidden_state));
    if (inputs.labels.defined()) {
      output.loss = token_loss(real_tokens(output.logits, output), this->repeated(inputs.labels));
    }
    return output;
  }
};

/// Finds the answer to a question in a text: transformers' `…ForQuestionAnswering`. Its loss is `span_loss`,
/// on the text's own tokens. (Python PEFT counts an answer's positions from a prompt's first
/// virtual token: a prompt trained there finds answers that many tokens too early here.)
template <class Family>
class ForQuestionAnsweringImpl
    : public EncoderTask<ForQuestionAnsweringImpl<Family>, Family, SpanHead<Family>> {
 public:
  using ForQuestionAnsweringImpl::EncoderTask::EncoderTask;
  static constexpr const char* task = "ForQuestionAnswering";
  static constexpr const char* task_type = "QUESTION_ANS";
  static constexpr bool has_labels = false;

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    const bool asks = inputs.start_positions.defined();
    TORCH_CHECK_VALUE(asks == inputs.end_positions.defined() && !inputs.labels.defined(),
                      this->architecture(), ": a loss needs start_positions and end_positions, but got ",
                      inputs.labels.defined() ? "labels" : "one of them");
    auto texts = inputs;
    texts.start_positions = texts.end_positions = Tensor();
    auto output = this->base_model->forward(texts);
    const auto logits = this->qa_outputs->forward(output.last_hidden_state);
    output.start_logits = logits.select(2, 0);
    output.end_logits = logits.select(2, 1);
    if (asks) {
      output.loss =
          span_loss(real_tokens(output.start_logits, output), real_tokens(output.end_logits, output),
                    this->repeated(inputs.start_positions), this->repeated(inputs.end_positions));
    }
    return output;
  }
};

/// Finds the words under masks: transformers' `…ForMaskedLM`. Its loss is `token_loss`, on the text's own
/// tokens. The family's head has `Tensor transform(hidden)`, what the output layer sees, `Linear& decoder()`,
/// that layer, whose weight is the word vectors where the config ties them, `has_decoder()`, whether
/// transformers' head has such a layer, and `aliases()`, for `Pretrained`.
template <class Family>
class ForMaskedLMImpl : public EncoderTask<ForMaskedLMImpl<Family>, Family, typename Family::WordHead,
                                           TiedOutput<ForMaskedLMImpl<Family>>> {
 public:
  using Task = typename ForMaskedLMImpl::EncoderTask;
  using typename Task::Config;
  static constexpr const char* task = "ForMaskedLM";
  static constexpr const char* task_type = "";  // Python PEFT has none
  static constexpr bool has_labels = false;

  explicit ForMaskedLMImpl(Config settings) : ForMaskedLMImpl(std::move(settings), Unset()) {
    peft::internal::initialize(*this->base_model, this->config.initializer_range());
    initialize_head();
  }
  ForMaskedLMImpl(Config settings, Unset) : Task(std::move(settings), Unset()) { this->tie_output(); }

  void reset() override {
    Task::reset();
    this->tie_output();
  }

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    auto output = this->encode(inputs);
    const auto hidden = this->base_model->embeddings->output->leave(output.last_hidden_state);
    output.logits = TiedOutput<ForMaskedLMImpl>::score(this->transform(hidden));
    if (inputs.labels.defined()) {
      output.loss = token_loss(real_tokens(output.logits, output), this->repeated(inputs.labels));
    }
    return output;
  }

  std::vector<std::pair<std::string, std::string>> tied() const override {
    if (!this->config.tie_word_embeddings()) return {};
    const std::string words = std::string(Family::prefix) + ".embeddings.word_embeddings.weight";
    return {{Family::WordHead::decoder_path() + ".weight", words}};
  }
  std::vector<std::pair<std::string, std::string>> aliases() const override {
    return Family::WordHead::aliases();
  }
  ModelDescription describe() const override {
    auto description = Task::describe();
    const auto kind = !Family::WordHead::has_decoder()     ? SecondName::Kind::only
                      : this->config.tie_word_embeddings() ? SecondName::Kind::same
                                                           : SecondName::Kind::unused;
    for (const auto& [second, own] : aliases()) description.second_names.push_back({second, own, kind});
    return description;
  }
  /// Leaves a tied matrix to the words.
  void initialize_head() override {
    const auto modules = this->named_modules("", /*include_self=*/false);
    const nn::Module* left = this->is_tied() ? this->decoder().get() : nullptr;
    for (const auto& path : this->head()) {
      peft::internal::initialize(*modules[path], this->config.initializer_range(), left);
    }
  }

  // What TiedOutput asks for.
  Embedding& words() { return this->base_model->embeddings->word_embeddings; }
  Linear& output_layer() { return this->decoder(); }
};

/// Holder of a task of a family.
///
/// Example:
/// ```
/// auto model = peft::models::BertForSequenceClassification::from_pretrained(directory, /*labels=*/10);
/// auto logits = model->forward({ids, {}, mask}).logits;
/// ```
template <class Task>
class EncoderTaskHolder : public nn::ModuleHolder<Task> {
 public:
  using nn::ModuleHolder<Task>::ModuleHolder;
  using Impl = Task;

  /// Reads a Hugging Face folder. `labels`: how many; by default as many as the config says. A head the
  /// folder does not have is drawn as transformers draws it. The model is frozen and in evaluation mode; call
  /// `train()` before training an adapter with dropout. Throws: what PretrainedFolder, the config's `read`
  /// and load_pretrained throw.
  static EncoderTaskHolder from_pretrained(const std::filesystem::path& directory,
                                           std::optional<int64_t> labels = {},
                                           const PretrainedOptions& options = {}) requires Task::has_labels {
    return read(directory, labels, options);
  }
  /// The same of a task without labels.
  static EncoderTaskHolder from_pretrained(
      const std::filesystem::path& directory,
      const PretrainedOptions& options = {}) requires(!Task::has_labels) {
    return read(directory, {}, options);
  }

 private:
  static EncoderTaskHolder read(const std::filesystem::path& directory, std::optional<int64_t> labels,
                                const PretrainedOptions& options) {
    const PretrainedFolder folder(directory);
    auto config = peft::internal::read_config<typename Task::Kind>(folder, options);
    if (labels) config.num_labels(*labels);
    return peft::internal::filled(EncoderTaskHolder(config, Unset()), folder, options);
  }
};

}  // namespace peft::models
