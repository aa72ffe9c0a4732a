// OFT: turns a frozen layer's inputs by a trained block-diagonal orthogonal matrix.
#pragma once

#include <torch/arg.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>

#include "peft/core/block_rotation.h"
#include "peft/core/piece.h"

namespace peft {

/// Settings of `Oft`. Defaults are Hugging Face's.
struct OftOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "oft";

  /// `block_size`: 0 to give `blocks` instead.
  explicit OftOptions(int64_t block_size = 32) : block_size_(block_size) {}

  /// Side b of the blocks. Where it does not divide a layer's inputs, the nearest size that does is taken,
  /// the smaller of two; a warning says so.
  TORCH_ARG(int64_t, block_size);
  /// Number of blocks (Hugging Face's `r`), adjusted likewise. Give either this or `block_size`.
  TORCH_ARG(int64_t, blocks) = 0;
  /// One block for all.
  TORCH_ARG(bool, block_share) = false;
  /// Share of the blocks that a training forward sets to the identity, rounded down, in [0, 1). Hugging Face
  /// 0.21.2 takes this option but never applies it.
  TORCH_ARG(double, module_dropout) = 0.0;
  /// Constrained OFT: before every training forward each block's generator is brought back into a ball.
  TORCH_ARG(bool, coft) = false;
  /// Radius of that ball times the root of the number of blocks; positive.
  TORCH_ARG(double, eps) = 6e-5;
  /// The Cayley transform as a truncated Neumann series: fast and only nearly orthogonal. False: exactly, by
  /// solving.
  TORCH_ARG(bool, cayley_neumann) = true;
  /// Terms of the series, at least 2.
  TORCH_ARG(int64_t, neumann_terms) = 5;
  /// False draws the generators, so that the output changes at once.
  TORCH_ARG(bool, init_weights) = true;
};

namespace internal {

/// The divisor of `size` nearest to `wanted`, the smaller of two, as the reference finds it.
inline int64_t nearest_divisor(int64_t size, int64_t wanted) {
  if (wanted >= size) return size;
  auto higher = wanted, lower = wanted;
  while (size % higher != 0) ++higher;
  while (size % lower != 0) --lower;
  return wanted - lower <= higher - wanted ? lower : higher;
}

}  // namespace internal

/// OFT: y = F(x R), R block-diagonal, each block the Cayley transform (I − Q)(I + Q)⁻¹ of a skew-symmetric Q.
/// W′ = W Rᵀ over (out, in · kernel). An embedding's vectors are turned: W′ = W R.
/// Shapes: oft_R: (blocks, b (b − 1) / 2), each Q's upper triangle by rows; one row with `block_share`.
/// Trains: oft_R. Count: blocks · b (b − 1) / 2.
/// The series, as the reference has it, is of (I + Q)(I − Q)⁻¹, the other sign of Q: with n terms
/// I + 2Q + … + 2Qⁿ⁻² + Qⁿ⁻¹; with 2, I + 2Q; with 3 as with 4.
/// On convolutions of more than one position Hugging Face's forward adds up overlapping patches, so that it
/// changes the output before training and differs from its own merge; this is the merge's W′. Several OFT
/// adapters turn in the order of merging, later ones next to the input.
/// Throws: c10::ValueError for options out of range.
/// Paper: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280, §3.3; the series:
/// Orthogonal Finetuning Made Scalable, arXiv 2506.19847. Reference: Hugging Face PEFT.
class OftImpl : public Piece<OftImpl, OftOptions> {
 public:
  OftImpl(OftOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    if (is_training() && options.coft()) {
      torch::NoGradGuard no_grad;
      oft_R.copy_(projected());
    }
    auto R = rotation();
    if (is_training() && options.module_dropout() > 0 && oft_R.size(0) > 1) {
      R = internal::drop_blocks(R, internal::dropped_blocks(options.module_dropout(), R.size(0), R));
    }
    if (site().lookup) return internal::turn_blocks(layer.forward(x).to(R.scalar_type()), R);
    if (site().fan_in.size() > 1) return layer.apply(x, turned(layer.weights(), R));
    return layer.forward(internal::turn_blocks(x.to(R.scalar_type()), R).to(x.scalar_type()));
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    return turned(weights, rotation());
  }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    options.init_weights() ? oft_R.zero_() : oft_R.normal_(0.0, 0.1);
    const auto wanted = options.blocks() > 0 ? options.blocks() : options.block_size();
    const auto taken = options.blocks() > 0 ? blocks : block_size;
    if (wanted != taken) {
      TORCH_WARN("Oft: '", site().path, "': ", options.blocks() > 0 ? "blocks" : "block_size", " ", wanted,
                 " does not divide ", internal::rotated_size(site()), "; taken: ", taken);
    }
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Oft(blocks=" << blocks << ", block_size=" << block_size << ")";
  }

  int64_t blocks = 0, block_size = 0;
  Tensor oft_R;

 private:
  /// The blocks' rotations, (blocks, b, b), or (1, b, b) with `block_share`.
  Tensor rotation() const {
    // In evaluation and merged as after the projection of a training forward, which is not differentiated.
    const bool project = options.coft() && !is_training();
    const auto Q = skew(project ? oft_R + (projected() - oft_R).detach() : oft_R);
    if (!options.cayley_neumann()) return internal::cayley(Q);
    auto R = torch::eye(block_size, Q.options()) + 2 * Q;
    if (options.neumann_terms() == 2) return R;
    auto power = at::bmm(Q, Q);
    R = R + 2 * power;
    for (int64_t term = 3; term < options.neumann_terms() - 1; ++term) {
      power = at::bmm(power, Q);
      R = R + 2 * power;
    }
    return R + at::bmm(power, Q);
  }

  Tensor skew(const Tensor& rows) const {
    const auto index =
        at::triu_indices(block_size, block_size, 1, torch::dtype(torch::kLong).device(rows.device()));
    auto upper = torch::zeros({rows.size(0), block_size, block_size}, rows.options().requires_grad(false));
    upper.index_put_({torch::indexing::Slice(), index[0], index[1]}, rows);
    return upper - upper.transpose(1, 2);
  }

  /// Generators outside the ball of radius eps / √blocks, scaled onto it. Each entry stands in Q twice.
  Tensor projected() const {
    torch::NoGradGuard no_grad;
    const auto radius = options.eps() / std::sqrt(static_cast<double>(oft_R.size(0)));
    const auto length = (oft_R.square().sum(1, /*keepdim=*/true) * 2).sqrt();
    return torch::where(length <= radius, oft_R, oft_R / length * radius);
  }

  Weights turned(const Weights& weights, const Tensor& R) const {
    const auto& W = weights.weight;
    const auto rows = W.flatten(1).to(R.scalar_type());
    const auto product = internal::turn_blocks(rows, site().lookup ? R : R.transpose(1, 2));
    return {product.reshape(W.sizes()).to(W.scalar_type()), weights.bias};
  }
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const OftOptions& options) {
  TORCH_CHECK_VALUE(options.block_size() >= 0 && options.blocks() >= 0 &&
                        (options.block_size() > 0) != (options.blocks() > 0),
                    "OftOptions: expected either block_size or blocks to be positive and the other to be 0, "
                    "but got block_size ",
                    options.block_size(), " and blocks ", options.blocks());
  TORCH_CHECK_VALUE(options.module_dropout() >= 0 && options.module_dropout() < 1,
                    "OftOptions: module_dropout must be in [0, 1), but got ", options.module_dropout());
  TORCH_CHECK_VALUE(std::isfinite(options.eps()) && options.eps() > 0,
                    "OftOptions: eps must be positive, but got ", options.eps());
  TORCH_CHECK_VALUE(options.neumann_terms() >= 2, "OftOptions: neumann_terms must be at least 2, but got ",
                    options.neumann_terms());
}

/// Why a site cannot take OFT, or an empty string.
inline std::string refusal(const OftOptions& options, const SiteInfo& site) {
  const auto why = internal::rotation_refusal(site, /*lookups=*/true);
  if (!why.empty()) return why;
  if (options.coft() && site.weights_only) {
    return "a " + site.layer + " that runs on weights alone takes no coft, which projects before a forward";
  }
  const auto size = internal::rotated_size(site);
  const auto side = options.blocks() > 0 ? size / internal::nearest_divisor(size, options.blocks())
                                         : internal::nearest_divisor(size, options.block_size());
  if (side > 1) return {};
  return "a " + site.layer + " of " + std::to_string(size) +
         " inputs gets blocks of one, which cannot turn (hint: another block_size or number of blocks)";
}

inline std::shared_ptr<PieceImpl> make_piece(const OftOptions& options, const SiteInfo& site) {
  return std::make_shared<OftImpl>(options, site);
}

inline OftImpl::OftImpl(OftOptions settings, const SiteInfo& site)
    : Piece(OftOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Oft: '", site.path, "': ", why);
  const auto size = internal::rotated_size(site);
  block_size = options.blocks() > 0 ? size / internal::nearest_divisor(size, options.blocks())
                                    : internal::nearest_divisor(size, options.block_size());
  blocks = size / block_size;
  oft_R = register_parameter(
      "oft_R", torch::empty({options.block_share() ? 1 : blocks, block_size * (block_size - 1) / 2}));
}

}  // namespace peft
