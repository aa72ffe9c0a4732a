// MethodRow: what the survey measured of one method.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace survey {

/// A median of ratios with its quartiles.
struct Ratio {
  double median = 0, lower = 0, upper = 0;
};

/// What a method makes different in the base's weights, measured once it is merged.
struct Change {
  int64_t entries = 0;     ///< base values that differ
  int64_t matrices = 0;    ///< base matrices that differ
  int64_t vectors = 0;     ///< biases and weights of norms that differ
  int64_t rank_least = 0;  ///< of the change of those matrices
  int64_t rank_most = 0;
  int64_t full = 0;  ///< matrices whose change has the largest rank a matrix of its shape can have
};

/// One line of the table.
struct MethodRow {
  std::string method;   ///< as the user wrote it
  std::string problem;  ///< why there are no figures
  std::string note;     ///< why it cannot be saved

  std::optional<int64_t> storage_bytes;   ///< of the files it is saved in; none: they cannot be written
  int64_t trainable = 0;                  ///< weights that train
  double percent = 0;                     ///< those as a part of the base's, 0 to 100
  std::optional<Change> change;           ///< none: it does not merge
  int64_t peak_bytes = 0;                 ///< the most that training held beside the frozen model
  int64_t kept_bytes = 0;                 ///< what the graph kept for backward
  int64_t blocks = 0, blocks_passed = 0;  ///< of the encoder; those that backward ran through
  std::optional<Ratio> backward;          ///< time of backward / time of the frozen model's forward
  std::optional<Ratio> before, after;  ///< time of a forward / the frozen model's, before and after merging
  bool same_operations = false;        ///< merged, the model runs the operations of the frozen one
};

inline void to_json(nlohmann::json& json, const Ratio& ratio) {
  json = {{"median", ratio.median}, {"lower_quartile", ratio.lower}, {"upper_quartile", ratio.upper}};
}
inline void from_json(const nlohmann::json& json, Ratio& ratio) {
  ratio = {json.at("median").get<double>(), json.at("lower_quartile").get<double>(),
           json.at("upper_quartile").get<double>()};
}

inline void to_json(nlohmann::json& json, const Change& change) {
  json = {{"entries", change.entries},       {"matrices", change.matrices},   {"vectors", change.vectors},
          {"rank_least", change.rank_least}, {"rank_most", change.rank_most}, {"full", change.full}};
}
inline void from_json(const nlohmann::json& json, Change& change) {
  const auto number = [&](const char* key) { return json.at(key).get<int64_t>(); };
  change = {number("entries"),    number("matrices"),  number("vectors"),
            number("rank_least"), number("rank_most"), number("full")};
}

inline void to_json(nlohmann::json& json, const MethodRow& row) {
  const auto optional = [](const auto& value) { return value ? nlohmann::json(*value) : nlohmann::json(); };
  json = {{"method", row.method},
          {"problem", row.problem},
          {"note", row.note},
          {"storage_bytes", optional(row.storage_bytes)},
          {"trainable", row.trainable},
          {"percent", row.percent},
          {"change", optional(row.change)},
          {"peak_bytes", row.peak_bytes},
          {"kept_bytes", row.kept_bytes},
          {"blocks", row.blocks},
          {"blocks_passed", row.blocks_passed},
          {"backward", optional(row.backward)},
          {"before_merging", optional(row.before)},
          {"after_merging", optional(row.after)},
          {"same_operations", row.same_operations}};
}
inline void from_json(const nlohmann::json& json, MethodRow& row) {
  const auto read = [&](const char* key, auto& value) { json.at(key).get_to(value); };
  const auto optional = [&](const char* key, auto& value) {
    if (!json.at(key).is_null()) json.at(key).get_to(value.emplace());
  };
  read("method", row.method);
  read("problem", row.problem);
  read("note", row.note);
  optional("storage_bytes", row.storage_bytes);
  read("trainable", row.trainable);
  read("percent", row.percent);
  optional("change", row.change);
  read("peak_bytes", row.peak_bytes);
  read("kept_bytes", row.kept_bytes);
  read("blocks", row.blocks);
  read("blocks_passed", row.blocks_passed);
  optional("backward", row.backward);
  optional("before_merging", row.before);
  optional("after_merging", row.after);
  read("same_operations", row.same_operations);
}

}  // namespace survey
