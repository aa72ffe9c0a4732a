// Combination: adapters on their way to a new one.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/kernels/is_finite.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/combine_options.h"
#include "peft/model/combine_pieces.h"

namespace peft {

/// An adapter and how much of it.
struct WeightedAdapter {
  std::string name;
  double weight = 1;
};

/// For each tensor of an adapter, by its name in `Adapter::named_tensors`, the diagonal of its Fisher
/// information: the mean of the squared gradients.
using Fisher = std::map<std::string, Tensor>;

namespace internal {

/// Adapters on their way to a new one: gathers their pieces, says what does not fit, sums, attaches.
class Combination {
 public:
  Combination(nn::Module& model, const char* verb, const std::vector<WeightedAdapter>& adapters,
              CombineOptions options, std::string name)
      : verb_(verb), name_(std::move(name)) {
    check(options);
    plan_.model = &model;
    plan_.nodes = walk(model, /*learn_paths=*/true);
    recipe_.options = std::move(options);
    for (const auto& [adapter, weight] : adapters) {
      recipe_.names.push_back(adapter);
      recipe_.weights.push_back(weight);
    }
    check_names();
    problems_.raise(verb_);
    gather();
    check_methods();
    problems_.raise(verb_);
    check_head();
    choose_heads();
    set_ranks();
    check_terms();
    problems_.raise(verb_);
  }

  /// Weighs entry by entry: λ_i F_i / ‖F_i‖. One map an adapter, by the names of its tensors.
  void weigh_by(const std::vector<Fisher>& fisher) {
    constexpr double least = 1e-6;  // of the last adapter, which the reference favours
    for (size_t i = 0; i < recipe_.names.size(); ++i) check_fisher(fisher, i);
    problems_.raise(verb_);
    for (size_t i = 0; i < fisher.size(); ++i) {
      double squares = 0;
      for (const auto& [key, tensor] : fisher[i]) {
        squares += tensor.to(torch::kDouble).square().sum().item<double>();
      }
      auto& factors = recipe_.factors.emplace_back();
      for (const auto& [key, tensor] : fisher[i]) {
        const auto floored = i + 1 < fisher.size() ? tensor : tensor.clamp_min(least);
        factors.emplace(key, floored * (recipe_.weights[i] / std::sqrt(squares)));
      }
    }
  }

  /// The new adapter, on the model: frozen, not active.
  Adapter attach() {
    torch::NoGradGuard no_grad;
    if (draws(recipe_.options.type())) discard_starts();
    for (const auto& terms : terms_) {
      as_summable(*terms.list.front().piece, [&](const auto& first) {
        plan_.entries.push_back({terms.site, sum(first, terms, recipe_), terms.origin});
      });
    }
    auto record = std::make_shared<AdapterRecord>(adapter(*plan_.model, recipe_.names.front()).record());
    record->name = name_;
    record->controllers.clear();
    record->has_optimizer = false;
    const Adapter result(record);
    commit(plan_, result, /*trainable=*/false, /*active=*/false);
    return result;
  }

 private:
  void check_names() {
    const auto set = activation_of(plan_.nodes, verb_)->get();
    for (size_t i = 0; i < recipe_.names.size(); ++i) {
      const auto& one = recipe_.names[i];
      if (!set->knows(one)) problems_.add(no_adapter_text(one, set->known));
      if (std::count(recipe_.names.begin(), recipe_.names.begin() + static_cast<std::ptrdiff_t>(i), one)) {
        problems_.add("'" + one + "' is named twice");
      }
      if (!std::isfinite(recipe_.weights[i])) {
        problems_.add("the weight of '" + one + "' must be finite, but got " +
                      std::to_string(recipe_.weights[i]));
      }
    }
    if (recipe_.names.empty()) problems_.add("expected at least one adapter, but got none");
    if (set->knows(name_)) problems_.add("the model already has an adapter '" + name_ + "'");
    check_sites(plan_.nodes, name_, problems_);
  }

  void gather() {
    methods_.resize(recipe_.names.size());
    for (const auto& node : plan_.nodes) {
      if (!node.site) continue;
      std::vector<Terms> here;
      for (size_t i = 0; i < recipe_.names.size(); ++i) {
        for (const auto& attached : node.site->pieces(recipe_.names[i])) {
          const auto& method = attached.piece->method();
          if (!attached.piece->substitutes()) methods_[i].insert(method);
          auto same = std::find_if(here.begin(), here.end(),
                                   [&](const Terms& terms) { return terms.method() == method; });
          if (same == here.end()) {
            here.push_back({node.site, attached.origin, {}});
            same = here.end() - 1;
          }
          same->list.push_back({i, attached.piece});
        }
      }
      terms_.insert(terms_.end(), here.begin(), here.end());
    }
    recipe_.weights_only =
        std::all_of(methods_.begin(), methods_.end(), [](const auto& methods) { return methods.empty(); });
    // One adapter has nothing to vote with: the reference sums, whatever is asked for.
    const auto type = recipe_.options.type();
    if (recipe_.names.size() == 1 && type != CombineType::exact && type != CombineType::pem) {
      recipe_.options.type(CombineType::linear);
    }
  }

  void check_methods() {
    const auto text = [](const std::set<std::string>& methods) {
      std::string all;
      for (const auto& method : methods) all += (all.empty() ? "" : ", ") + method;
      return all.empty() ? "copies of layers only" : all;
    };
    for (size_t i = 1; i < methods_.size(); ++i) {
      if (methods_[i] == methods_[0]) continue;
      problems_.add("the adapters must be of one method, but '" + recipe_.names[0] + "' is " +
                    text(methods_[0]) + " and '" + recipe_.names[i] + "' " + text(methods_[i]));
    }
    for (const auto& terms : terms_) {
      const auto& piece = *terms.list.front().piece;
      if (as_summable(piece, [](const auto&) {})) continue;
      problems_.add("'" + terms.site->path() + "': '" + piece.method() +
                    "' has no arithmetic: its change of the weights is no low-rank product, vector or copy "
                    "whose sums mean something");
    }
  }

  void check_head() {
    const auto& head = recipe_.options.head();
    if (head.empty() || std::find(recipe_.names.begin(), recipe_.names.end(), head) != recipe_.names.end())
      return;
    problems_.add("CombineOptions: head must be one of the adapters, but got '" + head + "'");
  }
  void choose_heads() {
    const auto& head = recipe_.options.head();
    if (head.empty() || recipe_.weights_only) return;
    std::erase_if(terms_, [&](Terms& terms) {
      if (!std::dynamic_pointer_cast<ReplaceImpl>(terms.list.front().piece)) return false;
      std::erase_if(terms.list, [&](const auto& term) { return recipe_.names[term.adapter] != head; });
      return terms.list.empty();
    });
  }

  /// The rank an adapter was asked to have: its largest, also of layers it does not have.
  static int64_t asked_rank(const LoraImpl& piece) {
    const auto& options = piece.options;
    int64_t largest = options.rank();
    for (const auto& [pattern, rank] : options.rank_pattern()) largest = std::max(largest, rank);
    return largest * factors_of(piece).rank() / piece.rank;
  }

  /// The new LoRA's options: the first adapter's, with the ranks to come and a scaling of 1.
  void set_ranks() {
    std::map<size_t, int64_t> asked;
    const LoraImpl* first = nullptr;
    size_t owner = 0;
    bool bias = false;
    for (const auto& terms : terms_) {
      for (const auto& term : terms.list) {
        const auto* lora = dynamic_cast<const LoraImpl*>(term.piece.get());
        if (!lora) continue;
        if (!first || term.adapter < owner) {
          first = lora;
          owner = term.adapter;
        }
        bias = bias || lora->lora_B_bias.defined();
        asked[term.adapter] = std::max(asked[term.adapter], asked_rank(*lora));
      }
    }
    if (!first) return;
    const auto type = recipe_.options.type();
    for (const auto& [index, rank] : asked) {
      recipe_.rank = type == CombineType::cat ? recipe_.rank + rank : std::max(recipe_.rank, rank);
    }
    if (truncates(type)) recipe_.rank = recipe_.options.rank().value_or(recipe_.rank);
    std::map<std::string, int64_t> ranks;
    for (const auto& terms : terms_) {
      if (std::dynamic_pointer_cast<LoraImpl>(terms.list.front().piece)) {
        auto& rank = ranks[terms.site->info().target()];
        rank = std::max(rank, combined_rank(factors_of_terms(terms), recipe_));
      }
    }
    if (type == CombineType::exact) {
      for (const auto& [target, rank] : ranks) recipe_.rank = std::max(recipe_.rank, rank);
    }
    recipe_.lora = LoraOptions(recipe_.rank)
                       .alpha(static_cast<double>(recipe_.rank))
                       .dropout(first->options.dropout())
                       .lora_bias(bias);
    if (is_plain(first->options.init())) recipe_.lora.init(first->options.init());
    for (const auto& [target, rank] : ranks) {
      if (rank == recipe_.rank) continue;
      const auto pattern = "^" + escape_regex(target);
      recipe_.lora.rank_pattern().emplace_back(pattern, rank);
      recipe_.lora.alpha_pattern().emplace_back(pattern, static_cast<double>(rank));
    }
  }

  void check_terms() {
    for (const auto& terms : terms_) {
      const auto where = "'" + terms.site->path() + "': ";
      as_summable(*terms.list.front().piece, [&](const auto& first) {
        const auto why = mismatch(first, terms, recipe_);
        if (!why.empty()) problems_.add(where + why);
      });
      for (const auto& term : terms.list) {
        for (const auto& item : term.piece->named_parameters()) {
          if (is_finite(item.value())) continue;
          problems_.add(where + "'" + item.key() + "' of '" + recipe_.names[term.adapter] +
                        "' holds NaN or infinity");
        }
      }
    }
  }

  void check_fisher(const std::vector<Fisher>& fisher, size_t i) {
    const auto& name = recipe_.names[i];
    if (fisher.size() != recipe_.names.size()) {
      if (i == 0) {
        problems_.add("fisher must have an entry for each of the " + std::to_string(recipe_.names.size()) +
                      " adapters, but got " + std::to_string(fisher.size()));
      }
      return;
    }
    if (recipe_.weights[i] <= 0) problems_.add("with fisher, the weight of '" + name + "' must be positive");
    double sum = 0;
    for (const auto& terms : terms_) {
      for (const auto& term : terms.list) {
        if (term.adapter != i) continue;
        const auto* lora = dynamic_cast<const LoraImpl*>(term.piece.get());
        if (lora && (factors_of(*lora).rank() != lora->rank || lora->options.init() == LoraInit::mica)) {
          problems_.add("'" + terms.site->path() + "': fisher weighs A and B, but the LoRA of '" + name +
                        "' has a start taken out of the base, a B that does not train, or blocks");
          continue;
        }
        for (const auto& item : term.piece->named_parameters()) {
          const auto key = terms.key(item.key());
          const auto found = fisher[i].find(key);
          if (found == fisher[i].end()) {
            problems_.add("fisher of '" + name + "' lacks '" + key + "'");
          } else if (found->second.sizes() != item.value().sizes()) {
            problems_.add("fisher of '" + name + "': '" + key + "' expected " +
                          shape_text(item.value().sizes()) + ", but got " +
                          shape_text(found->second.sizes()));
          } else if (!(found->second.isfinite() & (found->second >= 0)).all().item<bool>()) {
            problems_.add("fisher of '" + name + "': '" + key + "' must be finite and not negative");
          } else {
            sum += found->second.to(torch::kDouble).sum().item<double>();
          }
        }
      }
    }
    if (problems_.empty() && sum <= 0) problems_.add("fisher of '" + name + "' must not be zero everywhere");
  }

  /// The reference starts the new LoRA at random before it fills it: draws before those of the pruning.
  void discard_starts() const {
    for (const auto& terms : terms_) {
      if (!std::dynamic_pointer_cast<LoraImpl>(terms.list.front().piece)) continue;
      auto info = terms.site->info();
      if (recipe_.rank % info.groups != 0) info.groups = 1;  // where the reference has none
      const auto options = recipe_.lora_on(info).rank_pattern({}).alpha_pattern({});
      make_piece(options, info)->initialize(*terms.site->base_view());
    }
  }

  const char* verb_;
  std::string name_;
  Problems problems_;
  Plan plan_;
  Recipe recipe_;
  std::vector<Terms> terms_;
  std::vector<std::set<std::string>> methods_;  ///< of each adapter, copies of layers and biases left out
};

}  // namespace internal
}  // namespace peft
