// BOFT: turns a frozen layer's inputs by a product of trained butterfly rotations, and scales its outputs.
#pragma once

#include <torch/arg.h>

#include <memory>
#include <string>
#include <utility>

#include "peft/core/block_rotation.h"
#include "peft/core/piece.h"

namespace peft {

/// Settings of `Boft`. Defaults are Hugging Face's.
struct BoftOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "boft";

  /// `block_size`: 0 to give `block_num` instead.
  explicit BoftOptions(int64_t block_size = 4) : block_size_(block_size) {}

  /// Side b of the blocks; must divide the layer's inputs.
  TORCH_ARG(int64_t, block_size);
  /// Number of blocks; must divide the layer's inputs. Give either this or `block_size`.
  TORCH_ARG(int64_t, block_num) = 0;
  /// Number m of factors, at least 1; above 1, blocks and their number are even and the inputs a multiple of
  /// b · 2ᵐ⁻¹. Hugging Face's takes 1 whatever it is told where it has no CUDA extension.
  TORCH_ARG(int64_t, butterfly_factors) = 1;
  /// Share of one random factor's blocks that a training forward sets to the identity, rounded down, in
  /// [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// False draws the blocks and the scale, so that the output changes at once.
  TORCH_ARG(bool, init_weights) = true;
};

/// BOFT: y = s ⊙ (W (x R)) + b, R = Bₘ … B₁; W′ = diag(s) W Rᵀ over (out, in · kernel). B_i is block-diagonal
/// between a permutation and its inverse; its blocks are Cayley transforms of (A − Aᵀ) / 2, A a block of
/// boft_R. The i-th permutation takes groups of 2ⁱ⁻¹ b inputs apart into half blocks and puts those of even
/// number first.
/// Shapes: boft_R: (m, blocks, b, b); boft_s: (out, 1), of a convolution (1, out).
/// Trains: both. Count: m · blocks · b² + out.
/// On convolutions Hugging Face's forward ignores dilation, and takes the first of two strides or paddings
/// for both; this does not. Throws: c10::ValueError for options out of range. Paper: Parameter-Efficient
/// Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243, §4. Reference: Hugging Face PEFT.
class BoftImpl : public Piece<BoftImpl, BoftOptions> {
 public:
  BoftImpl(BoftOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    auto R = rotation();
    if (is_training() && options.dropout() > 0) {
      const auto device = internal::device_of_draws(R);
      const auto factor = torch::randint(0, R.size(0), {1}, torch::dtype(torch::kLong).device(device));
      auto mask = torch::zeros({R.size(0), R.size(1)}, device);
      mask.index_copy_(0, factor, internal::dropped_blocks(options.dropout(), R.size(1), R).unsqueeze(0));
      R = internal::drop_blocks(R, mask);
    }
    if (site().fan_in.size() > 1) return layer.apply(x, turned(layer.weights(), R));
    R = R.to(x.scalar_type());
    auto rotated = x;
    for (auto i = R.size(0) - 1; i >= 0; --i) rotated = turn(rotated, R[i], i);
    const auto y = layer.forward(rotated);
    const auto scale = boft_s.squeeze(-1);
    const auto bias = site().has_bias() ? layer.weights().bias : Tensor();
    return bias.defined() ? (y - bias) * scale + bias : y * scale;
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    return turned(weights, rotation());
  }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    options.init_weights() ? boft_R.zero_() : boft_R.normal_(0.0, 0.1);
    options.init_weights() ? boft_s.fill_(1.0) : boft_s.normal_(1.0, 0.1);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Boft(blocks=" << boft_R.size(1) << ", block_size=" << boft_R.size(2)
           << ", butterfly_factors=" << boft_R.size(0) << ")";
  }

  Tensor boft_R, boft_s;

 private:
  /// The blocks' rotations, (m, blocks, b, b).
  Tensor rotation() const { return internal::cayley(0.5 * (boft_R - boft_R.transpose(2, 3))); }

  /// x B for the factor `i` (from 0) with blocks R: half blocks put back in place, turned, taken apart again.
  static Tensor turn(const Tensor& x, const Tensor& R, int64_t i) {
    if (i == 0) return internal::turn_blocks(x, R);
    const auto half = R.size(-1) / 2, pairs = int64_t{1} << i;
    const auto joined = x.reshape({-1, 2, pairs, half}).transpose(1, 2).reshape(x.sizes());
    const auto turned = internal::turn_blocks(joined, R);
    return turned.reshape({-1, pairs, 2, half}).transpose(1, 2).reshape(x.sizes());
  }

  Weights turned(const Weights& weights, const Tensor& R) const {
    const auto& W = weights.weight;
    auto rows = W.flatten(1).to(R.scalar_type());
    for (int64_t i = 0; i < R.size(0); ++i) rows = turn(rows, R[i].transpose(1, 2), i);
    return {(rows * boft_s.reshape({-1, 1})).reshape(W.sizes()).to(W.scalar_type()), weights.bias};
  }
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const BoftOptions& options) {
  TORCH_CHECK_VALUE(options.block_size() >= 0 && options.block_num() >= 0 &&
                        (options.block_size() > 0) != (options.block_num() > 0),
                    "BoftOptions: expected either block_size or block_num to be positive and the other to be "
                    "0, but got block_size ",
                    options.block_size(), " and block_num ", options.block_num());
  TORCH_CHECK_VALUE(options.butterfly_factors() >= 1 && options.butterfly_factors() <= 32,
                    "BoftOptions: butterfly_factors must be in [1, 32], but got ",
                    options.butterfly_factors());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "BoftOptions: dropout must be in [0, 1), but got ", options.dropout());
}

/// Why a site cannot take BOFT, or an empty string.
inline std::string refusal(const BoftOptions& options, const SiteInfo& site) {
  const auto why = internal::rotation_refusal(site, /*lookups=*/false);
  if (!why.empty()) return why;
  const auto size = internal::rotated_size(site);
  const auto given = options.block_size() > 0 ? options.block_size() : options.block_num();
  const auto layer = "a " + site.layer + " of " + std::to_string(size) + " inputs";
  if (size % given != 0) {
    return layer + " cannot be cut by " + (options.block_size() > 0 ? "block_size " : "block_num ") +
           std::to_string(given);
  }
  const auto side = options.block_size() > 0 ? given : size / given;
  const auto groups = int64_t{1} << (options.butterfly_factors() - 1);
  if (groups == 1 || (side % 2 == 0 && size % (side * groups) == 0)) return {};
  return layer + " in blocks of " + std::to_string(side) + " cannot have " +
         std::to_string(options.butterfly_factors()) +
         " butterfly_factors: blocks must be even, and their number a multiple of " + std::to_string(groups);
}

inline std::shared_ptr<PieceImpl> make_piece(const BoftOptions& options, const SiteInfo& site) {
  return std::make_shared<BoftImpl>(options, site);
}

inline BoftImpl::BoftImpl(BoftOptions settings, const SiteInfo& site)
    : Piece(BoftOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Boft: '", site.path, "': ", why);
  const auto size = internal::rotated_size(site);
  const auto side = options.block_size() > 0 ? options.block_size() : size / options.block_num();
  boft_R = register_parameter("boft_R", torch::empty({options.butterfly_factors(), size / side, side, side}));
  const bool linear = site.fan_in.size() == 1;
  boft_s = register_parameter("boft_s",
                              torch::empty({linear ? site.fan_out : 1, linear ? int64_t{1} : site.fan_out}));
}

}  // namespace peft
