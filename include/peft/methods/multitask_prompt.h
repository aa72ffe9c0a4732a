// Multitask prompt tuning: a prompt that tasks share, scaled by a low-rank matrix of each task.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "peft/methods/prompt.h"

namespace peft {

/// What the prompt of a new task takes over from one trained on others.
enum class MultitaskSource : std::uint8_t {
  none,     ///< begin as `prompt` says
  average,  ///< the shared vectors, and the mean of the tasks' matrices: "AVERAGE_SOURCE_TASKS"
  exact,    ///< the shared vectors, and the matrices of one task: "EXACT_SOURCE_TASK"
  shared,   ///< the shared vectors: "ONLY_SOURCE_SHARED"
};

/// Settings of `MultitaskPrompt`. Defaults are Hugging Face's.
struct MultitaskPromptOptions {
  static constexpr Needs needs = Needs::input;
  static constexpr const char* method = "multitask_prompt";

  /// `tasks`: how many, at least 1. `prompt`: its length, and how the shared vectors begin.
  explicit MultitaskPromptOptions(PromptOptions prompt = PromptOptions(), int64_t tasks = 1)
      : prompt_(std::move(prompt)), tasks_(tasks) {}

  TORCH_ARG(PromptOptions, prompt);
  TORCH_ARG(int64_t, tasks);
  /// Rank k of a task's matrix, at least 1.
  TORCH_ARG(int64_t, rank) = 1;
  TORCH_ARG(MultitaskSource, source) = MultitaskSource::none;
  using Tensors = std::map<std::string, Tensor>;
  /// Of a source: its tensors by name, as its file has them. Example:
  /// `peft::load_safetensors("many_tasks/adapter_model.safetensors")`.
  TORCH_ARG(Tensors, source_tensors);
  /// Of `exact`: which task of the source.
  TORCH_ARG(int64_t, source_task) = 0;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const MultitaskPromptOptions& options) {
  check(options.prompt());
  TORCH_CHECK_VALUE(options.tasks() > 0, "MultitaskPromptOptions: tasks must be positive, but got ",
                    options.tasks());
  TORCH_CHECK_VALUE(options.rank() > 0, "MultitaskPromptOptions: rank must be positive, but got ",
                    options.rank());
  const auto source = options.source();
  TORCH_CHECK_VALUE(
      options.tasks() == 1 || (source != MultitaskSource::average && source != MultitaskSource::exact),
      "MultitaskPromptOptions: tasks must be 1 for what takes over a task's matrices, but got ",
      options.tasks());
  if (source == MultitaskSource::none) return;
  for (const char* name : {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}) {
    if (source == MultitaskSource::shared && std::string(name) != "prompt_embeddings") continue;
    TORCH_CHECK_VALUE(options.source_tensors().count(name),
                      "MultitaskPromptOptions: source_tensors must hold '", name, "', but there is none");
  }
  if (source != MultitaskSource::exact) return;
  const auto tasks = options.source_tensors().at("prefix_task_cols").size(0);
  TORCH_CHECK_VALUE(options.source_task() >= 0 && options.source_task() < tasks,
                    "MultitaskPromptOptions: source_task must be from 0 to ", tasks - 1, ", but got ",
                    options.source_task());
}

/// A prompt (`Prompt`) that is P ⊙ (U_t R_t) for a row of task t; which tasks, says `TaskIds`. With one task
/// it need not be said.
/// Shapes: prompt_embeddings (P): (V, width); prefix_task_cols (U): (tasks, V, k); prefix_task_rows (R):
/// (tasks, k, width). Trains: all. Count: V · width + tasks · k (V + width).
/// U and R ~ N(0, 0.02²), so that the product begins near 0.
/// Throws: c10::ValueError for options out of range, source tensors of another shape.
/// Paper: Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861, equation
/// 1, where the product begins at 1 and teachers are distilled. Reference: Hugging Face PEFT's
/// MULTITASK_PROMPT_TUNING.
class MultitaskPromptImpl : public Piece<MultitaskPromptImpl, MultitaskPromptOptions, PromptPieceImpl> {
 public:
  MultitaskPromptImpl(MultitaskPromptOptions settings, const SiteInfo& site)
      : Piece(MultitaskPromptOptions::method, std::move(settings), site) {
    check(options);
    const auto length = options.prompt().num_virtual_tokens(), tasks = options.tasks(), k = options.rank();
    internal::check_room(length, site);
    prompt_embeddings = register_parameter("prompt_embeddings", torch::empty({length, site.width}));
    prefix_task_cols = register_parameter("prefix_task_cols", torch::empty({tasks, length, k}));
    prefix_task_rows = register_parameter("prefix_task_rows", torch::empty({tasks, k, site.width}));
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    internal::start_prompt(prompt_embeddings, options.prompt(), base);
    prefix_task_cols.normal_(0, 0.02);
    prefix_task_rows.normal_(0, 0.02);
    if (options.source() == MultitaskSource::none) return;
    take("prompt_embeddings", prompt_embeddings);
    if (options.source() == MultitaskSource::shared) return;
    take("prefix_task_cols", prefix_task_cols);
    take("prefix_task_rows", prefix_task_rows);
  }

  Tensor prompt(const Embedded& in) override {
    if (options.tasks() == 1 && !in.tasks.defined()) {
      return prompt_embeddings * at::matmul(prefix_task_cols, prefix_task_rows);
    }
    const auto batch = in.values.size(0);
    TORCH_CHECK_VALUE(in.tasks.defined() && in.tasks.size(0) == batch,
                      "MultitaskPrompt: task ids must be one a row, ", batch, " of them, but got ",
                      in.tasks.defined() ? in.tasks.size(0) : 0,
                      " (hint: peft::TaskIds, alive during the forward)");
    if (in.tasks.is_cpu() && batch > 0) {  // asking a device would make it wait
      const auto low = in.tasks.min().item<int64_t>(), high = in.tasks.max().item<int64_t>();
      TORCH_CHECK_VALUE(low >= 0 && high < options.tasks(), "MultitaskPrompt: task ids must be from 0 to ",
                        options.tasks() - 1, ", but got ", low < 0 ? low : high);
    }
    const auto tasks = in.tasks.to(prompt_embeddings.device(), torch::kLong);
    return prompt_embeddings *
           at::matmul(prefix_task_cols.index_select(0, tasks), prefix_task_rows.index_select(0, tasks));
  }
  int64_t num_virtual_tokens() const override { return options.prompt().num_virtual_tokens(); }
  bool after_first() const override { return options.prompt().after_first(); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::MultitaskPrompt(num_virtual_tokens=" << num_virtual_tokens()
           << ", tasks=" << options.tasks() << ", rank=" << options.rank() << ")";
  }

  Tensor prompt_embeddings, prefix_task_cols, prefix_task_rows;

 private:
  /// Copies a tensor of the source, of its tasks the one that is asked for.
  void take(const std::string& name, Tensor into) const {
    auto value = options.source_tensors().at(name);
    if (name != "prompt_embeddings") {
      value = options.source() == MultitaskSource::average ? value.mean(0, /*keepdim=*/true)
                                                           : value.narrow(0, options.source_task(), 1);
    }
    TORCH_CHECK_VALUE(value.sizes() == into.sizes(), "MultitaskPromptOptions: source_tensors: '", name,
                      "' must be ", internal::shape_text(into.sizes()), ", but got ",
                      internal::shape_text(value.sizes()));
    into.copy_(value);
  }
};

/// Why a site cannot take a multitask prompt, or an empty string.
inline std::string refusal(const MultitaskPromptOptions& options, const SiteInfo& site) {
  return refusal(options.prompt(), site);
}

inline std::shared_ptr<PieceImpl> make_piece(const MultitaskPromptOptions& options, const SiteInfo& site) {
  return std::make_shared<MultitaskPromptImpl>(options, site);
}

}  // namespace peft
