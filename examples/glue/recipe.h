// Recipe: how a method is trained on a task, by default or as published.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"

namespace glue {

/// The settings of a training run.
struct Recipe {
  Recipe() = default;
  explicit Recipe(std::string text) : method(std::move(text)) {}

  std::string method;  ///< as `peft-finetune --method` has it
  double rate = 1e-3;
  std::int64_t epochs = 3, batch_size = 32, max_length = 128;
  double warmup = 0;  ///< steps; below 1 a part of all
  double weight_decay = 0, clip = 1;
  std::optional<double> dropout = 0.0;  ///< of the base; absent: as its config says
  std::optional<double> head_dropout;   ///< absent: as `dropout`
  bool pooler = false;                  ///< of a BERT, trains with the classifier, as part of the head
  std::string schedule = "linear";
  std::string optimizer = "adamw";  ///< as `peft-finetune --optimizer` has it
  double eps = 1e-8;

  /// What differs from a default that was not always there is left out while it does not, for the cells that
  /// are kept.
  nlohmann::ordered_json to_json() const {
    const auto number = [](const std::optional<double>& value) {
      return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
    };
    nlohmann::ordered_json json{{"method", method},
                                {"lr", rate},
                                {"epochs", epochs},
                                {"batch_size", batch_size},
                                {"max_length", max_length},
                                {"warmup", warmup},
                                {"weight_decay", weight_decay},
                                {"clip", clip},
                                {"dropout", number(dropout)},
                                {"head_dropout", number(head_dropout)},
                                {"pooler", pooler},
                                {"schedule", schedule}};
    if (optimizer != "adamw") json["optimizer"] = optimizer;
    if (eps != 1e-8) json["eps"] = eps;
    return json;
  }
};

namespace internal {

/// Every matrix of the blocks, in each family's names.
inline constexpr const char* block_matrices =
    "targets=/.*\\.layer\\..*\\.(query|key|value|query_proj|key_proj|value_proj|dense)/";

/// The methods compared by default, for a small encoder such as MiniLM.
inline const std::vector<std::pair<std::string, Recipe>>& default_recipes() {
  const auto recipe = [](std::string method, double rate) {
    Recipe result(std::move(method));
    result.rate = rate;
    result.weight_decay = 0.01;
    result.warmup = 0.06;
    result.pooler = true;  // a sentence encoder's has not been trained
    return result;
  };
  static const std::vector<std::pair<std::string, Recipe>> recipes{
      {"head", recipe("head", 5e-3)},
      {"bitfit", recipe("bitfit", 2e-3)},
      {"lora", recipe("lora:rank=8,alpha=16", 2e-3)},
      {"adalora", recipe("adalora:init_rank=12,target_rank=8,alpha=32", 5e-3)},
      {"increlora", recipe("increlora:target_rank=8,alpha=16", 5e-3)},
      {"ia3", recipe("ia3", 5e-3)},
      {"houlsby", recipe("houlsby", 1e-3)},
      {"pfeiffer", recipe("pfeiffer", 1e-3)},
      {"prefix", recipe("prefix:length=20", 5e-3)},
  };
  return recipes;
}

/// LoRA on RoBERTa-base. Paper: LoRA, arXiv 2106.09685, Table 9; its scripts' weight decay.
inline std::optional<Recipe> published_lora(const std::string& task) {
  struct Row {
    std::int64_t batch_size, epochs;
    double rate;
  };
  static const std::map<std::string, Row> rows{{"MNLI", {16, 30, 5e-4}}, {"SST-2", {16, 60, 5e-4}},
                                               {"MRPC", {16, 30, 4e-4}}, {"CoLA", {32, 80, 4e-4}},
                                               {"QNLI", {32, 25, 4e-4}}, {"QQP", {16, 25, 5e-4}},
                                               {"RTE", {32, 80, 5e-4}},  {"STS-B", {16, 40, 4e-4}}};
  const auto at = rows.find(task);
  if (at == rows.end()) return std::nullopt;
  Recipe recipe("lora:rank=8,alpha=8");
  recipe.rate = at->second.rate;
  recipe.epochs = at->second.epochs;
  recipe.batch_size = at->second.batch_size;
  recipe.max_length = 512;
  recipe.warmup = 0.06;
  recipe.weight_decay = 0.1;
  recipe.dropout = std::nullopt;
  recipe.optimizer = "adamw_hf";
  return recipe;
}

/// What AdaLoRA and IncreLoRA share on DeBERTaV3-base.
struct DebertaRow {
  double alpha, orthogonality, head_dropout, weight_decay;
  std::int64_t max_length;

  Recipe recipe(std::string method, double rate, std::int64_t epochs, double warmup) const {
    Recipe result(std::move(method));
    result.rate = rate;
    result.epochs = epochs;
    result.max_length = max_length;
    result.warmup = warmup;
    result.weight_decay = weight_decay;
    result.dropout = std::nullopt;
    result.head_dropout = head_dropout;
    result.optimizer = "adamw_hf";
    return result;
  }
};

inline const std::map<std::string, DebertaRow>& deberta_rows() {
  static const std::map<std::string, DebertaRow> rows{
      {"MNLI", {16, .1, .15, 0, 256}},  {"CoLA", {32, .1, .1, 0, 64}},    {"MRPC", {32, .1, 0, .01, 320}},
      {"QNLI", {32, .1, .1, .01, 512}}, {"QQP", {16, .1, .15, .01, 320}}, {"RTE", {32, .3, .2, .01, 320}},
      {"SST-2", {16, .1, 0, .01, 128}}, {"STS-B", {32, .3, .2, .1, 128}}};
  return rows;
}

/// AdaLoRA on DeBERTaV3-base. Paper: AdaLoRA, arXiv 2303.10512, Table 8; its scripts.
inline std::optional<Recipe> published_adalora(const std::string& task) {
  struct Row {
    double rate;
    std::int64_t init_rank, tinit, tfinal, delta_t, epochs;
    double warmup;
  };
  static const std::map<std::string, Row> rows{
      {"MNLI", {5e-4, 3, 8000, 50000, 100, 7, 1000}},   {"CoLA", {8e-4, 3, 800, 3500, 10, 25, 100}},
      {"MRPC", {1e-3, 2, 600, 1800, 1, 30, 0.1}},       {"QNLI", {5e-4, 2, 2000, 8000, 100, 5, 500}},
      {"QQP", {8e-4, 2, 8000, 25000, 100, 5, 2000}},    {"RTE", {1.2e-3, 2, 600, 1800, 1, 50, 200}},
      {"SST-2", {8e-4, 2, 6000, 22000, 100, 24, 1000}}, {"STS-B", {2.2e-3, 2, 800, 2000, 10, 25, 100}}};
  const auto at = rows.find(task);
  if (at == rows.end()) return std::nullopt;
  const auto& row = at->second;
  const auto& shared = deberta_rows().at(task);
  return shared.recipe(
      fmt::format("adalora:init_rank={},target_rank=1,tinit={},tfinal={},delta_t={},alpha={},"
                  "orth_reg_weight={},{}",
                  row.init_rank, row.tinit, row.tfinal, row.delta_t, shared.alpha, shared.orthogonality,
                  block_matrices),
      row.rate, row.epochs, row.warmup);
}

/// IncreLoRA on DeBERTaV3-base, its rank 2 or 8; the relative positions see the base alone, as in its code.
/// Paper: IncreLoRA, arXiv 2308.12043; its scripts.
inline std::optional<Recipe> published_increlora(const std::string& task, std::int64_t rank) {
  struct Row {
    std::int64_t interval, epochs;
    std::int64_t top_h;
    double rate, dropout;
    std::int64_t wide_step, wide_top_h;
    double wide_rate, wide_dropout;
  };
  static const std::map<std::string, Row> rows{{"MNLI", {1000, 9, 2, 3.5e-4, .2, 1, 18, 5e-4, 0}},
                                               {"CoLA", {100, 25, 3, 8e-4, 0, 4, 3, 1e-3, 0}},
                                               {"MRPC", {100, 30, 6, 1e-3, .3, 4, 10, 1e-3, .3}},
                                               {"QNLI", {500, 5, 12, 7e-4, 0, 4, 22, 9e-4, 0}},
                                               {"QQP", {1000, 7, 3, 4e-4, 0, 4, 3, 6e-4, 0}},
                                               {"RTE", {100, 50, 5, 1.2e-3, 0, 4, 9, 1.2e-3, 0}},
                                               {"SST-2", {1000, 24, 5, 8e-4, .1, 4, 6, 8e-4, .3}},
                                               {"STS-B", {100, 25, 4, 2.2e-3, 0, 4, 4, 2.2e-3, 0}}};
  const auto at = rows.find(task);
  if (at == rows.end()) return std::nullopt;
  const auto& row = at->second;
  const bool wide = rank == 8;
  const auto epochs = wide && task == "MNLI" ? 7 : row.epochs;
  const auto& shared = deberta_rows().at(task);
  return shared.recipe(
      fmt::format("increlora:target_rank={},rank=1,incre_rank_num={},top_h={},init_warmup={},"
                  "incre_interval={},alpha={},reg_orth_coef={},dropout={},adapt_positions=false,{}",
                  rank, wide ? row.wide_step : 1, wide ? row.wide_top_h : row.top_h, row.interval,
                  row.interval, shared.alpha, shared.orthogonality, wide ? row.wide_dropout : row.dropout,
                  block_matrices),
      wide ? row.wide_rate : row.rate, epochs, static_cast<double>(row.interval));
}

/// BitFit on BERT. Paper: BitFit, arXiv 2106.10199; its code.
inline Recipe published_bitfit() {
  Recipe recipe("bitfit");
  recipe.rate = 1e-3;
  recipe.epochs = 16;
  recipe.batch_size = 8;
  recipe.dropout = std::nullopt;
  recipe.schedule = "constant";
  recipe.optimizer = "adamw_hf";
  recipe.eps = 1e-6;
  return recipe;
}

/// Adapters on BERT. Papers: Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751, section 3 and
/// its middle size and rate; AdapterFusion, arXiv 2005.00247, section 3.3.
inline Recipe published_adapter(bool houlsby) {
  Recipe recipe(houlsby ? "houlsby:size=64" : "pfeiffer:reduction_factor=16");
  recipe.rate = houlsby ? 3e-4 : 1e-4;
  recipe.epochs = houlsby ? 20 : 30;
  recipe.warmup = houlsby ? 0.1 : 0;
  recipe.dropout = std::nullopt;
  if (!houlsby) recipe.optimizer = "adamw_hf";
  return recipe;
}

}  // namespace internal

/// The names `--method` knows without a colon, in the order of the table.
inline std::vector<std::string> recipe_names(bool published) {
  if (published) return {"bitfit", "lora", "adalora", "increlora", "increlora-8", "houlsby", "pfeiffer"};
  std::vector<std::string> names;
  for (const auto& [name, recipe] : internal::default_recipes()) names.push_back(name);
  return names;
}

/// A method's recipe of the published preset on a task; none where its paper gives none.
inline std::optional<Recipe> published_recipe(const std::string& method, const std::string& task) {
  if (method == "lora") return internal::published_lora(task);
  if (method == "adalora") return internal::published_adalora(task);
  if (method == "increlora") return internal::published_increlora(task, 2);
  if (method == "increlora-8") return internal::published_increlora(task, 8);
  if (method == "bitfit") return internal::published_bitfit();
  if (method == "houlsby" || method == "pfeiffer") return internal::published_adapter(method == "houlsby");
  const auto names = recipe_names(true);
  throw std::runtime_error(
      fmt::format("--preset published: there is no published recipe of {}; nearest: {}\n  there are {}",
                  method, peft::internal::closest(method, names, 1), fmt::join(names, ", ")));
}

/// The recipe of a method by default: one of the preset's names, or any method of `peft-finetune` with its
/// keys, which is trained as its namesake is, or as LoRA.
inline Recipe default_recipe(const std::string& method) {
  const auto& known = internal::default_recipes();
  const auto of = [&](const std::string& name) {
    return std::find_if(known.begin(), known.end(), [&](const auto& item) { return item.first == name; });
  };
  if (const auto at = of(method); at != known.end()) return at->second;
  const auto kind = of(method.substr(0, method.find(':')));
  auto recipe = (kind == known.end() ? of("lora") : kind)->second;
  recipe.method = method;
  return recipe;
}

}  // namespace glue
