// Prompt ensembling: the prompts of several adapters in one forward, and their vote.
#pragma once

#include <ATen/ops/one_hot.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/input.h"
#include "peft/model/active.h"

namespace peft {

/// Several prompts of one model, each an adapter (with a head of its own, if it has one), in one forward of a
/// batch that holds every text once a prompt. Inference only.
/// Paper: The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, §6.
///
/// Example:
/// ```
/// peft::PromptEnsemble ensemble(*model, {"one", "two", "three"});
/// auto logits = ensemble.forward(ids.size(0), [&] {
///   return model->forward({ensemble.repeat(ids), {}, ensemble.repeat(mask)}).logits;
/// });  // (3, batch, labels)
/// auto labels = peft::majority(logits);  // (batch)
/// ```
/// Throws: c10::ValueError for fewer than two adapters, one that is unknown, twice there or has no prompt,
/// and prompts of different lengths.
class PromptEnsemble {
 public:
  PromptEnsemble(nn::Module& model, std::vector<std::string> names) : names_(std::move(names)) {
    internal::Problems problems;
    if (names_.size() < 2)
      problems.add("adapters must be at least 2, but got " + std::to_string(names_.size()));
    const auto known = internal::adapter_names(model);
    int64_t length = 0;
    for (size_t i = 0; i < names_.size(); ++i) {
      const auto& name = names_[i];
      if (std::find(names_.begin(), names_.begin() + static_cast<std::ptrdiff_t>(i), name) !=
          names_.begin() + static_cast<std::ptrdiff_t>(i)) {
        problems.add("'" + name + "' is named twice");
      } else if (std::find(known.begin(), known.end(), name) == known.end()) {
        problems.add("the model has no adapter '" + name + "'");
      } else {
        int64_t own = 0;
        for (const auto& piece : adapter(model, name).layers<PromptPieceImpl>())
          own += piece->num_virtual_tokens();
        if (own == 0) {
          problems.add("adapter '" + name + "' has no prompt");
        } else if (length != 0 && own != length) {
          problems.add("prompts must be of one length, " + std::to_string(length) + ", but '" + name +
                       "' has " + std::to_string(own) + " virtual tokens");
        } else {
          length = own;
        }
      }
    }
    problems.raise("PromptEnsemble");
  }

  int64_t members() const { return static_cast<int64_t>(names_.size()); }

  /// Every row once a prompt, those of one prompt together: (batch, …) → (members · batch, …). Undefined
  /// stays undefined.
  Tensor repeat(const Tensor& rows) const { return internal::repeated(rows, members()); }

  /// What a model gives for a repeated batch: `run()` (members · batch, …) → (members, batch, …). `batch`:
  /// texts, before they were repeated.
  template <class Run>
  Tensor forward(int64_t batch, const Run& run) const {
    std::vector<std::string> rows;
    for (const auto& name : names_) rows.insert(rows.end(), static_cast<size_t>(batch), name);
    const RowAdapters scope(std::move(rows));
    const Tensor result = run();
    TORCH_CHECK_VALUE(result.size(0) == members() * batch, "PromptEnsemble: the outputs must have ",
                      members() * batch, " rows, but got ", result.size(0),
                      " (hint: give the model repeat(…) of every input)");
    auto shape = result.sizes().vec();
    shape[0] = batch;
    shape.insert(shape.begin(), members());
    return result.reshape(shape);
  }

 private:
  std::vector<std::string> names_;
};

/// The label most members choose; of several the one with the highest mean probability.
/// Shapes: logits (members, batch, labels); (batch).
inline Tensor majority(const Tensor& logits) {
  const auto votes = at::one_hot(logits.argmax(-1), logits.size(-1)).sum(0);
  return (votes.to(torch::kFloat64) + logits.softmax(-1, torch::kFloat64).mean(0)).argmax(-1);
}

}  // namespace peft
