// Tasks: what GLUE's tasks are made of: their files, columns, labels and metrics.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "peft/core/problems.h"

namespace glue {

/// The official metrics.
enum class Metric { accuracy, f1, matthews, pearson, spearman };

inline const char* to_string(Metric metric) {
  switch (metric) {
    case Metric::accuracy:
      return "accuracy";
    case Metric::f1:
      return "F1";
    case Metric::matthews:
      return "Matthews";
    case Metric::pearson:
      return "Pearson";
    case Metric::spearman:
      return "Spearman";
  }
  return "";
}

/// How the lines of a file are cut into texts and label. Columns are counted from 0.
struct Layout {
  std::vector<std::string> header;  ///< the names of all columns; empty: the file has no such line
  std::vector<std::string> names;   ///< of the columns of a file without a header, for messages
  std::vector<std::size_t> texts;   ///< one or two
  std::size_t label = 0;

  std::size_t columns() const { return std::max(header.size(), names.size()); }
};

/// One of GLUE's tasks. Its folder has its name.
struct GlueTask {
  /// A file to evaluate on; `name` tells several apart.
  struct Dev {
    std::string name, file;
  };

  std::string name;
  Layout train, dev;
  /// The labels as the files have them, in the order of the classes (that of Hugging Face's data sets). Empty
  /// where the label is a score.
  std::vector<std::string> labels;
  std::vector<Metric> metrics;
  std::vector<Dev> devs{{"", "dev.tsv"}};
  /// The published file has lines with columns missing, which Hugging Face's data sets leave out.
  bool has_short_lines = false;

  bool is_regression() const { return labels.empty(); }
};

namespace internal {

inline std::vector<std::string> mnli_header(int annotators) {
  std::vector<std::string> header{"index",
                                  "promptID",
                                  "pairID",
                                  "genre",
                                  "sentence1_binary_parse",
                                  "sentence2_binary_parse",
                                  "sentence1_parse",
                                  "sentence2_parse",
                                  "sentence1",
                                  "sentence2"};
  for (int i = 1; i <= annotators; ++i) header.push_back(fmt::format("label{}", i));
  header.emplace_back("gold_label");
  return header;
}

inline std::vector<GlueTask> make_tasks() {
  const auto with_header = [](std::vector<std::string> header, std::vector<std::size_t> texts,
                              std::size_t label) {
    return Layout{std::move(header), {}, std::move(texts), label};
  };
  const auto one_layout = [](std::string name, const Layout& layout, std::vector<std::string> labels,
                             std::vector<Metric> metrics) {
    return GlueTask{std::move(name), layout, layout, std::move(labels), std::move(metrics)};
  };
  using enum Metric;
  const auto sentences = with_header({"index", "sentence1", "sentence2", "label"}, {1, 2}, 3);
  const std::vector<std::string> no_yes{"0", "1"}, entails{"entailment", "not_entailment"};

  std::vector<GlueTask> tasks;
  tasks.push_back(
      one_layout("CoLA", {{}, {"source", "label", "mark", "sentence"}, {3}, 1}, no_yes, {matthews}));
  tasks.push_back(one_layout("SST-2", with_header({"sentence", "label"}, {0}, 1), no_yes, {accuracy}));
  tasks.push_back(one_layout("MRPC",
                             with_header({"Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"}, {3, 4}, 0),
                             no_yes, {accuracy, f1}));
  tasks.push_back(one_layout("STS-B",
                             with_header({"index", "genre", "filename", "year", "old_index", "source1",
                                          "source2", "sentence1", "sentence2", "score"},
                                         {7, 8}, 9),
                             {}, {pearson, spearman}));
  tasks.push_back(one_layout(
      "QQP", with_header({"id", "qid1", "qid2", "question1", "question2", "is_duplicate"}, {3, 4}, 5), no_yes,
      {accuracy, f1}));
  tasks.back().has_short_lines = true;
  tasks.push_back(GlueTask{"MNLI",
                           with_header(mnli_header(1), {8, 9}, 11),
                           with_header(mnli_header(5), {8, 9}, 15),
                           {"entailment", "neutral", "contradiction"},
                           {accuracy},
                           {{"matched", "dev_matched.tsv"}, {"mismatched", "dev_mismatched.tsv"}}});
  tasks.push_back(one_layout("QNLI", with_header({"index", "question", "sentence", "label"}, {1, 2}, 3),
                             entails, {accuracy}));
  tasks.push_back(one_layout("RTE", sentences, entails, {accuracy}));
  tasks.push_back(one_layout("WNLI", sentences, no_yes, {accuracy}));
  return tasks;
}

}  // namespace internal

/// GLUE's nine tasks, in the order of its papers' tables.
inline const std::vector<GlueTask>& glue_tasks() {
  static const auto tasks = internal::make_tasks();
  return tasks;
}

/// A task by its name, whatever the case of its letters. Throws: std::runtime_error with the names there are.
inline const GlueTask& glue_task(const std::string& name) {
  const auto lower = [](std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
    return text;
  };
  std::vector<std::string> names;
  for (const auto& task : glue_tasks()) {
    if (lower(task.name) == lower(name)) return task;
    names.push_back(task.name);
  }
  throw std::runtime_error(fmt::format("there is no task '{}'; nearest: {}\n  there are {}", name,
                                       peft::internal::closest(name, names, 1), fmt::join(names, ", ")));
}

}  // namespace glue
