// TiedOutput: a model whose output layer's weight is its word vectors.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/compat.h"
#include "peft/models/pretrained.h"

#include <torch/nn/cloneable.h>
#include <torch/serialize.h>

#include <memory>

namespace peft::models {

/// A language model (`Derived`) that keeps its output layer's weight and its word vectors one matrix through
/// moves, loads and clones, where `config.tie_word_embeddings()` says so. `Derived` has `words()`, its
/// Embedding, and `output_layer()`, its Linear; its `reset` ends with `tie_output()`.
///
/// The tied weight is a frozen view of the words': while the word vectors train, the head's gradient reaches
/// them directly, unless the head has adapters or single tokens train. Merging an adapter on one of the two
/// leaves the other as it is.
template <class Derived>
class TiedOutput : public nn::Cloneable<Derived> {
 public:
  using nn::Cloneable<Derived>::Cloneable;

  /// True while the output layer's weight is the word vectors'.
  bool is_tied() const {
    auto& model = self();
    return peft::internal::is_tied(model.output_layer()->base->weight, model.words()->base->weight);
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
    auto& model = self();
    const bool same = torch::equal(model.output_layer()->base->weight, model.words()->base->weight);
    if (model.config.tie_word_embeddings() && same) tie();
  }
  std::shared_ptr<nn::Module> clone(const peft::internal::OptionalDevice& device = {}) const override {
    auto copy = nn::Cloneable<Derived>::clone(device);
    auto& model = *copy->template as<Derived>();
    if (was_tied()) model.tie_originals();
    if (model.config.tie_word_embeddings()) model.output_layer()->tie_to(model.words().ptr());
    return copy;
  }

 protected:
  /// Ties the two where the config says so.
  void tie_output() {
    if (!self().config.tie_word_embeddings()) return;
    tie();
    self().output_layer()->tie_to(self().words().ptr());
  }

  /// The scores of the words, of which the last hidden states are given.
  Tensor score(const Tensor& hidden) {
    auto& layer = self().output_layer();
    const auto& words = self().words()->base->weight;
    const bool directly = words.requires_grad() && is_tied() && layer->adapters().empty() && !tokens_train();
    return directly ? at::linear(hidden, words, layer->base->bias) : layer->forward(hidden);
  }

 private:
  /// True where an active adapter of the word vectors acts on the head too.
  bool tokens_train() const {
    const auto& words = self().words();
    const auto set = words->activation()->get();
    if (!set->enabled) return false;
    for (const auto& name : set->active) {
      for (const auto& attached : words->pieces(name)) {
        if (attached.piece->follows_ties()) return true;
      }
    }
    return false;
  }
  Derived& self() const { return const_cast<Derived&>(static_cast<const Derived&>(*this)); }
  void tie() { peft::internal::tie(self().output_layer()->base->weight, self().words()->base->weight); }
  /// The same of the two as they were before a merge.
  bool was_tied() const {
    return peft::internal::is_tied(self().output_layer()->original_weight(),
                                   self().words()->original_weight());
  }
  void tie_originals() { self().output_layer()->share_original(*self().words()); }
  template <class Change>
  void tied_again(const Change& change) {
    const bool tied = was_tied();
    change();
    if (tied) tie_originals();
  }
};

}  // namespace peft::models
