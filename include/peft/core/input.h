// InputEmbeddings and EmbeddingOutput: the sites where virtual tokens and hidden states enter a model.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "peft/core/activation_site.h"
#include "peft/core/input_options.h"

namespace peft {

/// Tokens on their way into a model. Undefined members are absent.
struct Embedded {
  Tensor values;     ///< word vectors (batch, time, width), before positions, types and norm
  Tensor mask;       ///< (batch, time), 1 for real tokens; with a cache of the cached tokens too
  Tensor positions;  ///< position ids (batch or 1, time); undefined: counted from the tokens as they are
  Tensor types;      ///< token type ids (batch, time)
  int64_t past = 0;  ///< tokens in the cache; a prompt enters only where there are none
  Tensor virtual_tokens = {};      ///< (batch or 1, time), true where a piece put a token; undefined: nowhere
  Tensor tasks = {};               ///< (batch), of `TaskIds`
  int64_t num_virtual_tokens = 0;  ///< how many of a row's tokens pieces put in: known without their device
};

/// While it lives, each row of this thread's batches belongs to a task: for methods with tensors of each task
/// (`MultitaskPromptOptions`).
///
/// Example:
/// ```
/// peft::TaskIds tasks(torch::tensor({0, 2}));
/// auto logits = model->forward(batch_of_two).logits;
/// ```
/// Throws: c10::ValueError for ids that are not whole numbers, one a row.
class TaskIds {
 public:
  explicit TaskIds(Tensor ids) : ids_(std::move(ids)), outer_(current_) {
    TORCH_CHECK_VALUE(ids_.defined() && ids_.dim() == 1 && at::isIntegralType(ids_.scalar_type(), false),
                      "TaskIds: ids must be whole numbers (batch), but got ",
                      ids_.defined() ? internal::shape_text(ids_.sizes()) : "none");
    current_ = this;
  }
  ~TaskIds() { current_ = outer_; }
  TaskIds(const TaskIds&) = delete;
  TaskIds& operator=(const TaskIds&) = delete;

  /// The ids in force on this thread, or an undefined tensor.
  static Tensor current() { return current_ ? current_->ids_ : Tensor(); }

 private:
  static inline thread_local const TaskIds* current_ = nullptr;
  Tensor ids_;
  const TaskIds* outer_;
};

/// A piece on tokens that enter a model.
class InputPieceImpl : public ActivationPieceImpl {
 public:
  using ActivationPieceImpl::ActivationPieceImpl;

  /// Puts virtual tokens before the real ones, changes values, shifts positions.
  virtual Embedded embed(Embedded) = 0;
  /// Undoes it on the last hidden states, before a language model's output layer (`EmbeddingOutput`).
  virtual Tensor leave(const Tensor& hidden) { return hidden; }
};

/// A piece that puts virtual tokens into a text: into its mask, and with the first tokens only where there is
/// a cache. Positions are counted anew, types dropped or 0 (`InputOptions::keeps_types`), as Hugging Face
/// PEFT does.
class PromptPieceImpl : public InputPieceImpl {
 public:
  using InputPieceImpl::InputPieceImpl;

  /// The vectors of the virtual tokens for this batch: (batch or 1, tokens, width).
  virtual Tensor prompt(const Embedded&) = 0;
  virtual int64_t num_virtual_tokens() const = 0;
  /// True where the text's first token stays the first.
  virtual bool after_first() const { return false; }

  Embedded embed(Embedded in) override {
    const auto count = num_virtual_tokens(), at = static_cast<int64_t>(after_first());
    const auto insert = [at](const Tensor& row, const Tensor& added) {
      return torch::cat({row.slice(1, 0, at), added, row.slice(1, at)}, 1);
    };
    const auto fill = [&](const Tensor& row, int64_t value) {
      return insert(row, torch::full({row.size(0), count}, value, row.options()));
    };
    const bool embedded = site().input && site().input->embedded();
    if (in.mask.defined()) in.mask = fill(in.mask, 1);
    if (!embedded) in.positions = Tensor();
    if (!embedded && !(site().input && site().input->keeps_types())) in.types = Tensor();
    if (in.past > 0) return in;

    const auto added = prompt(in).to(in.values.scalar_type());
    if (in.types.defined() && !embedded) in.types = fill(in.types, 0);
    if (!in.virtual_tokens.defined()) {
      in.virtual_tokens = torch::zeros({1, in.values.size(1)}, in.values.options().dtype(torch::kBool));
    }
    in.virtual_tokens = fill(in.virtual_tokens, 1);
    in.values = insert(in.values, added.expand({in.values.size(0), -1, -1}));
    return in;
  }

  /// float32 as in the reference, whatever the base's half type; float64 in a model of that.
  void place() override { internal::place_in_float32(*this, site()); }
};

namespace internal {

/// A site whose base is its model's word vectors, for methods that begin with rows of them.
class VocabularyView final : public NoLayer {
 public:
  VocabularyView(std::string path, Tensor words) : NoLayer(std::move(path)), words_(std::move(words)) {}
  Weights weights() const override { return words_.defined() ? Weights{words_, {}} : NoLayer::weights(); }

 private:
  Tensor words_;
};

/// The word embeddings of the model a site lies in. Not the site's own: a site that is assigned another's
/// state, as in a clone, keeps its model's.
class Vocabulary {
 public:
  Vocabulary() = default;
  Vocabulary(const Vocabulary&) {}
  Vocabulary& operator=(const Vocabulary&) { return *this; }
  ~Vocabulary() = default;

  void set(std::shared_ptr<const SiteImpl> words) { words_ = std::move(words); }
  /// (words, width), or undefined where the site lies in no model.
  Tensor weight() const { return words_ ? words_->base_weights().weight : Tensor(); }

 private:
  std::shared_ptr<const SiteImpl> words_;
};

/// The rows of a batch `times` times, one copy after the other; undefined stays undefined.
inline Tensor repeated(const Tensor& rows, int64_t times) {
  if (times == 1 || !rows.defined()) return rows;
  std::vector<int64_t> counts(static_cast<size_t>(rows.dim()), 1);
  counts[0] = times;
  return rows.repeat(counts);
}

/// The same of a model's input; one row that serves others stays one.
inline Tensor repeated(const Tensor& rows, int64_t times, int64_t batch) {
  return rows.defined() && rows.size(0) == batch ? repeated(rows, times) : rows;
}

/// What both sites do: hand the tokens to the pieces.
template <class Derived>
class InputSite : public ActivationSite<Derived> {
 public:
  InputSite(const char* layer, InputOptions settings) : options(settings), layer_(layer) {}

  /// The site of the model's word embeddings, whose rows prompts may begin with. A model sets it where it
  /// makes the two, so that its clones do too.
  void set_vocabulary(std::shared_ptr<const SiteImpl> words) { vocabulary_.set(std::move(words)); }

  SiteInfo base_info() const override {
    SiteInfo info;
    info.layer = layer_;
    info.offers = {Needs::input};
    info.width = options.width();
    info.input = options;
    if (const auto words = vocabulary_.weight(); words.defined()) {
      info.dtype = words.scalar_type();
      info.device = words.device();
    }
    return info;
  }

  std::unique_ptr<LayerView> base_view() const override {
    return std::make_unique<VocabularyView>(this->path(), vocabulary_.weight());
  }

  std::string refusal(const PieceTree& tree) const override { return stacks_only(tree); }

  Embedded forward(Embedded in) {
    const auto past = in.past, before = in.values.size(1) - in.num_virtual_tokens;
    auto tasks = TaskIds::current();
    if (tasks.defined() && in.values.size(0) > tasks.size(0)) tasks = repeated(tasks, this->branches());
    auto out = this->route(
        {in.values, in.mask, in.positions, in.types, in.virtual_tokens, tasks},
        [past](const SiteImpl::Flow& flow, const PieceTree& tree) {
          Embedded embedded{flow[0], flow[1], flow[2], flow[3], past, flow[4], flow[5]};
          tree.each([&](PieceImpl& piece) {
            embedded = dynamic_cast<InputPieceImpl&>(piece).embed(std::move(embedded));
          });
          return SiteImpl::Flow{embedded.values, embedded.mask,           embedded.positions,
                                embedded.types,  embedded.virtual_tokens, embedded.tasks};
        },
        [past, first = options.first_position()](size_t i, const SiteImpl::Flow& rows) {
          // Rows whose positions are counted, beside rows with a prefix.
          if (i != 2 || past != 0) return Tensor();
          const auto ids = rows[0].options().dtype(torch::kLong);
          return torch::arange(first, first + rows[0].size(1), ids).unsqueeze(0);
        });
    return {out[0], out[1], out[2], out[3], past, out[4], out[5], out[0].size(1) - before};
  }

  InputOptions options;

 private:
  const char* layer_;
  Vocabulary vocabulary_;
};

}  // namespace internal

/// Word vectors before positions, types and norm: where Hugging Face PEFT's virtual tokens enter.
class InputEmbeddingsImpl : public internal::InputSite<InputEmbeddingsImpl> {
 public:
  explicit InputEmbeddingsImpl(InputOptions settings) : InputSite("InputEmbeddings", settings) {}
};

/// Hidden states after positions, types and norm: where AdapterHub's prompts enter.
class EmbeddingOutputImpl : public internal::InputSite<EmbeddingOutputImpl> {
 public:
  explicit EmbeddingOutputImpl(InputOptions settings)
      : InputSite("EmbeddingOutput", settings.embedded(true)) {}

  /// The last hidden states on their way to a language model's output layer: what the pieces did to those
  /// that entered is undone where they can, the last piece first.
  Tensor leave(const Tensor& hidden) {
    return route({hidden},
                 [](const Flow& flow, const PieceTree& tree) -> Flow {
                   std::vector<PieceImpl*> pieces;
                   tree.each([&](PieceImpl& piece) { pieces.push_back(&piece); });
                   auto x = flow[0];
                   for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
                     x = dynamic_cast<InputPieceImpl&>(**piece).leave(x);
                   }
                   return {x};
                 })
        .front();
  }
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
