// Masked: the adapter's own copies of some entries of a layer's weight and bias (FISH, random and magnitude
// masks).
#pragma once

#include <torch/arg.h>
#include <torch/serialize/input-archive.h>

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "peft/core/piece.h"

namespace peft {
namespace internal {

/// A piece with integers beside its tensors, which stay integers when the model changes its type.
template <class Derived, class Options>
class IndexedPiece : public Piece<Derived, Options> {
 public:
  using Piece<Derived, Options>::Piece;

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    keep_indices([&] { nn::Module::to(device, dtype, non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    keep_indices([&] { nn::Module::to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override { nn::Module::to(device, non_blocking); }
  void place() override { to(this->site().device); }
  bool substitutes() const override { return true; }

  Tensor indices;

 protected:
  /// Of a piece that nobody has told yet what to train: forgetting that is no way to train nothing.
  void check_chosen(const Tensor& values) const {
    TORCH_CHECK(values.numel() > 0 || !this->is_training() || !torch::GradMode::is_enabled(), "'",
                this->site().path, "': '", this->method(),
                "' has nothing to train yet (hint: ", Options::chosen_by, ")");
  }

 private:
  template <class Move>
  void keep_indices(const Move& move) {
    const auto before = indices.detach();
    move();
    indices.set_data(before.to(indices.device()));
  }
};

/// Number of elements of a shape; 0 for none.
inline int64_t elements(const std::vector<int64_t>& shape) {
  int64_t count = shape.empty() ? 0 : 1;
  for (const auto size : shape) count *= size;
  return count;
}

}  // namespace internal

/// Settings of `Masked`.
struct MaskedOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "masked";
  static constexpr const char* chosen_by =
      "call initialize_fish, initialize_magnitude, initialize_rand_uniform, initialize_rand_row_col or "
      "initialize_masks";

  /// The entries that train, ascending, int64: i below the weight's number of entries is entry i of the
  /// weight, row by row; the others count on through the bias. Undefined: chosen after `add_adapter` by one
  /// of the `initialize_…` functions of masks.h and fish.h.
  TORCH_ARG(Tensor, indices) = {};
};

/// W′, b′ = the layer's with the entries `indices` replaced by v, copies of the layer's at the start.
/// Shapes: values (v): (entries), in the base's floating type; indices: (entries), a buffer. Trains: v.
/// Count: the entries, exactly. Of several active adapters the last one counts.
/// This is training with a masked gradient: the reference zeroes the gradient outside the mask, clips, and
/// steps the whole tensor; here the rest is not in the optimizer at all, so weight decay, which would shrink
/// the rest there, acts on the entries of the mask alone.
/// Throws: c10::ValueError for entries that are none, out of order, or outside the layer.
class MaskedImpl : public internal::IndexedPiece<MaskedImpl, MaskedOptions> {
 public:
  MaskedImpl(MaskedOptions settings, const SiteInfo& site);

  Weights effective(const Weights& weights, const LayerView&) const override {
    check_chosen(values);
    return {replaced(weights.weight, 0, of_weight_, 0),
            replaced(weights.bias, of_weight_, values.size(0) - of_weight_,
                     internal::elements(site().weight_shape))};
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    const auto from = base.weights();
    auto all = from.weight.detach().reshape(-1);
    if (of_weight_ < values.size(0)) all = torch::cat({all, from.bias.detach().reshape(-1)});
    values.copy_(all.index_select(0, indices.to(all.device())));
  }
  /// Trains other entries, with the values they have in `base`.
  void choose(const Tensor& entries, const LayerView& base);

  Changed changed() const override { return {of_weight_, values.size(0) - of_weight_}; }
  void load(torch::serialize::InputArchive& archive) override {
    nn::Module::load(archive);
    count_weight();
  }
  /// The buffer `indices` was filled from outside.
  void count_weight() {
    of_weight_ = indices.lt(internal::elements(site().weight_shape)).sum().item<int64_t>();
  }
  void copy_state(const MaskedImpl& other) { of_weight_ = other.of_weight_; }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Masked(entries=" << values.size(0) << ")";
  }

  Tensor values;

 private:
  Tensor replaced(const Tensor& tensor, int64_t first, int64_t count, int64_t offset) const {
    if (count == 0) return tensor;
    const auto at = indices.narrow(0, first, count) - offset;
    const auto own = values.narrow(0, first, count).to(tensor.scalar_type());
    return tensor.reshape(-1).index_copy(0, at, own).view(tensor.sizes());
  }

  int64_t of_weight_ = 0;  ///< how many entries are the weight's
};

/// Throws c10::ValueError if `indices` is not a list as it must be.
inline void check(const MaskedOptions& options) {
  const auto& indices = options.indices();
  if (!indices.defined()) return;
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.scalar_type() == torch::kLong && indices.numel() > 0,
                    "MaskedOptions: indices must be a list of at least one int64, but got ", indices.dim(),
                    " dimensions, ", indices.numel(), " elements of ", indices.scalar_type());
  const auto n = indices.size(0);
  const bool ascends = (indices.narrow(0, 1, n - 1) > indices.narrow(0, 0, n - 1)).all().item<bool>();
  TORCH_CHECK_VALUE(ascends && indices[0].item<int64_t>() >= 0,
                    "MaskedOptions: indices must ascend from 0 or more, but got ",
                    ascends ? "a negative one" : "some out of order or twice");
}

/// Why a site cannot take these masks, or an empty string.
inline std::string refusal(const MaskedOptions& options, const SiteInfo& site) {
  if (!options.indices().defined()) return {};
  const auto entries = internal::elements(site.weight_shape) + internal::elements(site.bias_shape);
  const auto last = options.indices()[-1].item<int64_t>();
  if (last < entries) return {};
  return "indices must be below its " + std::to_string(entries) + " entries, but got " + std::to_string(last);
}

inline std::shared_ptr<PieceImpl> make_piece(const MaskedOptions& options, const SiteInfo& site) {
  return std::make_shared<MaskedImpl>(options, site);
}

inline MaskedImpl::MaskedImpl(MaskedOptions settings, const SiteInfo& site)
    : IndexedPiece(MaskedOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Masked: '", site.path, "': ", why);
  const auto chosen = options.indices().defined() ? options.indices() : torch::empty({0}, torch::kLong);
  values = register_parameter("values",
                              torch::empty(chosen.sizes(), torch::dtype(site.dtype).device(site.device)));
  indices = register_buffer("indices", chosen.to(site.device, torch::kLong, /*non_blocking=*/false,
                                                 /*copy=*/true));
  count_weight();
}

inline void MaskedImpl::choose(const Tensor& entries, const LayerView& base) {
  torch::NoGradGuard no_grad;
  const auto settings = MaskedOptions(options).indices(entries.cpu());
  check(settings);
  const auto why = refusal(settings, site());
  TORCH_CHECK_VALUE(why.empty(), "Masked: '", site().path, "': ", why);
  options = settings;
  indices.set_data(entries.to(indices.device()));
  values.set_data(torch::empty(entries.sizes(), values.options().requires_grad(false)));
  count_weight();
  initialize(base);
}

}  // namespace peft
