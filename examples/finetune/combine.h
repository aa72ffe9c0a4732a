// combine: a new adapter's folder from the folders of others, without the model.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/config_json.h"
#include "peft/io/peft_directory.h"
#include "peft/io/staged_directory.h"
#include "peft/model/combine.h"
#include "skeleton.h"
#include "task.h"

namespace finetune {

/// The arguments of `combine`.
struct CombineArguments {
  std::vector<std::string> adapters;  ///< DIR:WEIGHT
  std::string type, sign;
  std::optional<double> density;
  std::optional<int64_t> rank;
  fs::path out;
  std::optional<fs::path> head;
  uint64_t seed = 0;
  bool overwrite = false;
};

/// The names of the types, for a command line.
inline std::vector<std::string> combine_types() {
  std::vector<std::string> names;
  for (const auto& [type, name] : peft::internal::combine_type_names) names.emplace_back(name);
  return names;
}

namespace internal {

/// An adapter's folder and how much of it.
struct Summand {
  std::string given;  ///< the folder as the user wrote it
  fs::path folder;    ///< where its config is
  double weight = 1;
};

/// DIR:WEIGHT, the weight after the last colon.
inline Summand summand(const std::string& text) {
  const auto colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    throw std::runtime_error(fmt::format("--adapter: expected DIR:WEIGHT, but got '{}'", text));
  }
  Summand one;
  one.given = text.substr(0, colon);
  const auto number = text.substr(colon + 1);
  size_t end = 0;
  try {
    one.weight = std::stod(number, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (number.empty() || end != number.size() || !std::isfinite(one.weight)) {
    throw std::runtime_error(fmt::format(
        "--adapter: the weight of '{}' must be a finite number, but got '{}'", one.given, number));
  }
  std::error_code ignored;
  if (!fs::is_directory(one.given, ignored)) {
    throw std::runtime_error(fmt::format("--adapter: there is no folder '{}'", one.given));
  }
  one.folder = peft::internal::adapter_folder(one.given, "default");
  return one;
}

/// Refuses what has no arithmetic before tensors are read.
inline void require_summable(const Summand& one) {
  static const std::set<std::string> known{"LORA", "IA3", "LN_TUNING", "BIAS", "REPLACE"};
  const auto json = peft::internal::read_json_object(one.folder / peft::internal::config_file_name);
  const auto type = json.value("peft_type", nlohmann::ordered_json());
  const bool dora = json.contains("use_dora") && json["use_dora"] == true;
  if (!dora && (!type.is_string() || known.count(type.get<std::string>()))) return;
  throw std::runtime_error(
      fmt::format("--adapter: '{}' is {}, whose tensors do not add up to anything (there are {})", one.given,
                  dora ? "DoRA (use_dora)" : type.get<std::string>(), fmt::join(known, ", ")));
}

/// Without the model, θ₀ + Σ w_i (θ_i − θ₀) can be had only where θ₀ cancels out.
inline void require_no_base(torch::nn::Module& model, const std::vector<std::string>& names,
                            const std::vector<Summand>& summands, const peft::CombineOptions& options) {
  std::map<std::string, double> sums;  // by layer and method
  bool copies_only = true;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto adapter = peft::adapter(model, names[i]);
    for (const auto& entry : adapter.entries()) {
      copies_only = copies_only && entry.piece->substitutes();
      if (!entry.piece->substitutes()) continue;
      sums[fmt::format("{}: {}", entry.site->path(), entry.piece->method())] += summands[i].weight;
    }
  }
  if (copies_only && peft::prunes(options.type()) && names.size() > 1) {
    throw std::runtime_error(fmt::format(
        "--type {}: adapters that are copies of layers are pruned by what they change, which needs the base "
        "(hint: linear)",
        peft::to_string(options.type())));
  }
  for (const auto& [where, sum] : sums) {
    if (std::fabs(sum - 1) < 1e-9 || (!copies_only && where.ends_with(": replace"))) continue;
    throw std::runtime_error(
        fmt::format("--adapter: the weights must add up to 1 for '{}', a copy of the base's, which is not at "
                    "hand; they add "
                    "up to {:g}",
                    where, sum));
  }
}

/// The folder whose head and labels the result takes: the one asked for, else the only one that has some.
inline const Summand* head_of(const std::vector<Summand>& summands, const std::optional<fs::path>& head) {
  const Summand* found = nullptr;
  int count = 0;
  for (const auto& one : summands) {
    std::error_code ignored;
    if (head) {
      if (fs::equivalent(*head, one.given, ignored)) return &one;
    } else if (fs::exists(one.folder / Settings::file_name, ignored)) {
      found = &one;
      ++count;
    }
  }
  if (head) {
    throw std::runtime_error(
        fmt::format("--head: must be one of the --adapter folders, but got '{}'", head->string()));
  }
  return count == 1 ? found : nullptr;
}

inline bool have_settings(const std::vector<Summand>& summands) {
  return std::any_of(summands.begin(), summands.end(), [](const Summand& one) {
    std::error_code ignored;
    return fs::exists(one.folder / Settings::file_name, ignored);
  });
}

/// Refuses a folder for the result that is in use, or that no adapter is in.
inline void require_free(const CombineArguments& arguments, const std::vector<Summand>& summands) {
  std::error_code error;
  if (!fs::exists(arguments.out, error) ||
      (fs::is_directory(arguments.out, error) && fs::is_empty(arguments.out, error)))
    return;
  if (!arguments.overwrite) {
    throw std::runtime_error(fmt::format(
        "--out: '{}' exists and is not empty (hint: another name, or --overwrite)", arguments.out.string()));
  }
  for (const auto& one : summands) {
    if (fs::equivalent(arguments.out, one.given, error)) {
      throw std::runtime_error(
          fmt::format("--out: '{}' is a folder an adapter is read from", arguments.out.string()));
    }
  }
  if (!fs::exists(arguments.out / peft::internal::config_file_name, error)) {
    throw std::runtime_error(
        fmt::format("--out: '{}' holds no adapter; it is not overwritten", arguments.out.string()));
  }
}

inline peft::CombineOptions options_of(const CombineArguments& arguments) {
  const auto names = combine_types();
  const auto at = std::find(names.begin(), names.end(), arguments.type) - names.begin();
  const auto type = peft::internal::combine_type_names.at(static_cast<size_t>(at)).first;
  if (peft::prunes(type) && !arguments.density) {
    throw std::runtime_error(fmt::format("--density must be given for --type {}", arguments.type));
  }
  const auto unused = [&](const char* option, const char* why) {
    fmt::print(stderr, "note: {} is not used: {}\n", option, why);
  };
  if (arguments.density && !peft::prunes(type)) unused("--density", "this type prunes nothing");
  if (arguments.rank && !peft::truncates(type)) unused("--rank", "this type truncates nothing");
  if (arguments.adapters.size() == 1 && type != peft::CombineType::exact && type != peft::CombineType::pem) {
    fmt::print(stderr, "note: one adapter is scaled by its weight, whatever the type\n");
  }
  return peft::CombineOptions(type)
      .density(arguments.density)
      .rank(arguments.rank)
      .sign(arguments.sign == "frequency" ? peft::Sign::frequency : peft::Sign::total);
}

}  // namespace internal

/// Combines adapters on disk as `peft::combine` does those of a model: on a skeleton of the layers their
/// files speak of. Random draws come in the order of the layers' names.
inline void combine(const CombineArguments& arguments) {
  auto options = internal::options_of(arguments);
  std::vector<internal::Summand> summands;
  for (const auto& text : arguments.adapters) summands.push_back(internal::summand(text));
  internal::require_free(arguments, summands);
  const auto* head = internal::head_of(summands, arguments.head);
  Skeleton skeleton;
  for (const auto& one : summands) {
    internal::require_summable(one);
    skeleton.add(one.folder, one.given);
  }
  const auto model = skeleton.build();
  // A folder's name may hold what an adapter's may not.
  std::vector<std::string> names;
  std::vector<peft::WeightedAdapter> weighted;
  for (size_t i = 0; i < summands.size(); ++i) {
    names.push_back(fmt::format("#{}", i + 1));
    weighted.push_back({names.back(), summands[i].weight});
    peft::load_adapter(
        *model, summands[i].folder, names.back(), /*trainable=*/false,
        [&](const std::string& line) { fmt::print(stderr, "note: '{}': {}\n", summands[i].given, line); });
    peft::set_active(*model, {});
    if (head == &summands[i] && arguments.head) options.head(names.back());
  }
  try {
    internal::require_no_base(*model, names, summands, options);
    torch::manual_seed(arguments.seed);
    const auto result = peft::combine(*model, weighted, options, "combined");
    peft::StagedDirectory staged(arguments.out, arguments.overwrite);
    for (const auto& line : peft::save_adapter(result, staged.path())) fmt::print(stderr, "note: {}\n", line);
    if (head) {
      for (const char* file : {Settings::file_name, Task::head_file}) {
        if (fs::exists(head->folder / file)) fs::copy_file(head->folder / file, staged.path() / file);
      }
    }
    staged.commit();
    if (!head && internal::have_settings(summands)) {
      fmt::print(
          stderr,
          "note: no head and no labels are written, for several adapters have them (hint: --head DIR)\n");
    }
  } catch (const c10::Error& error) {
    std::string text = error.what_without_backtrace();
    for (size_t i = 0; i < names.size(); ++i) {
      const auto name = "'" + names[i] + "'", given = "'" + summands[i].given + "'";
      for (size_t at = 0; (at = text.find(name, at)) != std::string::npos; at += given.size()) {
        text.replace(at, name.size(), given);
      }
    }
    for (const auto& [option, flag] :
         {std::pair("CombineOptions::head", "--head"), {"CombineOptions: ", "--"}}) {
      if (const auto at = text.find(option); at != std::string::npos)
        text.replace(at, std::string(option).size(), flag);
    }
    throw std::runtime_error(text);
  }
  fmt::print(stderr, "combined: '{}'\n", arguments.out.string());
}

}  // namespace finetune
