// Trainable tokens: the adapter's own vectors for some rows of an embedding.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/piece.h"

namespace peft {

/// Settings of `TrainableTokens`.
struct TrainableTokensOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "trainable_tokens";

  explicit TrainableTokensOptions(std::vector<int64_t> indices) : indices_(std::move(indices)) {}

  /// The tokens that train: rows of the embedding, each once, in the order the file has them.
  TORCH_ARG(std::vector<int64_t>, indices);
  /// Start as copies of those rows, where the method changes nothing. False: N(0, 1).
  TORCH_ARG(bool, init) = true;
};

/// E′ = E with the rows `indices` replaced by T (not added to).
/// Shapes: trainable_tokens_delta (T): (tokens, embedding_dim). Trains: T. Count: tokens · embedding_dim.
/// It lies under the other pieces of its adapter. Of a tied matrix it changes the head's rows too; as in the
/// reference the head's bias, where it has one (a masked language model's) and nothing else lies below, is
/// then left out until the adapter is merged. Adapters that share a token cannot be active together. Throws:
/// c10::ValueError for tokens that are none, twice there or outside the embedding. Reference: Hugging Face
/// PEFT's TRAINABLE_TOKENS. There every forward copies the embedding; here it replaces what was looked up,
/// which gives the same numbers.
class TrainableTokensImpl : public Piece<TrainableTokensImpl, TrainableTokensOptions> {
 public:
  TrainableTokensImpl(TrainableTokensOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override;

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto rows = trainable_tokens_delta.to(weights.weight.scalar_type());
    return {weights.weight.index_copy(0, indices_.to(weights.weight.device()), rows),
            is_lowest(layer) ? Tensor() : weights.bias};
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    auto& rows = trainable_tokens_delta;
    const auto E = base.weights().weight;
    rows.copy_(options.init() ? E.index_select(0, indices_.to(E.device()))
                              : torch::randn(rows.sizes(), rows.options().requires_grad(false)));
  }
  void place() override {
    Piece::place();
    for (auto* ids : {&indices_, &sorted_, &rows_}) *ids = ids->to(site().device);
  }
  void copy_state(const TrainableTokensImpl& other) {
    indices_ = other.indices_;
    sorted_ = other.sorted_;
    rows_ = other.rows_;
  }
  bool substitutes() const override { return true; }
  bool follows_ties() const override { return true; }
  std::string conflict(const PieceImpl& other) const override;
  Changed changed() const override { return {trainable_tokens_delta.numel(), 0}; }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::TrainableTokens(tokens=" << options.indices().size() << ")";
  }

  Tensor trainable_tokens_delta;

 private:
  /// Where a tied head's bias is left out: the reference has nothing below.
  static bool is_lowest(const LayerView& layer) { return &layer == &layer.base(); }

  Tensor indices_;        ///< of the rows of T
  Tensor sorted_, rows_;  ///< the indices in order, and which row of T each has
  bool looks_up_whole_;   ///< in all of E′, where the layer treats some rows in a way of its own
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const TrainableTokensOptions& options) {
  TORCH_CHECK_VALUE(!options.indices().empty(),
                    "TrainableTokensOptions: indices must hold at least one token, but got none");
  std::set<int64_t> seen;
  for (const auto index : options.indices()) {
    TORCH_CHECK_VALUE(index >= 0, "TrainableTokensOptions: indices must not be negative, but got ", index);
    TORCH_CHECK_VALUE(seen.insert(index).second, "TrainableTokensOptions: indices must differ, but got ",
                      index, " twice");
  }
}

/// Why a site cannot take trainable tokens, or an empty string.
inline std::string refusal(const TrainableTokensOptions& options, const SiteInfo& site) {
  if (!site.lookup) return "a " + site.layer + " has no tokens: it is no embedding";
  const auto largest = *std::max_element(options.indices().begin(), options.indices().end());
  if (largest < site.weight_shape.at(0)) return {};
  return "indices must be below the embedding's " + std::to_string(site.weight_shape.at(0)) +
         " tokens, but got " + std::to_string(largest);
}

inline std::shared_ptr<PieceImpl> make_piece(const TrainableTokensOptions& options, const SiteInfo& site) {
  return std::make_shared<TrainableTokensImpl>(options, site);
}

inline TrainableTokensImpl::TrainableTokensImpl(TrainableTokensOptions settings, const SiteInfo& site)
    : Piece(TrainableTokensOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "TrainableTokens: '", site.path, "': ", why);
  indices_ = torch::tensor(options.indices(), torch::kLong);
  std::tie(sorted_, rows_) = indices_.sort();
  looks_up_whole_ = site.rescales_rows || indices_.eq(site.padding_row).any().item<bool>();
  trainable_tokens_delta = register_parameter("trainable_tokens_delta",
                                              torch::empty({indices_.size(0), site.weight_shape.at(1)},
                                                           torch::dtype(site.dtype).device(site.device)));
}

inline Tensor TrainableTokensImpl::forward(const Tensor& x, const LayerView& layer) {
  if (x.is_floating_point()) {  // a head that is tied to the embedding: the scores of these tokens
    const auto y = is_lowest(layer) ? layer.apply(x, {layer.weights().weight, {}}) : layer.forward(x);
    const auto own = at::linear(x.to(trainable_tokens_delta.scalar_type()), trainable_tokens_delta);
    return y.index_copy(-1, indices_.to(x.device()), own.to(y.scalar_type()));
  }
  if (looks_up_whole_) return Piece::forward(x, layer);
  const auto y = layer.forward(x);
  const auto tokens = x.flatten().to(torch::kLong);
  const auto sorted = sorted_.to(x.device());
  const auto place = at::searchsorted(sorted, tokens).clamp_max_(sorted.size(0) - 1);
  const auto is_own = sorted.index_select(0, place) == tokens;
  const auto row = rows_.to(x.device()).index_select(0, place);
  // A row for every token, its own or any: how many have their own only the device knows.
  const auto own = trainable_tokens_delta.index_select(0, row).to(y.scalar_type());
  return at::where(is_own.unsqueeze(1), own, y.reshape({-1, y.size(-1)})).view(y.sizes());
}

inline std::string TrainableTokensImpl::conflict(const PieceImpl& other) const {
  const auto* tokens = dynamic_cast<const TrainableTokensImpl*>(&other);
  if (!tokens) return {};
  for (const auto index : options.indices()) {
    const auto& others = tokens->options.indices();
    if (std::find(others.begin(), others.end(), index) != others.end()) {
      return "both train token " + std::to_string(index);
    }
  }
  return {};
}

}  // namespace peft
