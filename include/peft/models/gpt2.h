// GPT-2: the decoder and its language model, built from sites.
#pragma once

#include "peft/core/activation.h"
#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/checkpointing.h"
#include "peft/core/conv1d.h"
#include "peft/core/input.h"
#include "peft/core/residual.h"
#include "peft/models/decoder.h"
#include "peft/models/encoder.h"
#include "peft/models/gpt2_config.h"
#include "peft/models/pretrained.h"

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// One batch. Undefined members are absent.
struct GPT2Inputs {
  Tensor input_ids;      ///< (batch, time), or:
  Tensor inputs_embeds;  ///< (batch, time, n_embd), word vectors
  Tensor
      attention_mask;  ///< (batch, tokens in the cache + time), 0 where a token is padding; absent: none is
  Tensor token_type_ids;   ///< (batch or 1, time), looked up among the words; absent: none are added
  Tensor position_ids;     ///< (batch or 1, time); absent: go on from the cache's keys, padding counted
  Tensor labels;           ///< (batch, time), asks the language model for a loss; see `causal_loss`
  KeyValueCache cache;     ///< that an earlier forward returned: `input_ids` go on where it ended
  bool use_cache = false;  ///< asks for `GPT2Output::cache`
  bool output_hidden_states = false;  ///< asks for `GPT2Output::hidden_states`
  int64_t logits_to_keep = 0;         ///< of the last tokens only; 0: of all
};

/// What a forward gives. Undefined members are those the model does not have or was not asked for.
struct GPT2Output {
  Tensor last_hidden_state;           ///< (batch, time, n_embd), virtual tokens included
  std::vector<Tensor> hidden_states;  ///< of the embeddings and of every layer; the last is normed
  Tensor logits;                      ///< (batch, time, vocabulary)
  Tensor loss;                        ///< a scalar
  Tensor virtual_tokens;              ///< (batch or 1, time), true for those of a prompt; see `real_tokens`
  KeyValueCache cache;                ///< for the tokens that follow
};

// The parts of the model. Their weights have no values until the model they belong to draws or loads them.

/// The projections and the attention between them.
class GPT2AttentionImpl : public nn::Cloneable<GPT2AttentionImpl> {
 public:
  GPT2AttentionImpl(GPT2Config settings, int64_t index) : config(std::move(settings)), layer(index) {
    GPT2AttentionImpl::reset();
  }

  void reset() override {
    const auto width = config.n_embd(), heads = config.n_head();
    c_attn = register_module("c_attn", peft::internal::unset_conv1d(width, 3 * width));
    c_proj = register_module("c_proj", peft::internal::unset_conv1d(width, width));
    attention = register_module("attention", Attention(AttentionOptions(heads, width / heads)
                                                           .layer(layer)
                                                           .role(AttentionRole::decoder)
                                                           .dropout(config.attn_pdrop())
                                                           .causal(true)));
    resid_dropout = register_module("resid_dropout", nn::Dropout(config.resid_pdrop()));
  }

  /// `cache`: of this layer, extended; or nullptr.
  Tensor forward(const Tensor& x, const Tensor& bias, KeyValues* cache) {
    const auto projected = c_attn->forward(x).split(config.n_embd(), 2);
    const auto heads = [&](const Tensor& y) {
      return y.view({y.size(0), y.size(1), config.n_head(), -1}).transpose(1, 2);
    };
    auto q = heads(projected[0]);
    if (rescale() != 1.0) q = q * rescale();
    const auto y = attention->forward(q, heads(projected[1]), heads(projected[2]), bias, cache, x);
    return resid_dropout->forward(c_proj->forward(y));
  }

  GPT2Config config;
  int64_t layer;
  Conv1D c_attn{nullptr}, c_proj{nullptr};
  Attention attention{nullptr};
  nn::Dropout resid_dropout{nullptr};

 private:
  /// By what the scores differ from qkᵀ / sqrt(head width).
  double rescale() const {
    const auto width = static_cast<double>(config.n_embd() / config.n_head());
    const double scale = config.scale_attn_weights() ? 1.0 : std::sqrt(width);
    return config.scale_attn_by_inverse_layer_idx() ? scale / static_cast<double>(layer + 1) : scale;
  }
};
TORCH_MODULE(GPT2Attention);

/// The feed-forward network.
class GPT2MLPImpl : public nn::Cloneable<GPT2MLPImpl> {
 public:
  explicit GPT2MLPImpl(GPT2Config settings)
      : config(std::move(settings)), activation(models::activation_function(config.activation_function())) {
    GPT2MLPImpl::reset();
  }

  void reset() override {
    c_fc = register_module("c_fc", peft::internal::unset_conv1d(config.n_embd(), config.inner()));
    c_proj = register_module("c_proj", peft::internal::unset_conv1d(config.inner(), config.n_embd()));
    dropout = register_module("dropout", nn::Dropout(config.resid_pdrop()));
  }

  Tensor forward(const Tensor& x) { return dropout->forward(c_proj->forward(activation(c_fc->forward(x)))); }

  GPT2Config config;
  ActivationFunction activation;
  Conv1D c_fc{nullptr}, c_proj{nullptr};
  nn::Dropout dropout{nullptr};
};
TORCH_MODULE(GPT2MLP);

/// One block: attention, then the feed-forward network, each on normed input and joined without a norm.
class GPT2BlockImpl : public nn::Cloneable<GPT2BlockImpl> {
 public:
  GPT2BlockImpl(GPT2Config settings, int64_t index) : config(std::move(settings)), layer(index) {
    GPT2BlockImpl::reset();
  }

  void reset() override {
    const auto norm = nn::LayerNormOptions({config.n_embd()}).eps(config.layer_norm_epsilon());
    const auto join = [this](JoinRole role) {
      return BareResidual(ResidualOptions(config.n_embd()).place(JoinPlace{role, layer}));
    };
    ln_1 = register_module("ln_1", LayerNorm(norm));
    attn = register_module("attn", GPT2Attention(config, layer));
    attn_residual = register_module("attn_residual", join(JoinRole::attention));
    ln_2 = register_module("ln_2", LayerNorm(norm));
    mlp = register_module("mlp", GPT2MLP(config));
    mlp_residual = register_module("mlp_residual", join(JoinRole::feed_forward));
  }

  Tensor forward(const Tensor& x, const Tensor& bias, KeyValues* cache) {
    const auto attended = attn_residual->forward(attn->forward(ln_1->forward(x), bias, cache), x);
    return mlp_residual->forward(mlp->forward(ln_2->forward(attended)), attended);
  }

  GPT2Config config;
  int64_t layer;
  LayerNorm ln_1{nullptr}, ln_2{nullptr};
  GPT2Attention attn{nullptr};
  GPT2MLP mlp{nullptr};
  BareResidual attn_residual{nullptr}, mlp_residual{nullptr};
};
TORCH_MODULE(GPT2Block);

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
    const auto each = [rows](const Tensor& ids) { return ids.expand({std::max(rows, ids.size(0)), -1}); };
    in.values = in.values + peft::internal::lookup(wpe, each(in.positions), "position_ids");
    if (in.types.defined()) {
      in.values = in.values + peft::internal::lookup(wte, each(in.types), "token_type_ids");
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
class GPT2LMHeadModelImpl : public nn::Cloneable<GPT2LMHeadModelImpl>, public Pretrained {
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
    if (!config.tie_word_embeddings()) return;
    tie();
    lm_head->tie_to(transformer->wte.ptr());
  }

  GPT2Output forward(const GPT2Inputs& inputs) {
    const ForwardScope scope;
    TORCH_CHECK_VALUE(inputs.logits_to_keep >= 0,
                      "GPT2LMHeadModel: logits_to_keep must be at least 0, but got ", inputs.logits_to_keep);
    TORCH_CHECK_VALUE(!inputs.labels.defined() || inputs.logits_to_keep == 0,
                      "GPT2LMHeadModel: labels need the logits of all tokens, but got logits_to_keep ",
                      inputs.logits_to_keep);
    auto result = transformer->forward(inputs);
    auto hidden = result.last_hidden_state;
    if (inputs.logits_to_keep) hidden = hidden.slice(1, -inputs.logits_to_keep);
    hidden = transformer->output->leave(hidden);
    const auto& words = transformer->wte->base->weight;
    const bool directly = words.requires_grad() && is_tied() && lm_head->adapters().empty();
    result.logits = directly ? at::linear(hidden, words) : lm_head->forward(hidden);
    if (inputs.labels.defined())
      result.loss =
          causal_loss(result.logits,
                      peft::internal::repeated(inputs.labels, transformer->input->branches(),
                                               result.logits.size(0) / transformer->input->branches()),
                      result.virtual_tokens);
    return result;
  }

  /// True while the head's weight is the word vectors'.
  bool is_tied() const {
    return peft::internal::is_tied(lm_head->base->weight, transformer->wte->base->weight);
  }

  // What gives the tensors new memory, and ties them again.

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    tied_again([&] { nn::Module::to(device, dtype, non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    tied_again([&] { nn::Module::to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override {
    tied_again([&] { nn::Module::to(device, non_blocking); });
  }
  void load(torch::serialize::InputArchive& archive) override {
    nn::Module::load(archive);
    const bool same = torch::equal(lm_head->base->weight, transformer->wte->base->weight);
    if (config.tie_word_embeddings() && same) tie();
  }
  std::shared_ptr<nn::Module> clone(const peft::internal::OptionalDevice& device = {}) const override {
    auto copy = nn::Cloneable<GPT2LMHeadModelImpl>::clone(device);
    auto& model = *copy->as<GPT2LMHeadModelImpl>();
    if (is_tied()) model.tie();
    if (config.tie_word_embeddings()) model.lm_head->tie_to(model.transformer->wte.ptr());
    return copy;
  }

  ModelDescription describe() const override { return {"CAUSAL_LM", name_or_path, "gpt2"}; }
  std::string architecture() const override { return "GPT2LMHeadModel"; }
  void gradient_checkpointing(bool on) override { transformer->gradient_checkpointing(on); }
  nlohmann::ordered_json config_json() const override { return config.json(); }
  std::string base_prefix() const override { return "transformer"; }
  std::string head() const override { return config.tie_word_embeddings() ? "" : "lm_head"; }
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

 private:
  void tie() { peft::internal::tie(lm_head->base->weight, transformer->wte->base->weight); }
  template <class Change>
  void tied_again(const Change& change) {
    const bool tied = is_tied();
    change();
    if (tied) tie();
  }
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
