// LoKr: adds a Kronecker product, of low-rank factors where they are large, to a frozen weight.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/dense_update.h"

namespace peft {

/// How the factors start. The names in Hugging Face's `init_weights`:
enum class LokrInit {
  zero_first,   ///< `true`: the first factor (or its left half) is zero
  zero_second,  ///< "lycoris": the second factor (or its right half) is zero
  random,       ///< `false`: none is zero; changes the output at once
};

/// Settings of `Lokr`. Defaults are Hugging Face's.
struct LokrOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "lokr";
  static constexpr bool patterns_by_path = true;  ///< a part of a module by its own name, not the module's

  explicit LokrOptions(int64_t rank = 8) : rank_(rank) {}

  /// Rank r of a factor that is split in two, at least 1. A factor is split when 2 r is less than its larger
  /// side.
  TORCH_ARG(int64_t, rank);
  /// α; the update is scaled by α / r, also where no factor is split.
  TORCH_ARG(double, alpha) = 8.0;
  /// Share of the update's rows that a training forward leaves out, in [0, 1).
  TORCH_ARG(double, rank_dropout) = 0.0;
  /// Scale the rows that rank dropout keeps up.
  TORCH_ARG(bool, rank_dropout_scale) = false;
  /// Probability that a training forward leaves the whole update out, in [0, 1).
  TORCH_ARG(double, module_dropout) = 0.0;
  /// For kernels of more than one position: a split second factor has a core tensor over the kernel
  /// (FedPara's proposition 3). Hugging Face's `use_effective_conv2d`.
  TORCH_ARG(bool, effective_conv) = false;
  /// Let the first, smaller factor be split as well.
  TORCH_ARG(bool, decompose_both) = false;
  /// Size of the first factor's sides, at least 1, where it divides the layer's; otherwise the largest
  /// divisor up to it that is nearest the square root. −1: no bound.
  TORCH_ARG(int64_t, decompose_factor) = -1;
  TORCH_ARG(LokrInit, init) = LokrInit::zero_first;
  /// Other ranks for some layers: the first regular expression that matches the path, or what follows a dot
  /// in it.
  TORCH_ARG(std::vector<Pattern<int64_t>>, rank_pattern) = {};
  /// Other α for some layers, likewise.
  TORCH_ARG(std::vector<Pattern<double>>, alpha_pattern) = {};
};

namespace internal {

/// (m, n), m ≤ n, m n = dimension, as LyCORIS searches them: `factor` and its cofactor where it divides
/// (in this order, whichever is larger), otherwise a divisor near the square root that is at most `factor`.
inline std::pair<int64_t, int64_t> kronecker_sides(int64_t dimension, int64_t factor) {
  if (factor > 0 && dimension % factor == 0) return {factor, dimension / factor};
  if (factor < 0) factor = dimension;
  int64_t m = 1, n = dimension;
  const auto length = m + n;
  while (m < n) {
    auto next = m + 1;
    while (dimension % next != 0) ++next;
    if (next + dimension / next > length || next > factor) break;
    m = next;
    n = dimension / next;
  }
  return {std::min(m, n), std::max(m, n)};
}

}  // namespace internal

/// LoKr: W′ = W + α / r · w1 ⊗ w2; out = l k, in = m n, w1 over (l, m), w2 over (k, n, *kernel).
/// A factor that is split is w1_a w1_b or w2_a w2_b, with `effective_conv` t2 ×₁ w2_a ×₂ w2_b.
/// Shapes: lokr_w1: (l, m), or lokr_w1_a: (l, r), lokr_w1_b: (r, m); lokr_w2: (k, n, *kernel), or lokr_w2_a:
/// (k, r), lokr_w2_b: (r, n · kernel), or lokr_t2: (r, r, *kernel), lokr_w2_a: (r, k), lokr_w2_b: (r, n).
/// Trains: all of them. Count: the sum of these shapes.
/// For a whole w2 of a one-dimensional convolution the reference takes w1 over (1, l, m) and reshapes the
/// result, so that its entries lie elsewhere than the formula says; so does this.
/// With a padding mode other than zeros the update sees the padding too; Hugging Face's pads it with zeros.
/// Throws: c10::ValueError for options out of range.
/// Paper: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv
/// 2309.14859, §3.2. Reference: Hugging Face PEFT.
class LokrImpl : public internal::DenseUpdate<LokrImpl, LokrOptions> {
 public:
  LokrImpl(LokrOptions settings, const SiteInfo& site);

  /// w1 ⊗ w2, not scaled, in the weight's layout.
  Tensor delta() const {
    auto w1 = lokr_w1.defined() ? lokr_w1 : at::mm(lokr_w1_a, lokr_w1_b);
    const auto w2 = lokr_w2.defined()   ? lokr_w2
                    : lokr_t2.defined() ? at::einsum("ijkl,ip,jr->prkl", {lokr_t2, lokr_w2_a, lokr_w2_b})
                                        : at::mm(lokr_w2_a, lokr_w2_b);
    if (w2.dim() == 4) w1 = w1.unsqueeze(2).unsqueeze(2);
    // Not at::kron, which refuses some strides.
    std::vector<int64_t> left, right;
    for (auto axis = w1.dim() - w2.dim(); axis < w1.dim(); ++axis) {
      left.insert(left.end(), {axis < 0 ? 1 : w1.size(axis), 1});
    }
    for (const auto size : w2.sizes()) right.insert(right.end(), {1, size});
    return (w1.reshape(left) * w2.reshape(right)).reshape(site().weight_shape);
  }
  bool rescales() const { return options.rank_dropout_scale(); }

  void initialize(const LayerView&) override;

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Lokr(rank=" << rank << ", alpha=" << alpha << ")";
  }

  Tensor lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a, lokr_w2_b, lokr_t2;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const LokrOptions& options) {
  internal::check_dense_update("LokrOptions", options);
  TORCH_CHECK_VALUE(options.decompose_factor() == -1 || options.decompose_factor() > 0,
                    "LokrOptions: decompose_factor must be positive or -1, but got ",
                    options.decompose_factor());
}

/// Why a site cannot take LoKr, or an empty string.
inline std::string refusal(const LokrOptions&, const SiteInfo& site) {
  return internal::dense_update_refusal(site);
}

inline std::shared_ptr<PieceImpl> make_piece(const LokrOptions& options, const SiteInfo& site) {
  return std::make_shared<LokrImpl>(options, site);
}

inline LokrImpl::LokrImpl(LokrOptions settings, const SiteInfo& site)
    : DenseUpdate(std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Lokr: '", site.path, "': ", why);
  const auto add = [this](const char* name, const std::vector<int64_t>& shape) {
    return register_parameter(name, torch::empty(shape));
  };
  const auto [l, k] = internal::kronecker_sides(site.weight_shape.at(0), options.decompose_factor());
  const auto [m, n] = internal::kronecker_sides(site.weight_shape.at(1), options.decompose_factor());
  const bool split_first = options.decompose_both() && 2 * rank < std::max(l, m);
  const bool split_second = 2 * rank < std::max(k, n);
  if (split_first) {
    lokr_w1_a = add("lokr_w1_a", {l, rank});
    lokr_w1_b = add("lokr_w1_b", {rank, m});
  } else {
    lokr_w1 = add("lokr_w1", {l, m});
  }
  std::vector<int64_t> whole{k, n};
  whole.insert(whole.end(), site.weight_shape.begin() + 2, site.weight_shape.end());
  if (!split_second) {
    lokr_w2 = add("lokr_w2", whole);
  } else if (options.effective_conv() && internal::has_wide_kernel(site)) {
    const auto [height, width] = internal::kernel_2d(site);
    lokr_t2 = add("lokr_t2", {rank, rank, height, width});
    lokr_w2_a = add("lokr_w2_a", {rank, k});
    lokr_w2_b = add("lokr_w2_b", {rank, n});
  } else {
    lokr_w2_a = add("lokr_w2_a", {k, rank});
    lokr_w2_b = add("lokr_w2_b", {rank, c10::multiply_integers(whole) / k});
  }
}

inline void LokrImpl::initialize(const LayerView&) {
  torch::NoGradGuard no_grad;
  const auto draw = [](const Tensor& tensor) { nn::init::kaiming_uniform_(tensor, std::sqrt(5.0)); };
  const auto init = options.init();
  const auto first = lokr_w1.defined() ? lokr_w1 : lokr_w1_a;
  init == LokrInit::zero_first ? void(first.zero_()) : draw(first);
  if (lokr_w1_b.defined()) draw(lokr_w1_b);
  if (lokr_w2.defined()) {
    init == LokrInit::zero_second ? void(lokr_w2.zero_()) : draw(lokr_w2);
  } else {
    draw(lokr_w2_a);
    init == LokrInit::zero_second ? void(lokr_w2_b.zero_()) : draw(lokr_w2_b);
  }
  if (lokr_t2.defined()) draw(lokr_t2);
}

}  // namespace peft
