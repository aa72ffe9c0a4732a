// Targets: what each figure must reach, and whether it does.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bench/measure.h"

namespace bench {

/// A row of the table of targets.
struct TargetRow {
  std::string number, metric;
  double must = 0, stretch = 0;  ///< stretch 0: none
  bool at_least = false;         ///< more is better
  std::string unit = {};         ///< "", "ms", "µs", "s"
  std::optional<double> ours = {}, peft = {};
  std::string reason = {};  ///< why there is no figure

  std::string verdict() const {
    if (!ours) return reason;
    const auto reaches = [&](double goal) { return at_least ? *ours >= goal : *ours <= goal; };
    if (stretch > 0 && reaches(stretch)) return "stretch";
    return reaches(must) ? "must" : "misses";
  }
  std::string text(const std::optional<double>& value) const {
    if (!value) return "-";
    const double size = *value;
    const auto digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
    return fmt::format("{:.{}f}{}{}", size, digits, unit.empty() ? "" : " ", unit);
  }
  std::string goal(double value) const {
    if (value <= 0) return "-";
    return fmt::format("{}{}", at_least ? "≥ " : "≤ ", text(value));
  }
};

/// The table for the rows of a run. `gpu`: they were measured on one.
inline std::vector<TargetRow> targets(const std::vector<Row>& rows, bool bf16, bool gpu, bool by_wall) {
  using Value = std::optional<double>;
  const auto row_of = [&](const std::string& title) -> const Row* {
    for (const auto& row : rows) {
      if (row.title() == title) return &row;
    }
    return nullptr;
  };
  const auto figure = [&](const std::string& title, const std::string& variant,
                          const std::function<double(const Measured&)>& of) -> Value {
    const auto* row = row_of(title);
    const auto* measured = row ? row->find(variant) : nullptr;
    return measured ? Value(of(*measured)) : Value();
  };
  const auto time_of = [by_wall](const Measured& m) { return by_wall ? m.wall : m.cpu; };
  const auto fact = [&](const std::string& title, const std::string& name) -> Value {
    const auto* row = row_of(title);
    if (!row || !row->facts.count(name)) return {};
    return row->facts.at(name);
  };
  std::vector<TargetRow> table;
  const auto add = [&](TargetRow target, const std::string& rows_needed, bool needs_gpu = false) {
    if (!target.ours && target.reason.empty()) {
      const auto* row = row_of(rows_needed.substr(0, rows_needed.find(" | ")));
      target.reason = needs_gpu && !gpu ? "not measured: needs a GPU (--device cuda)"
                      : row && !row->problem.empty()
                          ? "failed: see its row"
                          : "not in this run (needs the row '" + rows_needed + "')";
    }
    table.push_back(std::move(target));
  };
  /// Ratio to the frozen floor.
  const auto ratio = [&](const std::string& number, const std::string& metric, const std::string& title,
                         double must, double stretch, bool needs_gpu = false) {
    const auto of = [](const Measured& m) { return m.ratio; };
    TargetRow target{number, metric, must, stretch};
    target.ours = figure(title, "ours", of);
    target.peft = figure(title, "PEFT", of);
    add(std::move(target), title, needs_gpu);
  };
  /// Time of a step, times `scale`, in a unit.
  const auto time = [&](const std::string& number, const std::string& metric, const std::string& title,
                        double must, double stretch, const std::string& unit, double scale,
                        bool needs_gpu = false) {
    const auto of = [&](const Measured& m) { return time_of(m) * scale; };
    TargetRow target{number, metric, must, stretch, false, unit};
    target.ours = figure(title, "ours", of);
    target.peft = figure(title, "PEFT", of);
    add(std::move(target), title, needs_gpu);
  };
  const auto quotient = [](const Value& a, const Value& b) -> Value {
    return a && b && *b > 0 ? Value(*a / *b) : Value();
  };

  ratio("1", "LoRA r8 layer 768², T1024, fp32 / frozen", "C1 lora r8 T1024 768x768", 1.08, 1.06);
  ratio("1", "the same, q, k, v grouped", "C1 q,k,v lora r8 T1024 768x768", 1.08, 1.06);
  ratio("2", "LoRA r8 dropout 0.1, 768², T1024 / frozen", "C1 lora r8 drop0.1 T1024 768x768", 1.12, 1.09);
  ratio("2", "the same, q, k, v grouped", "C1 q,k,v lora r8 drop0.1 T1024 768x768", 1.12, 1.09);
  ratio("3", "LoRA r8, bf16 base, 768², T1024 / bf16 frozen", "C1 lora r8 T1024 768x768 bf16", 1.25, 1.15);
  {
    TargetRow target{"4", "bf16 base, BERT-base 4x128 step: times faster than PEFT in fp32", 2.2, 2.7, true};
    const auto fp32 = figure("C2 lora r8 BERT-base 4x128", "PEFT", time_of);
    target.ours = quotient(fp32, figure("C2 lora r8 BERT-base 4x128 bf16", "ours", time_of));
    target.peft = quotient(fp32, figure("C2 lora r8 BERT-base 4x128 bf16", "PEFT", time_of));
    if (!bf16) {
      target.ours.reset();
      target.reason = "not measured: this processor has no bf16 instructions";
    }
    add(std::move(target), "C2 lora r8 BERT-base 4x128 | the same bf16");
  }
  ratio("5", "MiniLM 1x32 step, LoRA / floor", "C2 lora r8 MiniLM-L6 1x32", 1.15, 1.10);
  ratio("5", "MiniLM 1x32 step, AdaLoRA / floor", "C2 adalora r12 MiniLM-L6 1x32", 1.20, 1.13);
  ratio("6", "MiniLM 8x128 step, LoRA / floor", "C2 lora r8 MiniLM-L6 8x128", 1.12, 1.10);
  ratio("6", "MiniLM 8x128 step, AdaLoRA / floor", "C2 adalora r12 MiniLM-L6 8x128", 1.15, 1.13);
  const std::string base = "C3 adamw, 72 layers, width 768, r8";
  time("7", "AdamW step, 144 tensors, 0.885 M weights", base, 0.30, 0.18, "ms", 1e3);
  {
    TargetRow target{"7", "the same, times faster than torch::optim::AdamW", 7, 0, true};
    target.ours = quotient(figure(base, "plain", time_of), figure(base, "ours", time_of));
    target.peft = quotient(figure(base, "plain", time_of), figure(base, "PEFT", time_of));
    add(std::move(target), base);
  }
  time("8", "AdaLoRA after backward: penalty, importance, masks, 72 layers",
       "C3 adalora after backward, 72 layers, width 768, r12", 1.5, 1.0, "ms", 1e3);
  {
    // At equal numbers of weights; nanoseconds a weight of the slowest over the fastest.
    TargetRow target{"9", "AdamW, 24 to 448 layers of equal weights: slowest / fastest", 1.05};
    for (const auto& [variant, value] : {std::pair{"ours", &target.ours}, std::pair{"PEFT", &target.peft}}) {
      std::vector<double> each;
      for (const auto& row : rows) {
        const auto* measured = row.find(variant);
        if (row.set != "C3" || !row.name.starts_with("adamw, ") || !row.name.ends_with("r8") || !measured)
          continue;
        each.push_back(time_of(*measured) / row.facts.at("trainable"));
      }
      if (each.size() == 4)
        *value = *std::max_element(each.begin(), each.end()) / *std::min_element(each.begin(), each.end());
    }
    add(std::move(target), "C3 adamw, … layers, … r8");
  }
  time("10", "switch among 12 adapters, 72 layers", "C5 switch, 12 loaded, BERT-base", 50, 5, "µs", 1e6);
  time("10", "switch among 1000 adapters, 72 layers", "C5 switch, 1000 loaded, BERT-base", 50, 5, "µs", 1e6);
  time("11", "merge, 72 layers, 85 M weights", "C5 merge, BERT-base", 32, 20, "ms", 1e3);
  time("12", "save an adapter of 5.3 MB (goal: of 3.5 MB)", "C5 save, BERT-base", 4, 2, "ms", 1e3);
  time("12", "load it (goal: of 3.5 MB)", "C5 load, BERT-base", 2, 1, "ms", 1e3);
  const auto later = [&](const std::string& number, const std::string& metric) {
    TargetRow target{number, metric};
    target.reason = "not measured: for later work";
    table.push_back(std::move(target));
  };
  later("13", "NF4 dequantisation");
  later("14", "NF4 LoRA step / fp32 LoRA step");
  later("15", "several adapters in a batch / base");
  time("16", "host time of an adapted layer, forward and backward", "C4 16 layers of 8x8, T8, lora r8", 14, 9,
       "µs", 1e6 / 16);
  {
    const std::string title = "C2 lora r8 MiniLM-L6 8x128";
    TargetRow target{"17", "saved bytes, MiniLM 8x128 LoRA / floor", 1.6, 1.1};
    target.ours = quotient(fact(title, "saved bytes, ours"), fact(title, "saved bytes, floor"));
    target.peft = quotient(fact(title, "saved bytes, PEFT"), fact(title, "saved bytes, floor"));
    add(std::move(target), title);
  }
  {
    TargetRow target{"18", "the umbrella header over torch/torch.h, -O0", 2, 1.5, false, "s"};
    target.ours = fact("C8 the umbrella header, -O0", "seconds over torch/torch.h");
    add(std::move(target), "C8 the umbrella header, -O0");
  }
  ratio("19", "GPU: 7B blocks, T8192, LoRA r16 / frozen", "G1 lora r16, 4 blocks of 7B T8192", 1.16, 1.09,
        true);
  ratio("20", "GPU: 1B blocks, T8192, LoRA r16 / frozen", "G1 lora r16, 8 blocks of 1B T8192", 1.30, 1.14,
        true);
  for (const auto& [name, must, stretch] :
       {std::tuple{"lora r8", 2.0, 3.0}, std::tuple{"adalora r12", 4.0, 8.0}}) {
    const auto title = fmt::format("G2 {} BERT-base 32x128", name);
    const auto wall = [](const Measured& m) { return m.wall; };
    TargetRow target{"21", fmt::format("GPU: BERT-base 32x128 step, {}: times faster than PEFT", name), must,
                     stretch, true};
    target.ours = quotient(figure(title, "PEFT", wall), figure(title, "ours", wall));
    if (target.ours) target.peft = 1;
    add(std::move(target), title, true);
  }
  for (const auto& [name, must, stretch] :
       {std::tuple{"adalora r12", 1.05, 1.02}, std::tuple{"dora r8", 1.10, 1.06}}) {
    const auto title = fmt::format("G3 {}, q and v, 8 blocks of 1B T2048", name);
    TargetRow target{"22", fmt::format("GPU: {} step over our LoRA's, 1B, q and v", name), must, stretch};
    target.ours = fact(title, "ours over our lora");
    add(std::move(target), title, true);
  }
  ratio("23", "GPU: IncreLoRA while it grows / floor",
        "G3 increlora r8, growing, all layers, 8 blocks of 1B T2048", 1.65, 1.55, true);
  time("24", "GPU: AdamW and clip, 896 tensors, 40 M weights",
       "G5 adamw with clipping, 448 layers, width 2800, r16", 0.6, 0.35, "ms", 1e3, true);
  later("25", "NF4 on a GPU / bf16 LoRA");
  return table;
}

}  // namespace bench
