// Tables: the survey as text, Markdown, CSV and JSON.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "finetune/report.h"
#include "survey/method_row.h"
#include "survey/published_counts.h"

namespace survey {

namespace internal {

inline std::string ratio_text(const std::optional<Ratio>& ratio) {
  return ratio ? fmt::format("{:.2f}", ratio->median) : "-";
}

/// "8", "4-12", "full", "64-full", "vectors", or "-".
inline std::string rank_text(const std::optional<Change>& change) {
  if (!change) return "-";
  if (change->matrices == 0) return change->vectors > 0 ? "vectors" : "-";
  if (change->full == change->matrices) return "full";
  if (change->rank_least == change->rank_most) return fmt::format("{}", change->rank_least);
  return fmt::format("{}-{}", change->rank_least, change->rank_most);
}

inline std::vector<std::string> header() {
  return {"method",          "storage",      "trainable", "%",        "changed", "rank of change",
          "training memory", "graph memory", "blocks",    "backward", "forward", "merged"};
}

/// A method's name, or all the user wrote where two rows have the name.
inline std::string label(const MethodRow& row, const std::vector<MethodRow>& rows) {
  const auto name = [](const MethodRow& of) { return of.method.substr(0, of.method.find(':')); };
  const auto alike = std::count_if(rows.begin(), rows.end(),
                                   [&](const MethodRow& other) { return name(other) == name(row); });
  return alike == 1 ? name(row) : row.method;
}

/// The cells of a row that was measured.
inline std::vector<std::string> cells(const MethodRow& row, const std::vector<MethodRow>& rows) {
  const auto size = [](int64_t bytes) { return finetune::internal::size_text(bytes); };
  return {label(row, rows),
          row.storage_bytes ? size(*row.storage_bytes) : "-",
          finetune::internal::grouped(row.trainable),
          fmt::format("{:.{}f}", row.percent, row.percent < 1 ? 3 : 2),
          row.change ? finetune::internal::grouped(row.change->entries) : "-",
          rank_text(row.change),
          size(row.peak_bytes),
          size(row.kept_bytes),
          fmt::format("{}/{}", row.blocks_passed, row.blocks),
          ratio_text(row.backward),
          ratio_text(row.before),
          row.after ? ratio_text(row.after) + (row.same_operations ? " =" : "") : "-"};
}

inline std::vector<const MethodRow*> measured(const std::vector<MethodRow>& rows) {
  std::vector<const MethodRow*> result;
  for (const auto& row : rows) {
    if (row.problem.empty()) result.push_back(&row);
  }
  return result;
}

/// What the rows say beside their figures, a line each.
inline std::vector<std::string> remarks(const std::vector<MethodRow>& rows) {
  const auto first_line = [](const std::string& text) { return text.substr(0, text.find('\n')); };
  std::vector<std::string> lines;
  for (const auto& row : rows) {
    if (label(row, rows) != row.method) lines.push_back(label(row, rows) + ": as " + row.method);
    if (!row.problem.empty()) lines.push_back(row.method + ": not measured: " + first_line(row.problem));
    if (!row.note.empty()) lines.push_back(row.method + ": not saved: " + first_line(row.note));
  }
  return lines;
}

}  // namespace internal

/// What the columns are, a line each.
inline std::vector<std::string> legend() {
  return {
      "storage: the files the adapter is saved in (AdapterHub's hold a prefix once a layer, P-tuning's only "
      "what inference needs); the task head is in no row but its own",
      "trainable: weights that train (IncreLoRA's without its reserves), and as a part of the base's; "
      "changed: base weights that differ once the adapter is merged; rank of change: of each changed matrix "
      "(full: the largest there can be; vectors: no matrix changes); -: it does not merge, so nothing of the "
      "base changes",
      "training memory: the most that tensors took in a step beside the frozen model (adapter, gradients, "
      "AdamW's moments, graph); graph memory: of that, what forward keeps for backward",
      "blocks: those of the encoder that backward runs through; backward: its time, the frozen model's "
      "forward being 1",
      "forward, merged: time of a forward before and after merging, the frozen model's being 1; =: merged, "
      "it runs the frozen model's operations, one for one",
  };
}

/// For a terminal.
inline std::string text(const std::vector<MethodRow>& rows) {
  std::vector<std::vector<std::string>> lines{internal::header()};
  for (const auto* row : internal::measured(rows)) lines.push_back(internal::cells(*row, rows));
  auto result = finetune::aligned(lines) + "\n";
  for (const auto& line : legend()) result += line + "\n";
  const auto remarks = internal::remarks(rows);
  if (!remarks.empty()) result += fmt::format("\n{}\n", fmt::join(remarks, "\n"));
  return result;
}

/// `machine`: what it was measured on.
inline std::string markdown(const std::string& title, const std::vector<MethodRow>& rows,
                            const std::map<std::string, std::string>& machine) {
  const auto line = [](const std::vector<std::string>& cells) {
    return fmt::format("| {} |\n", fmt::join(cells, " | "));
  };
  const auto header = internal::header();
  auto result = title + "\n\n" + line(header) + "|---|";
  for (size_t i = 1; i < header.size(); ++i) result += "---:|";
  result += "\n";
  for (const auto* row : internal::measured(rows)) {
    auto cells = internal::cells(*row, rows);
    cells.front() = "`" + cells.front() + "`";
    result += line(cells);
  }
  result += "\n";
  for (const auto& item : legend()) result += "- " + item + "\n";
  for (const auto& item : internal::remarks(rows)) result += "- " + item + "\n";
  result += "\n";
  std::vector<std::string> facts;
  for (const auto& [name, value] : machine) facts.push_back(name + ": " + value);
  return result + fmt::format("Measured with {}.\n", fmt::join(facts, "; "));
}

/// RFC 4180, with a header line, numbers in full precision; empty where there is no figure.
inline std::string csv(const std::vector<MethodRow>& rows) {
  std::string result =
      "method,storage_bytes,trainable,percent,changed,changed_matrices,changed_vectors,rank_least,rank_most,"
      "full_rank_matrices,training_bytes,graph_bytes,blocks_passed,blocks,backward,forward,merged,"
      "same_operations,problem\r\n";
  const auto ratio = [](const std::optional<Ratio>& value) {
    return value ? fmt::format("{}", value->median) : std::string();
  };
  for (const auto& row : rows) {
    const auto changed =
        row.change
            ? fmt::format("{},{},{},{},{},{}", row.change->entries, row.change->matrices, row.change->vectors,
                          row.change->rank_least, row.change->rank_most, row.change->full)
            : std::string(5, ',');
    if (!row.problem.empty()) {
      result += fmt::format("{}{}{}\r\n", finetune::internal::csv_field(row.method), std::string(18, ','),
                            finetune::internal::csv_field(row.problem));
      continue;
    }
    result +=
        fmt::format("{},{},{},{},{},{},{},{},{},{},{},{},{},\r\n", finetune::internal::csv_field(row.method),
                    row.storage_bytes ? fmt::format("{}", *row.storage_bytes) : "", row.trainable,
                    row.percent, changed, row.peak_bytes, row.kept_bytes, row.blocks_passed, row.blocks,
                    ratio(row.backward), ratio(row.before), ratio(row.after), row.same_operations ? 1 : 0);
  }
  return result;
}

inline nlohmann::json json(const std::vector<MethodRow>& rows,
                           const std::map<std::string, std::string>& machine) {
  return {{"machine", machine}, {"methods", rows}};
}

/// The published counts beside ours, for a terminal.
inline std::string published_text() {
  std::vector<std::vector<std::string>> lines{{"DeBERTaV3-base", "published", "ours", "weights", "met"}};
  std::string notes;
  const auto millions = [](int64_t count) {
    return fmt::format("{:.3f} M", static_cast<double>(count) / 1e6);
  };
  const auto range = [](const OwnCount& own, const auto& text) {
    return own.least == own.most ? text(own.least) : text(own.least) + " to " + text(own.most);
  };
  for (const auto& published : published_counts()) {
    const auto own = own_count(published);
    const bool met = is_met(published, own);
    lines.push_back({published.method, published.millions + " M", range(own, millions),
                     range(own, finetune::internal::grouped), met ? "yes" : "no"});
    notes += fmt::format("{}: {}\n", published.method, published.arithmetic);
  }
  return finetune::aligned(lines) +
         "\nWithout the task head. Of learned ranks: the least and the most that the budget allows.\n" +
         notes;
}

}  // namespace survey
