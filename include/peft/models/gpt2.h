// GPT-2: the decoder and its language model, built from sites.
#pragma once

#include "peft/core/activation.h"
#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/checkpointing.h"
#include "peft/core/input.h"
#include "peft/models/decoder.h"
#include "peft/models/encoder.h"
#include "peft/models/gpt2_config.h"
#include "peft/models/gpt2_layers.h"
#include "peft/models/pretrained.h"
#include "peft/models/tied_output.h"

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// The decoder: `GPT2Model` of transformers. Constructing it draws transformers' initial values.
/// Paper: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, §2.3.
class GPT2ModelImpl : public nn::Cloneable<GPT2ModelImpl>, public Pretrained {
 public:
  /// For those who set the values next.
  struct Unset {};

  explicit GPT2ModelImpl(GPT2Config settings) : GPT2ModelImpl(std::move(settings), Unset()) { draw(); }
  GPT2ModelImpl(GPT2Config settings, Unset) : config(std::move(settings)) { GPT2ModelImpl::reset(); }

  void reset() override {
    const auto width = config.n_embd();
    const nn::EmbeddingOptions words(config.vocab_size(), width), positions(config.n_positions(), width);
    wte = register_module("wte", peft::internal::unset_embedding(words));
    wpe = register_module("wpe", peft::internal::unset_embedding(positions));
    drop = register_module("drop", nn::Dropout(config.embd_pdrop()));
    const auto sites =
        InputOptions(width).positions(config.n_positions()).layers(config.n_layer()).heads(config.n_head());
    input = register_module("input", InputEmbeddings(sites));
    output = register_module("output", EmbeddingOutput(sites));
    input->set_vocabulary(wte.ptr());
    output->set_vocabulary(wte.ptr());
    h = register_module("h", nn::ModuleList());
    for (int64_t i = 0; i < config.n_layer(); ++i) h->push_back(GPT2Block(config, i));
    ln_f = register_module("ln_f", LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_epsilon())));
  }

  /// Throws: c10::ValueError for inputs that do not fit each other, the cache or the position table.
  GPT2Output forward(const GPT2Inputs& inputs) {
    const ForwardScope scope;
    check(inputs);
    GPT2Output result;
    auto cache = inputs.cache;
    const bool caches = inputs.use_cache || !cache.layers.empty();
    if (cache.layers.empty()) cache.layers.resize(static_cast<size_t>(config.n_layer()));
    const auto past = cache.length();

    // A cache has the rows of every branch already, and so have the tokens that go on from it.
    const auto branches = input->branches(), times = past == 0 ? branches : 1;
    const auto batch = (inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds).size(0);
    const auto each_branch = [times, batch](const Tensor& rows) {
      return peft::internal::repeated(rows, times, batch);
    };
    Embedded in{each_branch(inputs.inputs_embeds), each_branch(inputs.attention_mask),
                each_branch(inputs.position_ids), each_branch(inputs.token_type_ids), past};
    if (inputs.input_ids.defined()) {
      in.values = peft::internal::lookup(wte, each_branch(inputs.input_ids), "input_ids");
    }
    const auto given = in.values.size(1);
    in = input->forward(std::move(in));
    const auto placed = in.values.size(1);
    const bool counts = !in.positions.defined();
    embed(in, past - cache.unplaced);
    result.virtual_tokens = in.virtual_tokens;
    result.num_virtual_tokens = in.num_virtual_tokens;
    const auto bias = peft::internal::attention_bias(in.mask, in.values.scalar_type());

    const bool checkpoints = checkpointing_ && is_training() && torch::GradMode::is_enabled();
    TORCH_CHECK_VALUE(!checkpoints || !caches,
                      "GPT2Model: gradient_checkpointing needs a forward without a cache in training (hint: "
                      "use_cache = false, or torch::NoGradGuard to generate)");
    auto x = in.values;
    for (size_t i = 0; i < h->size(); ++i) {
      if (inputs.output_hidden_states) result.hidden_states.push_back(x);
      const auto run = [block = h[i], own = caches ? &cache.layers[i] : nullptr](const Tensor& hidden,
                                                                                 const Tensor& mask) {
        return block->as<GPT2Block>()->forward(hidden, mask, own);
      };
      x = checkpoints ? checkpoint(run, x, bias) : run(x, bias);
    }
    result.last_hidden_state = ln_f->forward(x);
    if (inputs.output_hidden_states) result.hidden_states.push_back(result.last_hidden_state);
    if (caches) {
      // A prefix, and virtual tokens that came after the positions, take none.
      if (past == 0 && counts) cache.unplaced = cache.length() - placed;
      cache.tokens += given;
      result.cache = std::move(cache);
    }
    return result;
  }

  /// Draws transformers' initial values: N(0, range²), and for the projections that end a sublayer N(0,
  /// range² / (2 layers)).
  void draw() {
    peft::internal::initialize(*this, config.initializer_range());
    torch::NoGradGuard no_grad;
    const auto range = config.initializer_range() / std::sqrt(2.0 * static_cast<double>(config.n_layer()));
    for (const auto& block : *h) {
      auto& layer = *block->as<GPT2Block>();
      for (auto* last : {&layer.attn->c_proj, &layer.mlp->c_proj}) {
        Tensor weight = (*last)->base->weight;
        weight.copy_(torch::empty(weight.sizes(), torch::kFloat32).normal_(0.0, range));
      }
    }
  }

  ModelDescription describe() const override { return {"FEATURE_EXTRACTION", name_or_path, "gpt2"}; }
  std::string architecture() const override { return "GPT2Model"; }
  void gradient_checkpointing(bool on) override { checkpointing_ = on; }
  nlohmann::ordered_json config_json() const override { return config.json(); }
  std::string base_prefix() const override { return "transformer"; }
  std::vector<std::string> others() const override {
    return {"lm_head.", "score.", "classifier.", "qa_outputs.", "multiple_choice_head."};
  }

  GPT2Config config;
  Embedding wte{nullptr}, wpe{nullptr};
  nn::Dropout drop{nullptr};
  InputEmbeddings input{nullptr};
  EmbeddingOutput output{nullptr};
  nn::ModuleList h{nullptr};
  LayerNorm ln_f{nullptr};

 private:
  /// Adds positions and types to the words, and lets the pieces after them work.
  void embed(Embedded& in, int64_t offset) {
    // One row of ids serves every row, unless each has adapters of its own.
    const auto time = in.values.size(1);
    if (!in.positions.defined()) {
      TORCH_CHECK_VALUE(offset + time <= config.n_positions(), "GPT2Model: a text must have at most ",
                        config.n_positions(), " tokens, virtual ones included, but got ", offset + time);
      const auto ids = torch::TensorOptions(torch::kLong).device(in.values.device());
      in.positions = torch::arange(offset, offset + time, ids).unsqueeze(0);
    }
    const auto rows = input->by_rows() ? in.values.size(0) : 1;
    in.values =
        in.values + peft::internal::lookup(wpe, peft::internal::for_rows(in.positions, rows), "position_ids");
    if (in.types.defined()) {
      in.values =
          in.values + peft::internal::lookup(wte, peft::internal::for_rows(in.types, rows), "token_type_ids");
    }
    in.values = drop->forward(in.values);
    in = output->forward(std::move(in));
  }

  void check(const GPT2Inputs& inputs) const {
    TORCH_CHECK_VALUE(inputs.input_ids.defined() != inputs.inputs_embeds.defined(),
                      "GPT2Model: expected either input_ids or inputs_embeds, but got ",
                      inputs.input_ids.defined() ? "both" : "neither");
    const auto& tokens = inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds;
    TORCH_CHECK_VALUE(tokens.dim() == (inputs.input_ids.defined() ? 2 : 3) && tokens.size(1) > 0,
                      inputs.input_ids.defined()
                          ? "GPT2Model: input_ids must be (batch, time), but got "
                          : "GPT2Model: inputs_embeds must be (batch, time, n_embd), but got ",
                      peft::internal::shape_text(tokens.sizes()));
    const auto batch = tokens.size(0), time = tokens.size(1);
    const auto check_shape = [batch](const Tensor& tensor, const char* name, int64_t length, bool one_row) {
      if (!tensor.defined()) return;
      const bool fits = tensor.dim() == 2 && tensor.size(1) == length &&
                        (tensor.size(0) == batch || (one_row && tensor.size(0) == 1));
      TORCH_CHECK_VALUE(fits, "GPT2Model: ", name, " must be ",
                        peft::internal::shape_text(std::vector<int64_t>{batch, length}), ", but got ",
                        peft::internal::shape_text(tensor.sizes()));
    };
    TORCH_CHECK_VALUE(!inputs.labels.defined() && inputs.logits_to_keep == 0,
                      "GPT2Model: labels and logits_to_keep are a head's, but ",
                      inputs.labels.defined() ? "labels were" : "logits_to_keep was",
                      " given (hint: GPT2LMHeadModel)");
    const auto& cache = inputs.cache;
    check_shape(inputs.attention_mask, "attention_mask", cache.tokens + time, false);
    check_shape(inputs.token_type_ids, "token_type_ids", time, true);
    check_shape(inputs.position_ids, "position_ids", time, true);
    TORCH_CHECK_VALUE(cache.layers.empty() || cache.layers.size() == h->size(), "GPT2Model: a cache of ",
                      h->size(), " layers was expected, but got ", cache.layers.size());
    TORCH_CHECK_VALUE(cache.length() == 0 || cache.layers.front().k.size(0) == batch,
                      "GPT2Model: the cache must have ", batch, " rows, but got ",
                      cache.length() ? cache.layers.front().k.size(0) : 0);
  }

  bool checkpointing_ = false;
};

/// Holder of `GPT2ModelImpl`.
class GPT2Model : public nn::ModuleHolder<GPT2ModelImpl> {
 public:
  using nn::ModuleHolder<GPT2ModelImpl>::ModuleHolder;
  using Impl = GPT2ModelImpl;

  /// Reads a Hugging Face folder, with or without a head. The model is frozen and in evaluation mode; call
  /// `train()` before training an adapter with dropout. Throws: what PretrainedFolder, GPT2Config::read and
  /// load_pretrained throw.
  static GPT2Model from_pretrained(const std::filesystem::path& directory,
                                   const PretrainedOptions& options = {}) {
    const PretrainedFolder folder(directory);
    const auto config = peft::internal::read_config<GPT2Config>(folder, options);
    return peft::internal::filled(GPT2Model(config, GPT2ModelImpl::Unset()), folder, options);
  }
};

/// The decoder and a linear head without a bias, whose weight is the word vectors where the config ties them:
/// `GPT2LMHeadModel` of transformers. Constructing it draws transformers' initial values.
///
/// A tied `lm_head.weight` is a frozen view of `transformer.wte.weight`: while the word vectors train, the
/// head's gradient reaches them directly. Merging an adapter on one of the two leaves the other as it is.
class GPT2LMHeadModelImpl : public TiedOutput<GPT2LMHeadModelImpl>, public Pretrained {
 public:
  using Inputs = GPT2Inputs;
  using Unset = GPT2ModelImpl::Unset;

  explicit GPT2LMHeadModelImpl(GPT2Config settings) : GPT2LMHeadModelImpl(std::move(settings), Unset()) {
    transformer->draw();
    if (!config.tie_word_embeddings()) initialize_head();
  }
  GPT2LMHeadModelImpl(GPT2Config settings, Unset) : config(std::move(settings)) {
    GPT2LMHeadModelImpl::reset();
  }

  void reset() override {
    transformer = register_module("transformer", GPT2Model(config, Unset()));
    lm_head = register_module(
        "lm_head", peft::internal::unset_linear(config.n_embd(), config.vocab_size(), /*bias=*/false));
    tie_output();
  }

  GPT2Output forward(const GPT2Inputs& inputs) {
    const ForwardScope scope;
    TORCH_CHECK_VALUE(inputs.logits_to_keep >= 0,
                      "GPT2LMHeadModel: logits_to_keep must be at least 0, but got ", inputs.logits_to_keep);
    TORCH_CHECK_VALUE(!inputs.labels.defined() || inputs.logits_to_keep == 0,
                      "GPT2LMHeadModel: labels need the logits of all tokens, but got logits_to_keep ",
                      inputs.logits_to_keep);
    auto texts = inputs;
    texts.labels = Tensor();
    texts.logits_to_keep = 0;
    auto result = transformer->forward(texts);
    auto hidden = result.last_hidden_state;
    if (inputs.logits_to_keep) hidden = hidden.slice(1, -inputs.logits_to_keep);
    hidden = transformer->output->leave(hidden);
    result.logits = score(hidden);
    if (inputs.labels.defined())
      result.loss =
          causal_loss(result.logits,
                      peft::internal::repeated(inputs.labels, transformer->input->branches(),
                                               result.logits.size(0) / transformer->input->branches()),
                      result.virtual_tokens);
    return result;
  }

  ModelDescription describe() const override { return {"CAUSAL_LM", name_or_path, "gpt2"}; }
  std::string architecture() const override { return "GPT2LMHeadModel"; }
  void gradient_checkpointing(bool on) override { transformer->gradient_checkpointing(on); }
  nlohmann::ordered_json config_json() const override { return config.json(); }
  std::string base_prefix() const override { return "transformer"; }
  std::vector<std::string> head() const override {
    return config.tie_word_embeddings() ? std::vector<std::string>{} : std::vector<std::string>{"lm_head"};
  }
  std::vector<std::string> others() const override {
    return {"score.", "classifier.", "qa_outputs.", "multiple_choice_head."};
  }
  void initialize_head() override { peft::internal::initialize(*lm_head, config.initializer_range()); }
  std::vector<std::pair<std::string, std::string>> tied() const override {
    if (!config.tie_word_embeddings()) return {};
    return {{"lm_head.weight", "transformer.wte.weight"}};
  }

  GPT2Config config;
  GPT2Model transformer{nullptr};
  Linear lm_head{nullptr};

  // What TiedOutput asks for.
  Embedding& words() { return transformer->wte; }
  Linear& output_layer() { return lm_head; }
};

/// Holder of `GPT2LMHeadModelImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::GPT2LMHeadModel::from_pretrained("distilgpt2");
/// auto texts = peft::models::generate(model, ids, peft::models::GenerateOptions().max_new_tokens(30));
/// ```
class GPT2LMHeadModel : public nn::ModuleHolder<GPT2LMHeadModelImpl> {
 public:
  using nn::ModuleHolder<GPT2LMHeadModelImpl>::ModuleHolder;
  using Impl = GPT2LMHeadModelImpl;

  /// Reads a Hugging Face folder, with or without the base prefix and a head of its own. A head the folder
  /// does not have is the word vectors, or drawn where the config does not tie them. The model is frozen and
  /// in evaluation mode; call `train()` before training an adapter with dropout. Throws: what
  /// PretrainedFolder, GPT2Config::read and load_pretrained throw.
  static GPT2LMHeadModel from_pretrained(const std::filesystem::path& directory,
                                         const PretrainedOptions& options = {}) {
    const PretrainedFolder folder(directory);
    const auto config = peft::internal::read_config<GPT2Config>(folder, options);
    return peft::internal::filled(GPT2LMHeadModel(config, GPT2ModelImpl::Unset()), folder, options);
  }
};

}  // namespace peft::models
