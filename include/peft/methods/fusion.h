// AdapterFusion: attention of each token over what several trained bottleneck adapters made of it.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/core/forward_state.h"
#include "peft/core/residual.h"
#include "peft/methods/projection.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"

namespace peft {

/// Settings of `Fusion`. Defaults are AdapterHub's "dynamic" configuration. Example:
/// `add_fusion(*model, peft::FusionOptions({"topics", "order"}))`.
struct FusionOptions {
  static constexpr Needs needs = Needs::residual;
  static constexpr const char* method = "fusion";

  /// The adapters it fuses, at least one.
  explicit FusionOptions(std::vector<std::string> adapters) : adapters_(std::move(adapters)) {}
  TORCH_ARG(std::vector<std::string>, adapters);

  /// Whether query, keys and values are projected. At least one is.
  TORCH_ARG(bool, query) = true;
  TORCH_ARG(bool, key) = true;
  TORCH_ARG(bool, value) = true;
  /// The query is what the sublayer gave, not what the adapters read.
  TORCH_ARG(bool, query_before_ln) = false;
  /// Training pulls the values' projection towards the identity; see `Fusion`.
  TORCH_ARG(bool, regularization) = true;
  /// The residual is added to each adapter's output, not to their sum.
  TORCH_ARG(bool, residual_before) = false;
  /// The scores are divided by T, which falls from 50 to 1 by 0.05 a forward.
  TORCH_ARG(bool, temperature) = false;
  /// Values are projected before they are summed.
  TORCH_ARG(bool, value_before_softmax) = true;
  /// The values' projection starts as the identity + 1e-6 everywhere else, not at random.
  TORCH_ARG(bool, value_initialized) = true;
  /// Rate of dropout on the scores, in [0, 1); by default, or at 0, that of the model's attention.
  TORCH_ARG(std::optional<double>, dropout_prob) = {};
};

/// AdapterHub's "static" configuration: without a projection of the values.
inline FusionOptions static_fusion(std::vector<std::string> adapters) {
  return FusionOptions(std::move(adapters)).value(false).regularization(false).value_initialized(false);
}

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const FusionOptions& options) {
  TORCH_CHECK_VALUE(!options.adapters().empty(), "FusionOptions: adapters must not be empty");
  TORCH_CHECK_VALUE(options.query() || options.key() || options.value(),
                    "FusionOptions: one of query, key and value must be projected, but got none");
  const auto rate = options.dropout_prob().value_or(0);
  TORCH_CHECK_VALUE(rate >= 0 && rate < 1, "FusionOptions: dropout_prob must be in [0, 1), but got ", rate);
}

/// AdapterFusion on one join: with q what the adapters read, uᵢ what adapter i made of it before dropout,
/// gate and residual r, pᵢ = softmaxᵢ(dropout((W_q q + b_q)·(W_k uᵢ + b_k)) / T), the output is
/// Σ pᵢ W_v uᵢ + r. What is read, and r, are those of the last adapter. The scores are not divided by √width,
/// and dropout is on them, not on p, as in the reference's code.
/// Active as `Fuse`; does nothing in a Stack. Only the fusion trains, its adapters stay as they are.
/// Shapes: query.weight, key.weight, value.weight: (width, width); query.bias, key.bias: (width).
/// Trains: all. Starts: query and key N(0, 0.02²), biases 0; value see `FusionOptions::value_initialized`.
/// Count: 3 width² + 2 width. Penalty, with `regularization`: 0.01 Σ ‖I − W_v‖²_F.
/// Throws: c10::ValueError for options out of range.
/// Paper: AdapterFusion, arXiv 2005.00247, §3.2. Reference: AdapterHub's BertFusion.
class FusionImpl : public Piece<FusionImpl, FusionOptions, FusionPieceImpl> {
 public:
  FusionImpl(FusionOptions settings, const SiteInfo& site);

  Tensor fuse(const Tensor& query_input, const std::vector<Tensor>& made, const Tensor& residual) override;
  bool query_before_norm() const override { return options.query_before_ln(); }

  void initialize(const LayerView&) override;
  void follow_rename(const std::string& from, const std::string& to) override {
    std::replace(options.adapters().begin(), options.adapters().end(), from, to);
  }

  void copy_state(const FusionImpl& other) { set_divisor(other.divisor()); }
  /// T, of the next forward.
  double divisor() const {
    const std::lock_guard lock(mutex_);
    return divisor_;
  }
  void set_divisor(double divisor) {
    const std::lock_guard lock(mutex_);
    divisor_ = divisor;
  }

  void pretty_print(std::ostream& stream) const override { stream << "peft::Fusion(" << site().width << ")"; }

  std::shared_ptr<internal::DenseProjection> query, key;  ///< nullptr without
  Tensor value;                                           ///< undefined without

 private:
  static constexpr double hottest = 50.0, step = hottest / 1000;
  double next_divisor() {
    const std::lock_guard lock(mutex_);
    const auto now = divisor_;
    divisor_ = std::max(divisor_ - (options.temperature() ? step : 0.0), 1.0);
    return now;
  }

  mutable std::mutex mutex_;  // evaluation lowers T too, in any number of threads
  double divisor_;
};

/// Why a site cannot take a fusion, or an empty string.
inline std::string refusal(const FusionOptions&, const SiteInfo& site) {
  return site.width > 0 ? "" : "its width is not known";
}

inline std::shared_ptr<PieceImpl> make_piece(const FusionOptions& options, const SiteInfo& site) {
  return std::make_shared<FusionImpl>(options, site);
}

inline FusionImpl::FusionImpl(FusionOptions settings, const SiteInfo& site)
    : Piece(FusionOptions::method, std::move(settings), site) {
  check(options);
  const auto width = site.width;
  const auto projection = [&](const char* name) {
    return register_module(name, std::make_shared<internal::DenseProjection>(width, width));
  };
  if (options.query()) query = projection("query");
  if (options.key()) key = projection("key");
  if (options.value()) value = register_parameter("value", torch::empty({width, width}));
  divisor_ = options.temperature() ? hottest : 1.0;
}

inline void FusionImpl::initialize(const LayerView&) {
  torch::NoGradGuard no_grad;
  // What torch's constructors draw, then AdapterHub's initialisation.
  const auto normal = [](Tensor weight) { weight.normal_(0.0, 0.02); };
  for (auto* projection : {query.get(), key.get()}) {
    if (!projection) continue;
    projection->draw();
    projection->restart(normal);
  }
  if (!value.defined()) return;
  nn::init::kaiming_uniform_(value, std::sqrt(5.0));
  normal(value);
  if (options.value_initialized()) value.fill_(1e-6).fill_diagonal_(1.0);
}

inline Tensor FusionImpl::fuse(const Tensor& query_input, const std::vector<Tensor>& made,
                               const Tensor& residual) {
  const auto type = query ? query->weight.scalar_type()
                    : key ? key->weight.scalar_type()
                          : value.scalar_type();
  auto values = torch::stack(made, 2).to(type);  // (batch, time, adapters, width)
  const auto kept = residual.to(type);
  if (options.residual_before()) values = values + kept.unsqueeze(2);
  const auto asked = query_input.to(type);
  const auto q = query ? query->forward(asked) : asked;
  const auto keys = key ? key->forward(values) : values;
  const auto project = [this](const Tensor& x) { return at::linear(x, value); };
  const bool projects_first = value.defined() && options.value_before_softmax();
  if (projects_first) values = project(values);

  auto scores = (keys * q.unsqueeze(2)).sum(-1);
  scores = torch::dropout(scores, options.dropout_prob().value_or(0), is_training());
  TORCH_CHECK(!options.temperature() || !internal::runs_again, "'", site().path,
              "': a fusion with temperature lowers it at every forward, of which gradient checkpointing runs "
              "two (hint: one of the two alone)");
  const auto p = torch::softmax(scores / next_divisor(), -1);
  auto result = (values * p.unsqueeze(-1)).sum(2);
  if (value.defined() && !projects_first) result = project(result);
  if (!options.residual_before()) result = result + kept;
  return result.to(query_input.scalar_type());
}

/// Pulls the values' projections of a fusion towards the identity, in training.
class FusionController : public ControllerOf<FusionImpl> {
 public:
  using ControllerOf::ControllerOf;

  Tensor penalty() const override {
    Tensor total;
    for (const auto& piece : pulled()) {
      const auto term = weight * far(*piece).square().sum();
      total = total.defined() ? total + term : term;
    }
    return total;
  }
  void add_penalty_gradients() override {
    torch::NoGradGuard no_grad;
    for (const auto& piece : pulled()) internal::gradient_of(piece->value).add_(far(*piece), 2 * weight);
  }
  /// T of each piece.
  NamedTensors state() const override {
    auto divisors = torch::empty({static_cast<int64_t>(pieces_.size())}, torch::kFloat64);
    for (size_t i = 0; i < pieces_.size(); ++i) divisors[static_cast<int64_t>(i)] = pieces_[i]->divisor();
    return {{"divisors", divisors}};
  }
  void load_state(const std::map<std::string, Tensor>& state) override {
    internal::Problems problems;
    internal::check_tensors(this->state(), state, problems);
    problems.raise("load_state of a fusion");
    const auto& divisors = state.at("divisors");
    for (size_t i = 0; i < pieces_.size(); ++i) {
      pieces_[i]->set_divisor(divisors[static_cast<int64_t>(i)].item<double>());
    }
  }
  std::shared_ptr<Controller> copy(const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override {
    return std::make_shared<FusionController>(own(pieces));
  }

 private:
  static constexpr double weight = 0.01;
  static Tensor far(const FusionImpl& piece) {
    return piece.value - torch::eye(piece.value.size(0), piece.value.options().requires_grad(false));
  }
  Pieces pulled() const {
    Pieces result;
    for (const auto& piece : pieces_) {
      const bool trains = piece->value.defined() && piece->value.requires_grad();
      if (trains && piece->options.regularization()) result.push_back(piece);
    }
    return result;
  }
};

inline std::shared_ptr<Controller> make_controller(const FusionOptions&,
                                                   const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
  return std::make_shared<FusionController>(FusionController::own(pieces));
}

/// Adds a fusion of bottleneck adapters on every join that one of them has a piece on, freezes the adapters,
/// and makes Fuse(…) of them active. `name`: by default theirs with commas, as `Fuse` has it. Throws: what
/// `add_adapter` and `set_active` throw.
///
/// Example:
/// ```
/// auto fusion = peft::add_fusion(*model, peft::FusionOptions({"topics", "order"}));
/// peft::AdamW optimizer(fusion, 5e-5);
/// ```
inline Adapter add_fusion(nn::Module& model, FusionOptions options, std::string name = "") {
  check(options);
  internal::Problems problems;
  const auto nodes = internal::walk(model, /*learn_paths=*/true);
  const auto known = internal::adapter_names(model);
  std::vector<Composition> members;
  std::set<std::string> joins;
  std::string title;
  std::optional<double> dropout;
  for (const auto& member : options.adapters()) {
    members.emplace_back(member);
    title += (title.empty() ? "" : ",") + member;
    if (std::find(known.begin(), known.end(), member) == known.end()) {
      problems.add(internal::no_adapter_text(member, known));
    }
  }
  for (const auto& node : nodes) {
    if (!node.site) continue;
    const auto info = node.site->info();
    if (info.attention && !dropout) dropout = info.attention->dropout();
    for (const auto& member : options.adapters()) {
      for (const auto& attached : node.site->pieces(member)) {
        if (std::dynamic_pointer_cast<ResidualPieceImpl>(attached.piece) && info.offers_to(Needs::residual)) {
          joins.insert(node.path);
        }
      }
    }
  }
  if (joins.empty()) problems.add("none of the adapters works on a residual join");
  problems.raise("add_fusion");

  if (name.empty()) name = title;
  if (options.dropout_prob().value_or(0) == 0) options.dropout_prob(dropout);
  const Fuse fuse(members, name);
  const auto on_joins = [joins](const SiteInfo& site) { return joins.count(site.path) > 0; };
  auto fusion = add_adapter(model, options, where(on_joins), name);
  try {
    set_active(model, fuse);
  } catch (...) {
    remove_adapter(model, name);
    throw;
  }
  for (const auto& member : options.adapters()) {
    for (auto& parameter : adapter(model, member).parameters()) parameter.set_requires_grad(false);
  }
  return fusion;
}

}  // namespace peft
