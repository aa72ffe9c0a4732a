// Report: rows and targets as tables for people, as JSON, and the ratios as a picture.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/measure.h"
#include "bench/targets.h"
#include "finetune/learning_curves.h"
#include "finetune/terminal_table.h"

namespace bench {

/// Seconds for people.
inline std::string duration(double seconds) {
  const auto shown = [](double value, std::string_view unit) {
    return fmt::format("{:.{}f} {}", value, value >= 100 ? 0 : value >= 10 ? 1 : 2, unit);
  };
  if (seconds < 1e-3) return shown(seconds * 1e6, "µs");
  return seconds < 1 ? shown(seconds * 1e3, "ms") : shown(seconds, "s");
}

/// "1.08 (1.07-1.10)": median and quartiles.
inline std::string ratio_text(const Measured* measured) {
  if (!measured) return "-";
  return fmt::format("{:.2f} ({:.2f}-{:.2f})", measured->ratio, measured->lower, measured->upper);
}

/// A row's line: its ratios, then times of one step on the processor and on the wall.
inline std::vector<std::string> cells(const Row& row) {
  if (!row.problem.empty()) return {row.title(), "failed", "-", "-", "-", "-", "-", "-"};
  const auto time = [&](const char* variant) {
    const auto* measured = row.find(variant);
    if (!measured) return std::string("-");
    return duration(measured->cpu) + " / " + duration(measured->wall);
  };
  const auto* floor = row.find("PEFT floor");
  const auto* peft = row.find("PEFT");
  return {row.title(),
          row.base,
          time(row.base.c_str()),
          ratio_text(row.find("plain")),
          ratio_text(row.find("ours")),
          ratio_text(peft),
          floor && peft ? fmt::format("{:.2f}", peft->ratio / floor->ratio) : "-",
          time("ours")};
}

inline std::string rows_table(const std::vector<Row>& rows) {
  std::vector<std::vector<std::string>> lines{{"row", "base", "base cpu / wall", "plain C++ / base",
                                               "ours / base", "PEFT / base", "PEFT / its floor",
                                               "ours cpu / wall"}};
  for (const auto& row : rows) lines.push_back(cells(row));
  return finetune::aligned(lines);
}

/// What a row says beside its ratios, a line for each row that has something to say.
inline std::string facts_text(const std::vector<Row>& rows) {
  std::string text;
  for (const auto& row : rows) {
    std::vector<std::string> parts;
    for (const auto& measured : row.variants) {
      const bool in_table = measured.name == "floor" || measured.name == "plain" || measured.name == "ours" ||
                            measured.name == "PEFT" || measured.name == row.base;
      if (!in_table) parts.push_back(measured.name + " " + ratio_text(&measured));
    }
    for (const auto& [name, value] : row.facts) {
      const bool bytes = name.find("bytes") != std::string::npos || name.find("memory") != std::string::npos;
      if (name == "layers" || name == "loaded") continue;
      parts.push_back(bytes ? fmt::format("{}: {:.2f} MB", name, value / 1e6)
                            : fmt::format("{}: {:.6g}", name, value));
    }
    if (row.agreement >= 0)
      parts.push_back(fmt::format("sides agree to {:.1e} (allowed {:.0e})", row.agreement, row.tolerance));
    if (!row.problem.empty()) parts.push_back("FAILED: " + row.problem);
    if (!parts.empty()) text += fmt::format("{}: {}\n", row.title(), fmt::join(parts, "; "));
  }
  return text;
}

inline std::string targets_table(const std::vector<TargetRow>& table) {
  std::vector<std::vector<std::string>> lines{{"target", "must", "stretch", "ours", "PEFT", "verdict"}};
  for (const auto& row : table) {
    lines.push_back({row.number + " " + row.metric, row.goal(row.must), row.goal(row.stretch),
                     row.text(row.ours), row.text(row.peft), row.verdict()});
  }
  return finetune::aligned(lines);
}

inline nlohmann::json to_json(const std::map<std::string, std::string>& machine, const std::vector<Row>& rows,
                              const std::vector<TargetRow>& table) {
  nlohmann::json json{
      {"machine", machine}, {"rows", nlohmann::json::array()}, {"targets", nlohmann::json::array()}};
  for (const auto& row : rows) {
    nlohmann::json variants = nlohmann::json::object();
    for (const auto& measured : row.variants) {
      variants[measured.name] = {{"cpu_seconds", measured.cpu},
                                 {"wall_seconds", measured.wall},
                                 {"ratio", measured.ratio},
                                 {"ratio_lower_quartile", measured.lower},
                                 {"ratio_upper_quartile", measured.upper}};
    }
    nlohmann::json line{{"set", row.set},       {"name", row.name},     {"base", row.base},
                        {"rounds", row.rounds}, {"variants", variants}, {"facts", row.facts}};
    if (row.agreement >= 0) line["agreement"] = {{"largest", row.agreement}, {"tolerance", row.tolerance}};
    if (!row.problem.empty()) line["problem"] = row.problem;
    json["rows"].push_back(std::move(line));
  }
  const auto value = [](const std::optional<double>& number) {
    return number ? nlohmann::json(*number) : nlohmann::json();
  };
  for (const auto& row : table) {
    json["targets"].push_back({{"row", row.number},
                               {"metric", row.metric},
                               {"must", row.must > 0 ? nlohmann::json(row.must) : nlohmann::json()},
                               {"stretch", row.stretch > 0 ? nlohmann::json(row.stretch) : nlohmann::json()},
                               {"at_least", row.at_least},
                               {"unit", row.unit},
                               {"ours", value(row.ours)},
                               {"PEFT", value(row.peft)},
                               {"verdict", row.verdict()}});
  }
  return json;
}

/// The rows with a frozen floor as bars from 1 on: what adapters add to the frozen model's time. A bar that
/// would be longer than the picture ends at its edge, beside its figure.
inline std::string chart(const std::string& subtitle, const std::vector<Row>& rows) {
  struct Series {
    const char *variant, *label, *color;
  };
  static constexpr Series series[] = {{"plain", "plain C++ (composed, torch::optim::AdamW)", "#9aa5b1"},
                                      {"ours", "this library", "#0b6e4f"},
                                      {"PEFT", "Python PEFT", "#d1495b"}};
  std::vector<const Row*> shown;
  double highest = 1.2;
  for (const auto& row : rows) {
    if (row.base != "floor" || !row.find("ours")) continue;
    shown.push_back(&row);
    for (const auto& one : series) {
      if (const auto* measured = row.find(one.variant)) highest = std::max(highest, measured->ratio);
    }
  }
  constexpr double left = 360, width = 520, bar = 11, gap = 12, top = 96, most = 3.5;
  const double end = std::min(most, std::ceil(highest * 5 + 0.5) / 5);
  const auto x_of = [&](double ratio) {
    return left + width * std::clamp((ratio - 1) / (end - 1), 0.0, 1.0);
  };
  const double step = end > 2.5 ? 0.5 : end > 1.6 ? 0.2 : 0.1;
  std::string body;
  double y = top;
  for (const auto* row : shown) {
    const double begin = y;
    for (const auto& one : series) {
      const auto* measured = row->find(one.variant);
      if (!measured) continue;
      const double to = x_of(measured->ratio);
      body += fmt::format("<rect x=\"{}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\" fill=\"{}\"/>\n", left,
                          y, std::max(1.0, to - left), bar - 1, one.color);
      body += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#222\"/>\n",
                          x_of(measured->lower), x_of(measured->upper), y + bar / 2 - 0.5, y + bar / 2 - 0.5);
      body += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" class=\"value\">{:.2f}</text>\n",
                          std::max(to, x_of(measured->upper)) + 4, y + bar - 2, measured->ratio);
      y += bar;
    }
    body += fmt::format("<text x=\"{}\" y=\"{:.1f}\" class=\"name\">{}</text>\n", left - 8,
                        (begin + y) / 2 + 4, finetune::internal::xml_text(row->title()));
    y += gap;
  }
  std::string axis;
  for (double ratio = 1; ratio <= end + 1e-9; ratio += step) {
    axis += fmt::format("<line x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2:.1f}\" stroke=\"{3}\"/>\n",
                        x_of(ratio), top - 8, y, ratio == 1 ? "#222" : "#ddd");
    axis += fmt::format("<text x=\"{:.1f}\" y=\"{}\" class=\"tick\">{:.1f}</text>\n", x_of(ratio), top - 12,
                        ratio);
  }
  std::string legend;
  double x = left;
  for (const auto& one : series) {
    legend += fmt::format(
        "<rect x=\"{:.1f}\" y=\"50\" width=\"12\" height=\"12\" fill=\"{}\"/>"
        "<text x=\"{:.1f}\" y=\"60\">{}</text>\n",
        x, one.color, x + 17, one.label);
    x += 40 + 6.3 * static_cast<double>(std::string_view(one.label).size());
  }
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"{0:.0f}\" viewBox=\"0 0 960 "
      "{0:.0f}\">\n"
      "<style>text{{font:12px "
      "sans-serif;fill:#222}}.name{{text-anchor:end}}.tick{{text-anchor:middle;fill:#555}}"
      ".value{{font-size:10px}}.title{{font-size:16px;font-weight:bold}}</style>\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
      "<text x=\"16\" y=\"24\" class=\"title\">Time of a step, the frozen model's being 1 (shorter is "
      "better)</text>\n"
      "<text x=\"16\" y=\"41\">{1}</text>\n{2}{3}{4}</svg>\n",
      y + 8, finetune::internal::xml_text(subtitle), legend, axis, body);
}

}  // namespace bench
