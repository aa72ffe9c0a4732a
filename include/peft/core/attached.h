// Attached: a piece on a site, where it was asked for and what it shares with the rest of its adapter.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "peft/core/described.h"
#include "peft/core/piece.h"

namespace peft {

namespace internal {

/// The name of what listens to a model's layers for a while (`Probes`).
inline constexpr const char* probe_name = "__probe__";

}  // namespace internal

/// Where a piece was asked for: the declarative half of a target, for the config on disk.
struct Origin {
  std::vector<std::string> names;  ///< last path segments or whole paths; empty with a pattern or a predicate
  std::string pattern;             ///< regular expression for the whole path
  std::vector<std::string> exclude;  ///< names
  std::vector<int64_t> layers;       ///< layers_to_transform
  std::vector<std::string> layers_pattern;
};

class Controller;

/// What all pieces of one adapter share.
struct AdapterRecord {
  std::string name;
  ModelDescription model;
  std::vector<std::string> paths;                        ///< of the model's modules
  std::vector<std::shared_ptr<Controller>> controllers;  ///< of the methods that have one
  bool has_optimizer = false;
};

/// One piece on a site, with where it came from.
struct Attached {
  std::shared_ptr<PieceImpl> piece;
  std::shared_ptr<const Origin> origin;
  std::shared_ptr<AdapterRecord> record;
};

}  // namespace peft
