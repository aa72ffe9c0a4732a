// Part: a method and where it goes.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/core/pattern.h"
#include "peft/core/piece.h"
#include "peft/model/targets.h"

namespace peft {

/// Settings of a method: what it needs of a site, its name, and the free functions every method header has.
template <class Options>
concept MethodOptions = requires(const Options& options, const SiteInfo& site) {
  { Options::needs } -> std::convertible_to<AnyOf>;
  { Options::method } -> std::convertible_to<std::string>;
  { refusal(options, site) } -> std::same_as<std::string>;
  { make_piece(options, site) } -> std::same_as<std::shared_ptr<PieceImpl>>;
};

/// Settings that also say which sites the method goes to, so that it needs no target.
template <class Options>
concept PlacedOptions = MethodOptions<Options> && requires(const Options& options, const SiteInfo& site) {
  { goes_to(options, site) } -> std::same_as<bool>;
};

/// A method and where it goes, the method's type forgotten: several make one adapter.
struct Part {
  std::string method;
  AnyOf needs;
  Target target;
  std::function<std::string(const SiteInfo&)> refusal;
  std::function<std::shared_ptr<PieceImpl>(const SiteInfo&)> make;
  /// Of a method that has one: the controller of the pieces made by this part.
  std::function<std::shared_ptr<Controller>(const std::vector<std::shared_ptr<PieceImpl>>&)> control = {};
  /// The expressions of options by pattern (`rank_pattern`, `alpha_pattern`), each of which must match a
  /// site.
  std::set<std::string> patterns = {};
  /// Whether they are compared with the site's own path; else with `SiteInfo::target`.
  bool by_path = false;
  std::string pattern_name(const SiteInfo& site) const { return by_path ? site.path : site.target(); }
  /// What the method also puts on every site of another kind that can take it, in models that have any.
  std::vector<Part> also = {};
};

namespace internal {

/// Why a method cannot act through W′ alone, whatever its own view of the site, or an empty string.
template <class Options>
std::string weights_refusal(const Options& options, const SiteInfo& site) {
  if (!site.weights_only) return {};
  const auto name = "a " + site.layer + " that runs on weights alone takes no ";
  if constexpr (requires(const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
                  make_controller(options, pieces);
                }) {
    return name + Options::method + ", which watches the layer's forward";
  }
  double dropout = 0;
  if constexpr (requires { options.dropout(); }) dropout = options.dropout();
  if constexpr (requires { options.rank_dropout(); }) dropout = std::max(dropout, options.rank_dropout());
  if constexpr (requires { options.module_dropout(); }) dropout = std::max(dropout, options.module_dropout());
  return dropout > 0 && !site.ignores_dropout ? name + "dropout" : "";
}

/// The expressions of a method's options by pattern.
template <class Options>
std::set<std::string> patterns_of(const Options& options) {
  std::set<std::string> patterns;
  if constexpr (requires { options.rank_pattern(); }) {
    for (const auto& [pattern, rank] : options.rank_pattern()) patterns.insert(pattern);
    for (const auto& [pattern, alpha] : options.alpha_pattern()) patterns.insert(pattern);
  } else if constexpr (requires { options.lora().rank_pattern(); }) {
    patterns = patterns_of(options.lora());
  }
  return patterns;
}

/// Which of the expressions of options by pattern mean none of these names.
inline std::vector<std::string> without_match(const std::set<std::string>& patterns,
                                              const std::vector<std::string>& names) {
  std::vector<std::string> found;
  for (const auto& pattern : patterns) {
    const auto expression = suffix_expression(pattern);
    const bool fits = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
      return std::regex_match(name, expression);
    });
    if (!fits) found.push_back(pattern);
  }
  return found;
}

}  // namespace internal

/// `options` on `target`, as a part of an adapter. Throws c10::ValueError if an option is out of range.
template <MethodOptions Options>
Part on(Options options, Target target) {
  if constexpr (requires { check(options); }) check(options);
  Part part{Options::method, Options::needs, std::move(target),
            [options](const SiteInfo& site) {
              const auto why = internal::weights_refusal(options, site);
              return why.empty() ? refusal(options, site) : why;
            },
            [options](const SiteInfo& site) { return make_piece(options, site); }};
  part.patterns = internal::patterns_of(options);
  part.by_path = requires { Options::patterns_by_path; };
  if constexpr (requires(const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
                  make_controller(options, pieces);
                }) {
    part.control = [options](const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
      return make_controller(options, pieces);
    };
  }
  if constexpr (requires { companion(options); }) {
    if (const auto more = companion(options)) part.also.push_back(on(*more, all()));
  }
  return part;
}

/// `options` where they say.
template <PlacedOptions Options>
Part on(const Options& options) {
  return on(options, where([options](const SiteInfo& site) { return goes_to(options, site); }));
}

}  // namespace peft
