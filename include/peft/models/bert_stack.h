// BertStack: embeddings, blocks and pooler in one model, for the families that are built so.
#pragma once

#include "peft/models/bert_config.h"
#include "peft/models/bert_layers.h"
#include "peft/models/encoder.h"
#include "peft/models/encoder_task.h"
#include "peft/models/pretrained.h"

#include <torch/nn/cloneable.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace peft::models {

/// The encoder of a family: transformers' `BertModel` or `RobertaModel`. Constructing it draws transformers'
/// initial values.
template <class Family>
class BertStackImpl : public nn::Cloneable<BertStackImpl<Family>>, public Encoder {
 public:
  using Unset = models::Unset;

  /// Throws: c10::ValueError for another family's config.
  explicit BertStackImpl(BertConfig settings, bool with_pooler = true)
      : BertStackImpl(std::move(settings), with_pooler, Unset()) {
    peft::internal::initialize(*this, config.initializer_range());
  }
  BertStackImpl(BertConfig settings, bool with_pooler, Unset)
      : config(std::move(settings)), has_pooler(with_pooler) {
    Family::check(config);
    BertStackImpl::reset();
  }

  void reset() override {
    embeddings = this->register_module("embeddings", BertEmbeddings(config));
    encoder = this->register_module("encoder", BertEncoder(config));
    pooler = has_pooler ? this->register_module("pooler", BertPooler(config)) : BertPooler(nullptr);
  }

  EncoderOutput forward(const EncoderInputs& inputs) override {
    const ForwardScope scope;
    const auto embedded = embeddings->forward(inputs);
    const auto bias = peft::internal::attention_bias(embedded.mask, embedded.values.scalar_type());
    EncoderOutput output;
    output.virtual_tokens = embedded.virtual_tokens;
    output.num_virtual_tokens = embedded.num_virtual_tokens;
    output.last_hidden_state = encoder->forward(
        embedded.values, bias, inputs.output_hidden_states ? &output.hidden_states : nullptr);
    if (pooler) output.pooler_output = pooler->forward(output.last_hidden_state);
    return output;
  }

  ModelDescription describe() const override {
    return {"FEATURE_EXTRACTION", name_or_path, config.model_type()};
  }
  std::string architecture() const override { return Family::name(config) + "Model"; }
  void gradient_checkpointing(bool on) override { encoder->gradient_checkpointing = on; }
  nlohmann::ordered_json config_json() const override { return config.json(); }
  std::string base_prefix() const override { return Family::prefix; }
  std::vector<std::string> others() const override {
    auto keys = Family::heads();
    if (!has_pooler) keys.push_back("pooler.");
    return keys;
  }

  BertConfig config;
  bool has_pooler;
  BertEmbeddings embeddings{nullptr};
  BertEncoder encoder{nullptr};
  BertPooler pooler{nullptr};
};

/// Holder of `BertStackImpl`.
///
/// Example:
/// ```
/// auto model = peft::models::BertModel::from_pretrained("all-MiniLM-L6-v2");
/// auto vectors = peft::models::embed(model->forward({ids, {}, mask}).last_hidden_state, mask);
/// ```
template <class Family>
class BertStack : public nn::ModuleHolder<BertStackImpl<Family>> {
 public:
  using nn::ModuleHolder<BertStackImpl<Family>>::ModuleHolder;
  using Impl = BertStackImpl<Family>;

  /// Reads a Hugging Face folder, with or without a task head. The model is frozen and in evaluation mode;
  /// call `train()` before training an adapter with dropout. Throws: what PretrainedFolder, the config's
  /// `read` and load_pretrained throw.
  static BertStack from_pretrained(const std::filesystem::path& directory,
                                   const PretrainedOptions& options = {}) {
    const PretrainedFolder folder(directory);
    const auto config = peft::internal::read_config<Family>(folder, options);
    const auto& tensors = folder.tensors();
    const std::string pooler = "pooler.dense.weight";
    const bool pools = options.pooler().value_or(tensors.count(pooler) > 0 ||
                                                 tensors.count(Family::prefix + ("." + pooler)) > 0);
    return peft::internal::filled(BertStack(config, pools, Unset()), folder, options);
  }
};

}  // namespace peft::models
