// predict, merge, info, tokenize: what is done with a base, with or without an adapter, once it is trained.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batches.h"
#include "ensemble.h"
#include "peft/io/atomic_file.h"
#include "peft/io/safetensors.h"
#include "peft/io/staged_directory.h"
#include "peft/methods/multitask_prompt.h"
#include "peft/model/merge.h"
#include "peft/model/summary.h"
#include "peft/models/save_pretrained.h"
#include "task.h"
#include "train.h"

namespace finetune {

/// The arguments of `predict`, `merge`, `info` and `tokenize`; each has some of them.
struct UseOptions {
  fs::path model, data, inputs, out;
  std::optional<fs::path> adapter;
  std::vector<fs::path> prompts;  ///< that vote, in place of `adapter`
  std::optional<int64_t> task;    ///< of a multitask prompt
  std::vector<std::string> texts;
  std::optional<int64_t> max_length;
  std::string device = "cpu", dtype;
  bool hidden = false, embed = false, overwrite = false;
};

namespace internal {

inline BaseOptions base_of(const UseOptions& options) {
  return {options.model, parse_dtype(options.dtype), std::nullopt, parse_device(options.device)};
}

/// Settings of the adapter, else of the model's folder; those of an adapter that was not trained here are
/// unknown.
inline std::optional<Settings> settings_of(const UseOptions& options) {
  return Settings::read(options.adapter.value_or(options.model));
}

inline Task open(const UseOptions& options, bool trainable = false) {
  if (options.adapter) {
    std::error_code ignored;
    if (!fs::is_directory(*options.adapter, ignored)) {
      throw std::runtime_error(fmt::format("--adapter: there is no folder '{}'", options.adapter->string()));
    }
  }
  auto task = Task::for_prediction(base_of(options), options.adapter, settings_of(options), trainable);
  for (const auto& note : task.notes()) fmt::print(stderr, "note: {}\n", note);
  return task;
}

/// The texts of `--text`, all one or all two with a tab between, or those of `--data`.
inline text::Dataset texts_of(const UseOptions& options) {
  if (!options.data.empty()) return text::read_tsv(options.data);
  text::Dataset data{"--text", false, {}};
  for (const auto& given : options.texts) {
    const auto tab = given.find('\t');
    const bool pair = tab != std::string::npos;
    text::Row row{"", given.substr(0, tab), pair ? given.substr(tab + 1) : "", 0};
    if (text::internal::is_blank(row.text) || (pair && text::internal::is_blank(row.text_b)))
      throw std::runtime_error("--text: a text is empty");
    if (row.text_b.find('\t') != std::string::npos)
      throw std::runtime_error("--text: must be one text, or two with a tab between, but has several tabs");
    if (!data.rows.empty() && pair != data.pairs)
      throw std::runtime_error("--text: must be all one text, or all two with a tab between");
    if (!options.out.empty() && given.find_first_of("\r\n") != std::string::npos)
      throw std::runtime_error("--text: must be one line, for --out has a line a text");
    if (const auto at = text::invalid_utf8_at(given)) {
      throw std::runtime_error(
          fmt::format("--text: must be valid UTF-8, but the byte at offset {} is not", *at));
    }
    data.pairs = pair;
    data.rows.push_back(std::move(row));
  }
  return data;
}

/// The ids for the rows of a batch, of the task that `--task` asks for. Throws: std::runtime_error for a task
/// that the adapter does not have, and for several tasks where none was asked for.
class ChosenTask {
 public:
  ChosenTask(const UseOptions& options, const Task& task) : chosen_(options.task) {
    int64_t tasks = 1;
    if (task.adapter()) {
      for (const auto& piece : task.adapter()->layers<peft::MultitaskPromptImpl>())
        tasks = piece->options.tasks();
    }
    if (!chosen_ && tasks > 1)
      throw std::runtime_error(fmt::format("--task must be given: '{}' has {} tasks, from 0 on",
                                           options.adapter->string(), tasks));
    if (!chosen_ || *chosen_ < tasks) return;
    throw std::runtime_error(
        tasks == 1 ? fmt::format("--task: must be 0, for the adapter has no tasks, but got {}", *chosen_)
                   : fmt::format("--task: must be from 0 to {}, but got {}", tasks - 1, *chosen_));
  }
  Tensor ids(int64_t rows) const { return torch::full({rows}, chosen_.value_or(0), torch::kLong); }

 private:
  std::optional<int64_t> chosen_;
};

inline void predict_inputs(const UseOptions& options, Task& task) {
  const ChosenTask chosen(options, task);
  FileBatches batches(options.inputs, /*needs_labels=*/false);
  if (!task.has_head() && !options.hidden && !options.embed) {
    throw std::runtime_error(fmt::format("'{}' has no task head, so no logits (hint: --hidden or --embed)",
                                         options.model.string()));
  }
  batches.check(task.config(), task.has_head() ? task.labels() : 0);
  std::vector<std::pair<std::string, Tensor>> tensors;
  const torch::NoGradGuard no_grad;
  for (int64_t i = 0; i < batches.count(); ++i) {
    const auto batch = to(batches.get(0, i), task.device());
    const auto prefix = batches.prefix(i);
    const auto& tokens =
        batch.inputs.input_ids.defined() ? batch.inputs.input_ids : batch.inputs.inputs_embeds;
    const peft::TaskIds ids(chosen.ids(tokens.size(0)));
    const peft::ForwardScope scope;
    const auto output = task.encode(batch.inputs);
    const auto add = [&](const char* name, const Tensor& tensor) {
      tensors.emplace_back(prefix + name, tensor.cpu());
    };
    if (task.has_head()) {
      const auto logits = task.logits(task.features(output, batch.inputs));
      add("logits", logits);
      if (batch.labels.defined()) add("loss", task.loss(logits, batch.labels));
    }
    if (options.hidden) {
      add("last_hidden_state", output.last_hidden_state);
      if (output.pooler_output.defined()) add("pooler_output", output.pooler_output);
    }
    if (options.embed) {
      const auto hidden = peft::models::real_tokens(output.last_hidden_state, output);
      add("embedding", peft::models::embed(hidden, batch.inputs.attention_mask));
    }
  }
  peft::save_safetensors(options.out, tensors);
  fmt::print(stderr, "{} batches: '{}'\n", batches.count(), options.out.string());
}

/// A text for one line of a terminal.
inline std::string shown(const text::Row& row, bool pairs) {
  return pairs ? row.text + " | " + row.text_b : row.text;
}

/// What is said of each row of a batch.
struct Verdict {
  Tensor classes, probabilities;
  Tensor votes;  ///< the logits of prompts that vote: (prompts, rows, labels)
};

inline Verdict verdict_of(Task& task, const peft::models::EncoderInputs& inputs, const ChosenTask& chosen) {
  const peft::TaskIds ids(chosen.ids(inputs.input_ids.size(0)));
  const auto [most, classes] = task.logits(inputs).to(torch::kDouble).softmax(-1).max(-1);
  return {classes.cpu(), most.cpu(), {}};
}

/// The class most prompts choose, with the mean of its probabilities.
inline Verdict verdict_of(PromptVote& vote, const peft::models::EncoderInputs& inputs) {
  const auto votes = vote.logits(inputs).cpu();
  const auto classes = peft::majority(votes);
  const auto probabilities = votes.softmax(-1, torch::kDouble).mean(0).gather(-1, classes.unsqueeze(-1));
  return {classes, probabilities.squeeze(-1), votes};
}

/// `judge`: the verdict on a batch.
template <class Judge>
void predict_texts(const UseOptions& options, const Task& task, const std::optional<Settings>& settings,
                   const Judge& judge) {
  const auto labels = settings ? settings->labels : task.config().labels();
  if (labels.size() == 1) {
    throw std::runtime_error(
        "predict: the head has one output, a score, and no labels to choose from (hint: --inputs writes "
        "logits)");
  }
  constexpr int64_t usual_length = 128;
  const auto length = std::min(options.max_length.value_or(settings ? settings->max_length : usual_length),
                               task.config().max_position_embeddings());
  const auto data = texts_of(options);
  const auto tokenizer = read_tokenizer(options.model, task.config());
  const auto examples = encode(tokenizer, data, length);
  size_t width = 0, right = 0, known = 0;
  std::optional<VoteCount> count;
  if (!options.prompts.empty()) count.emplace(options.prompts);
  for (const auto& label : labels) width = std::max(width, label.size());
  std::string file = data.pairs ? "label\tprobability\ttext_a\ttext_b\n" : "label\tprobability\ttext\n";
  const torch::NoGradGuard no_grad;
  constexpr size_t at_once = 64;
  for (size_t begin = 0; begin < examples.size(); begin += at_once) {
    std::vector<const Example*> rows;
    for (size_t i = begin; i < std::min(examples.size(), begin + at_once); ++i) rows.push_back(&examples[i]);
    const auto batch = to(pad(rows, tokenizer.pad_id()), task.device());
    const Verdict verdict = judge(batch.inputs);
    if (count) {
      auto truth = torch::full({static_cast<int64_t>(rows.size())}, -100, torch::kLong);
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto at = std::find(labels.begin(), labels.end(), data.rows[begin + i].label);
        if (at != labels.end()) truth[static_cast<int64_t>(i)] = at - labels.begin();
      }
      count->add(verdict.votes, truth);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto& row = data.rows[begin + i];
      const auto at = static_cast<int64_t>(i);
      const auto& label = labels.at(static_cast<size_t>(verdict.classes[at].item<int64_t>()));
      const auto probability = verdict.probabilities[at].item<double>();
      file += fmt::format("{}\t{:.6f}\t{}\n", label, probability,
                          data.pairs ? row.text + "\t" + row.text_b : row.text);
      known += !row.label.empty();
      right += row.label == label;
      if (!options.out.empty()) continue;
      fmt::print("{:<{}}  {:5.1f} %  {}{}\n", label, width, 100 * probability, shown(row, data.pairs),
                 row.label.empty() || row.label == label ? "" : fmt::format("   (labelled {})", row.label));
    }
  }
  std::fflush(stdout);
  if (!options.out.empty()) peft::write_file(options.out, file);
  if (known == 0) return;
  fmt::print(stderr, "{} of {} as labelled ({:.2f} %)\n", right, known,
             100.0 * static_cast<double>(right) / static_cast<double>(known));
  if (count) fmt::print(stderr, "{}", count->table());
}

}  // namespace internal

/// Labels with probabilities for texts; logits and what else is asked for of ready batches.
inline void predict(const UseOptions& options) {
  if (!options.inputs.empty() && options.out.empty()) {
    throw std::runtime_error("--inputs: the results are tensors and need a file (hint: --out F.safetensors)");
  }
  if (!options.prompts.empty()) {
    if (!options.inputs.empty() || options.task) {
      throw std::runtime_error(
          "--adapter: several vote on texts of one task (hint: without --inputs and --task)");
    }
    PromptVote vote(internal::base_of(options), options.prompts);
    return internal::predict_texts(options, vote.task(), vote.settings(),
                                   [&](const auto& inputs) { return internal::verdict_of(vote, inputs); });
  }
  auto task = internal::open(options);
  if (!options.inputs.empty()) return internal::predict_inputs(options, task);
  if (!task.has_head()) {
    throw std::runtime_error(
        fmt::format("'{}' has no task head, so no labels (hint: --adapter, or --inputs with --embed)",
                    options.model.string()));
  }
  const internal::ChosenTask chosen(options, task);
  internal::predict_texts(options, task, internal::settings_of(options),
                          [&](const auto& inputs) { return internal::verdict_of(task, inputs, chosen); });
}

/// Writes the base with the adapter in its weights as a folder of its own.
inline void merge(const UseOptions& options) {
  std::error_code error;
  if (fs::exists(options.out, error) && !fs::is_empty(options.out, error)) {
    if (!options.overwrite) {
      throw std::runtime_error(fmt::format(
          "--out: '{}' exists and is not empty (hint: another name, or --overwrite)", options.out.string()));
    }
    if (fs::equivalent(options.out, options.model, error) ||
        fs::equivalent(options.out, *options.adapter, error)) {
      throw std::runtime_error(fmt::format("--out: '{}' is the folder the model or the adapter is read from",
                                           options.out.string()));
    }
    if (!fs::exists(options.out / peft::models::PretrainedFolder::config_name, error)) {
      throw std::runtime_error(
          fmt::format("--out: '{}' holds no model; it is not overwritten", options.out.string()));
    }
  }
  const auto task = internal::open(options);
  const auto settings = internal::settings_of(options);
  if (task.adapter()) peft::merge(*task.model(), /*keep=*/false);
  peft::models::SaveOptions save;
  // A head outside the model still has its labels in the config, unless one inside has others there.
  if (settings && (!task.has_pooled_head() || !internal::has_classifier(options.model)))
    save.labels(settings->labels);
  const bool classifier = task.has_head() && !task.has_pooled_head();
  if (classifier) {
    save.architecture("BertForSequenceClassification").new_head(true);
  }
  peft::StagedDirectory staged(options.out, options.overwrite);
  peft::models::save_pretrained(*task.model(), staged.path(), options.model, save);
  task.save_head(staged.path());
  if (settings) peft::write_file(staged.path() / Settings::file_name, settings->to_json().dump(2) + "\n");
  staged.commit();
  fmt::print(stderr, "merged: '{}'\n", options.out.string());
}

/// What is adapted, what it counts and weighs.
inline void info(const UseOptions& options) {
  const auto task = [&] {
    try {  // As when it is trained on: what an adapter trains is what one wants to know of it.
      return internal::open(options, /*trainable=*/true);
    } catch (const c10::Error&) {  // One that cannot train on; what else is wrong is said again.
      return internal::open(options);
    }
  }();
  fmt::print("{}", peft::summary(*task.model()).text);
  if (task.has_pooled_head()) {
    fmt::print("head on mean-pooled states: {} weights\n",
               peft::internal::count_text((task.config().hidden_size() + 1) * task.labels()));
  }
  const auto settings = internal::settings_of(options);
  if (settings) {
    fmt::print("labels: {} · pooling {} · at most {} tokens\n", fmt::join(settings->labels, ", "),
               to_string(settings->pooling), settings->max_length);
  } else if (task.has_head()) {
    fmt::print("labels: {}\n", fmt::join(task.config().labels(), ", "));
  }
}

/// The ids of each text, a line a text.
inline void tokenize(const UseOptions& options) {
  const auto tokenizer = read_tokenizer(options.model);
  const auto data = internal::texts_of(options);
  for (const auto& example :
       encode(tokenizer, data, options.max_length.value_or(text::Tokenizer::no_limit))) {
    fmt::print("{}\n", fmt::join(example.encoding.ids, " "));
  }
}

}  // namespace finetune
