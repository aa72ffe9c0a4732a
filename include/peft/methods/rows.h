// Rows: the adapter's own copies of some outputs of a layer, weight rows and bias entries (HiFi's heads).
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/masked.h"

namespace peft {

/// Settings of `Rows`.
struct RowsOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "rows";
  static constexpr const char* chosen_by = "call initialize_hifi";

  /// The outputs that train, ascending. None: chosen after `add_adapter` by `initialize_hifi`.
  TORCH_ARG(std::vector<int64_t>, rows) = {};
};

/// W′, b′ = the layer's with the outputs `rows` replaced by those of V and c, copies of the layer's at the
/// start.
/// Shapes: weight (V): as the layer's, of as many outputs as there are rows; bias (c): (rows), where the
/// layer has one; in the base's floating type. Trains: both. Count: rows · (inputs of one output + 1). Of
/// several active adapters the last one counts.
/// Throws: c10::ValueError for rows out of order or outside the layer.
class RowsImpl : public internal::IndexedPiece<RowsImpl, RowsOptions> {
 public:
  RowsImpl(RowsOptions settings, const SiteInfo& site);

  Weights effective(const Weights& weights, const LayerView&) const override {
    check_chosen(weight);
    if (indices.size(0) == 0) return weights;
    const auto replaced = [this](const Tensor& tensor, const Tensor& own, int64_t dim) {
      return own.defined() ? tensor.index_copy(dim, indices, own.to(tensor.scalar_type())) : tensor;
    };
    return {replaced(weights.weight, weight, dim()), replaced(weights.bias, bias, 0)};
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    const auto from = base.weights();
    const auto at = indices.to(from.weight.device());
    weight.copy_(from.weight.index_select(dim(), at));
    if (bias.defined()) bias.copy_(from.bias.index_select(0, at));
  }
  /// Trains other rows, with the values they have in `base`.
  void choose(const std::vector<int64_t>& rows, const LayerView& base);

  Changed changed() const override { return {weight.numel(), bias.defined() ? bias.numel() : 0}; }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Rows(rows=" << indices.size(0) << ")";
  }

  Tensor weight, bias;

 private:
  /// Where the weight's outputs lie.
  int64_t dim() const { return site().fan_in_fan_out ? 1 : 0; }
  std::vector<int64_t> shape(int64_t rows) const {
    auto sizes = site().weight_shape;
    sizes.at(static_cast<size_t>(dim())) = rows;
    return sizes;
  }
};

/// Throws c10::ValueError if `rows` is out of order.
inline void check(const RowsOptions& options) {
  int64_t least = 0;
  for (const auto row : options.rows()) {
    TORCH_CHECK_VALUE(row >= least, "RowsOptions: rows must ascend from 0 or more, but got ", row,
                      " where at least ", least, " could follow");
    least = row + 1;
  }
}

/// Why a site cannot take rows of its own, or an empty string.
inline std::string refusal(const RowsOptions& options, const SiteInfo& site) {
  if (site.lookup) return "a " + site.layer + " has rows of inputs, not outputs (hint: TrainableTokens)";
  if (site.experts > 1) return "a stack of " + std::to_string(site.experts) + " matrices";
  const auto outputs = site.weight_shape.at(site.fan_in_fan_out ? 1 : 0);
  if (options.rows().empty() || options.rows().back() < outputs) return {};
  return "rows must be below its " + std::to_string(outputs) + " outputs, but got " +
         std::to_string(options.rows().back());
}

inline std::shared_ptr<PieceImpl> make_piece(const RowsOptions& options, const SiteInfo& site) {
  return std::make_shared<RowsImpl>(options, site);
}

inline RowsImpl::RowsImpl(RowsOptions settings, const SiteInfo& site)
    : IndexedPiece(RowsOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Rows: '", site.path, "': ", why);
  const auto count = static_cast<int64_t>(options.rows().size());
  const auto tensor_options = torch::dtype(site.dtype).device(site.device);
  weight = register_parameter("weight", torch::empty(shape(count), tensor_options));
  if (site.has_bias()) bias = register_parameter("bias", torch::empty({count}, tensor_options));
  indices = register_buffer("indices", torch::tensor(options.rows(), torch::kLong).to(site.device));
}

inline void RowsImpl::choose(const std::vector<int64_t>& rows, const LayerView& base) {
  torch::NoGradGuard no_grad;
  const auto settings = RowsOptions(options).rows(rows);
  check(settings);
  const auto why = refusal(settings, site());
  TORCH_CHECK_VALUE(why.empty(), "Rows: '", site().path, "': ", why);
  options = settings;
  const auto count = static_cast<int64_t>(rows.size());
  indices.set_data(torch::tensor(rows, torch::kLong).to(indices.device()));
  weight.set_data(torch::empty(shape(count), weight.options().requires_grad(false)));
  if (bias.defined()) bias.set_data(torch::empty({count}, bias.options().requires_grad(false)));
  initialize(base);
}

}  // namespace peft
