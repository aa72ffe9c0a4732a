// Settings: options of which a config holds one set for all layers.
#pragma once

#include <nlohmann/json.hpp>

#include "peft/io/peft_format.h"

namespace peft::internal {

/// Writes the keys of the first piece's options. `keys`: options → their keys and values; where a layer has
/// others, that is a problem.
template <class Piece, class Keys>
void write_settings(const Entries& entries, nlohmann::json& json, Problems& problems, const Keys& keys) {
  const auto of = [&](const Adapter::Entry& entry) -> nlohmann::json {
    return keys(static_cast<const Piece&>(*entry.piece).options);
  };
  const auto first = of(entries.front());
  for (const auto& entry : entries) {
    const auto other = of(entry);
    for (const auto& item : first.items()) {
      if (other.at(item.key()) == item.value()) continue;
      problems.add("'" + entry.site->path() + "' must have the same " + item.key() + " as '" +
                   entries.front().site->path() + "', " + item.value().dump() + ", but got " +
                   other.at(item.key()).dump() + ", and one config holds one (hint: make them two adapters)");
    }
  }
  json.update(first);
}

/// Writes rank and α with their patterns, of options as `DenseUpdate` reads them.
template <class Piece>
void write_rank_and_alpha(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes) {
  const auto piece = [](const Adapter::Entry& entry) -> const Piece& {
    return static_cast<const Piece&>(*entry.piece);
  };
  const auto& options = piece(entries.front()).options;
  std::vector<std::pair<std::string, int64_t>> ranks;
  std::vector<std::pair<std::string, double>> alphas;
  bool scaled = false;
  for (const auto& entry : entries) {
    ranks.emplace_back(entry.site->path(), piece(entry).rank);
    alphas.emplace_back(entry.site->path(), piece(entry).alpha);
    scaled = scaled || piece(entry).scale() != 1.0;
  }
  json["r"] = options.rank();
  json["alpha"] = plain_number(options.alpha());
  json["rank_pattern"] = pattern_json(options.rank_pattern(), options.rank(), ranks);
  json["alpha_pattern"] = pattern_json(options.alpha_pattern(), options.alpha(), alphas);
  if (scaled) notes.emplace_back(scale_note);
}

/// Reads what `write_rank_and_alpha` writes, and the two rates of dropout.
template <class Options>
Options read_dense_update(ConfigFields& fields) {
  Options options(fields.integer("r", 8, 1));
  options.alpha(fields.number(
      "alpha", 8.0, [](double value) { return std::isfinite(value); }, "must be a finite number"));
  options.rank_dropout(fields.rate("rank_dropout")).module_dropout(fields.rate("module_dropout"));
  options.rank_pattern(fields.ranks("rank_pattern")).alpha_pattern(fields.numbers("alpha_pattern"));
  return options;
}

}  // namespace peft::internal
