// InputEmbeddings and EmbeddingOutput: the sites where virtual tokens and hidden states enter a model.
#pragma once

#include "peft/core/activation_site.h"

namespace peft {

/// Tokens on their way into a model. Undefined members are absent.
struct Embedded {
  Tensor values;     ///< word vectors (batch, time, width), before positions, types and norm
  Tensor mask;       ///< (batch, time), 1 for real tokens
  Tensor positions;  ///< position ids (batch or 1, time)
  Tensor types;      ///< token type ids (batch, time)
};

/// Nothing to set: the site takes its shapes from its input.
struct InputOptions {};

/// Word vectors before positions, types and norm: where Hugging Face PEFT's virtual tokens enter.
class InputEmbeddingsImpl : public internal::ActivationSite<InputEmbeddingsImpl> {
 public:
  explicit InputEmbeddingsImpl(InputOptions settings = {}) : options(settings) {}
  SiteInfo base_info() const override {
    SiteInfo info;
    info.layer = "InputEmbeddings";
    info.offers = {Needs::input};
    return info;
  }
  Embedded forward(Embedded embedded) { return embedded; }
  InputOptions options;
};

/// Hidden states after positions, types and norm: where AdapterHub's prompts enter.
class EmbeddingOutputImpl : public internal::ActivationSite<EmbeddingOutputImpl> {
 public:
  explicit EmbeddingOutputImpl(InputOptions settings = {}) : options(settings) {}
  SiteInfo base_info() const override {
    SiteInfo info;
    info.layer = "EmbeddingOutput";
    info.offers = {Needs::input};
    return info;
  }
  Embedded forward(Embedded embedded) { return embedded; }
  InputOptions options;
};

/// Holder of `InputEmbeddingsImpl`.
class InputEmbeddings : public nn::ModuleHolder<InputEmbeddingsImpl> {
 public:
  using nn::ModuleHolder<InputEmbeddingsImpl>::ModuleHolder;
  using Impl = InputEmbeddingsImpl;
};

/// Holder of `EmbeddingOutputImpl`.
class EmbeddingOutput : public nn::ModuleHolder<EmbeddingOutputImpl> {
 public:
  using nn::ModuleHolder<EmbeddingOutputImpl>::ModuleHolder;
  using Impl = EmbeddingOutputImpl;
};

}  // namespace peft
