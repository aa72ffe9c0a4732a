// Selective targets: the parts of a base that BitFit and the tuning of top layers train, and the mode in
// which a model is probed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/model/targets.h"

namespace peft {

/// The bias terms of BitFit's code.
enum class BitFitTerm : std::uint8_t {
  all,
  query,
  key,
  value,
  intermediate,
  output,               ///< of the feed-forward and of the attention, both named output.dense
  output_layernorm,     ///< of both norms, both named output.LayerNorm
  attention_layernorm,  ///< of the attention's norm
};

/// The author's name of a term.
inline const char* to_string(BitFitTerm term) {
  switch (term) {
    case BitFitTerm::all:
      return "all";
    case BitFitTerm::query:
      return "query";
    case BitFitTerm::key:
      return "key";
    case BitFitTerm::value:
      return "value";
    case BitFitTerm::intermediate:
      return "intermediate";
    case BitFitTerm::output:
      return "output";
    case BitFitTerm::output_layernorm:
      return "output_layernorm";
    case BitFitTerm::attention_layernorm:
      return "attention_layernorm";
  }
  return "?";
}

namespace internal {

/// The last segments of the layers that a term means, in one family or the other.
inline std::vector<std::string> bitfit_names(BitFitTerm term) {
  switch (term) {
    case BitFitTerm::query:
    case BitFitTerm::key:
    case BitFitTerm::value: {
      const auto name = std::string("attention.self.") + to_string(term);
      return {name, name + "_proj"};
    }
    case BitFitTerm::intermediate:
      return {"intermediate.dense"};
    case BitFitTerm::output:
      return {"output.dense"};
    case BitFitTerm::output_layernorm:
      return {"output.LayerNorm"};
    case BitFitTerm::attention_layernorm:
      return {"attention.output.LayerNorm"};
    case BitFitTerm::all:
      break;
  }
  return {};
}

}  // namespace internal

/// The layers whose biases BitFit's code trains in BERT and RoBERTa, for `BiasOptions`: those of the terms,
/// as its fragments of names match them, and always the pooler's, in a model that has one. DeBERTa's
/// `query_proj`, `key_proj` and `value_proj` are the query, key and value. The task head trains whole,
/// beside: `train_also`, and `.exclude` it where all biases train. The paper recommends query and
/// intermediate. Throws: c10::ValueError for no terms, which is linear probing, or, in `add_adapter`, for a
/// term that no layer of the model bears. Paper: arXiv 2106.10199.
///
/// Example:
/// ```
/// using enum peft::BitFitTerm;
/// auto adapter = peft::add_adapter(*model, peft::BiasOptions(), peft::bitfit({query, intermediate}));
/// peft::train_also(adapter, *model, peft::named({"classifier"}));
/// ```
inline Target bitfit(const std::vector<BitFitTerm>& terms) {
  TORCH_CHECK_VALUE(!terms.empty(),
                    "bitfit: expected at least one term, but got none (hint: linear probing trains a copy of "
                    "the head alone, on(ReplaceOptions(), named({head})))");
  if (std::find(terms.begin(), terms.end(), BitFitTerm::all) != terms.end()) return all();
  return surveyed([terms](const std::vector<SiteInfo>& sites) -> Target::Predicate {
    std::set<std::string> paths;
    const auto take = [&](const std::vector<std::string>& names) {
      bool found = false;
      for (const auto& site : sites) {
        const auto bears = [&](const auto& name) { return internal::ends_in_name(site.path, name); };
        if (std::none_of(names.begin(), names.end(), bears)) continue;
        paths.insert(site.path);
        found = true;
      }
      return found;
    };
    for (const auto term : terms) {
      const auto names = internal::bitfit_names(term);
      TORCH_CHECK_VALUE(take(names), "bitfit: ", to_string(term), ": the model has no layer '", names.front(),
                        "' (hint: BiasOptions on named({...}) takes the layers of any model)");
    }
    take({"pooler.dense"});
    return [paths](const SiteInfo& site) { return paths.count(site.path) > 0; };
  });
}

namespace internal {

/// Where a site stands among numbered blocks: the first number in its path.
struct BlockPlace {
  std::string stack;  ///< the path before the number
  int64_t index = 0;
};

inline std::optional<BlockPlace> block_place(const std::string& path) {
  for (size_t begin = 0; begin <= path.size();) {
    const auto end = std::min(path.find('.', begin), path.size());
    const auto segment = path.substr(begin, end - begin);
    if (!segment.empty() && segment.size() < 10 &&
        segment.find_first_not_of("0123456789") == std::string::npos) {
      return BlockPlace{path.substr(0, begin ? begin - 1 : 0), std::stoll(segment)};
    }
    begin = end + 1;
  }
  return std::nullopt;
}

}  // namespace internal

/// The last k blocks of a model, and with `final_norm` the norms that follow them in the module that holds
/// them (not those of what every block reads, `SiteInfo::beside_blocks`): for `ReplaceOptions`. The task head
/// trains beside (`train_also`); embeddings and the blocks below stay as they are, and no gradient is
/// computed for them. Blocks are the modules of a list, those of the first number in a path; of several lists
/// (an encoder and a decoder), the last k of each, or of those alone whose path ends in `stack`. Throws:
/// c10::ValueError for k below 1 (0 is linear probing) or, in `add_adapter`, above the number of blocks.
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::ReplaceOptions(), peft::top_layers(2));
/// ```
inline Target top_layers(int64_t k, bool final_norm = true, const std::string& stack = "") {
  TORCH_CHECK_VALUE(k >= 1, "top_layers: k must be at least 1, but got ", k,
                    k == 0 ? " (hint: linear probing trains a copy of the head alone)" : "");
  return surveyed([k, final_norm, stack](const std::vector<SiteInfo>& sites) -> Target::Predicate {
    struct Layers {
      int64_t blocks = 0;
      size_t last = 0;  ///< position of its last site
    };
    std::map<std::string, Layers> stacks;
    const auto place_of = [&](const SiteInfo& site) {
      auto place = internal::block_place(site.path);
      if (place && !stack.empty() && !internal::ends_in_name(place->stack, stack)) place.reset();
      return place;
    };
    for (size_t i = 0; i < sites.size(); ++i) {
      const auto place = place_of(sites[i]);
      if (!place) continue;
      auto& found = stacks[place->stack];
      found = {std::max(found.blocks, place->index + 1), i};
    }
    TORCH_CHECK_VALUE(!stacks.empty(), "top_layers: the model has no numbered blocks",
                      stack.empty() ? "" : " in '" + stack + "'");
    for (const auto& [path, found] : stacks) {
      TORCH_CHECK_VALUE(k <= found.blocks, "top_layers: k must be at most the ", found.blocks, " blocks of '",
                        path, "', but got ", k);
    }
    std::set<std::string> paths;
    for (size_t i = 0; i < sites.size(); ++i) {
      const auto place = place_of(sites[i]);
      if (place && place->index >= stacks.at(place->stack).blocks - k) paths.insert(sites[i].path);
      if (place || !final_norm || !sites[i].fan_in.empty() || sites[i].bare || sites[i].beside_blocks)
        continue;
      for (const auto& [path, found] : stacks) {
        const bool beside = internal::module_above(sites[i].path) == internal::module_above(path);
        if (i > found.last && beside) paths.insert(sites[i].path);
      }
    }
    return [paths](const SiteInfo& site) { return paths.count(site.path) > 0; };
  });
}

/// Training mode for what the adapter trains, evaluation mode for the rest: dropout off, statistics of batch
/// norms fixed. For linear probing, whose backbone stands still; `model.train()` is the other choice, dropout
/// in the backbone, which reference libraries leave on.
inline void train_only(nn::Module& model, const Adapter& adapter) {
  model.eval();
  for (const auto& entry : adapter.entries()) {
    entry.piece->train();  // not the site, which holds layers of the base
    for (const auto& shared : entry.site->shared(adapter.name())) shared.second->train();
  }
}

}  // namespace peft
