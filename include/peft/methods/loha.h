// LoHa: adds the elementwise product of two low-rank products to a frozen weight.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/dense_update.h"

namespace peft {

/// Settings of `Loha`. Defaults are Hugging Face's.
struct LohaOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "loha";
  static constexpr bool patterns_by_path = true;  ///< a part of a module by its own name, not the module's

  explicit LohaOptions(int64_t rank = 8) : rank_(rank) {}

  /// Rank r of each of the two products, at least 1; their elementwise product has rank up to r².
  TORCH_ARG(int64_t, rank);
  /// α; the update is scaled by α / r.
  TORCH_ARG(double, alpha) = 8.0;
  /// Share of the update's rows that a training forward leaves out, in [0, 1); the rest is scaled up.
  TORCH_ARG(double, rank_dropout) = 0.0;
  /// Probability that a training forward leaves the whole update out, in [0, 1).
  TORCH_ARG(double, module_dropout) = 0.0;
  /// For kernels of more than one position: the decomposition of FedPara's proposition 3, with a core tensor
  /// over the kernel. Hugging Face's `use_effective_conv2d`.
  TORCH_ARG(bool, effective_conv) = false;
  /// False draws the fourth factor too, so that the output changes at once.
  TORCH_ARG(bool, init_weights) = true;
  /// Other ranks for some layers: the first regular expression that matches the path, or what follows a dot
  /// in it.
  TORCH_ARG(std::vector<Pattern<int64_t>>, rank_pattern) = {};
  /// Other α for some layers, likewise.
  TORCH_ARG(std::vector<Pattern<double>>, alpha_pattern) = {};
};

/// LoHa: W′ = W + α / r · (w1_a w1_b) ⊙ (w2_a w2_b), the matrices over (out, in · kernel); with
/// `effective_conv` each half is t ×₁ w_a ×₂ w_b, t over (r, r, kernel).
/// Shapes: hada_w1_a, hada_w2_a: (out, r); hada_w1_b, hada_w2_b: (r, in · kernel). With `effective_conv`:
/// (r, out), (r, in), and hada_t1, hada_t2: (r, r, *kernel), of one dimension (r, r, k, 1).
/// Trains: all of them. Count: 2 r (out + in · kernel), or 2 r (out + in + r · kernel).
/// With a padding mode other than zeros the update sees the padding too; Hugging Face's pads it with zeros,
/// so that its forward differs from its merge.
/// Hugging Face's hand-written backward of the effective form exchanges two intermediates, so that its
/// gradients of hada_w1_a and hada_w2_a are not the derivative; these are.
/// Throws: c10::ValueError for options out of range.
/// Paper: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, arXiv
/// 2108.06098, propositions 1 and 3. Reference: Hugging Face PEFT.
class LohaImpl : public internal::DenseUpdate<LohaImpl, LohaOptions> {
 public:
  LohaImpl(LohaOptions settings, const SiteInfo& site);

  /// The product of the two halves, not scaled, in the weight's layout.
  Tensor delta() const {
    const auto half = [](const Tensor& t, const Tensor& a, const Tensor& b) {
      return t.defined() ? at::einsum("ijkl,jr,ip->prkl", {t, b, a}) : at::mm(a, b);
    };
    return (half(hada_t1, hada_w1_a, hada_w1_b) * half(hada_t2, hada_w2_a, hada_w2_b))
        .reshape(site().weight_shape);
  }
  bool rescales() const { return true; }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    for (const auto& tensor : {hada_w1_a, hada_w1_b, hada_w2_a}) {
      nn::init::kaiming_uniform_(tensor, std::sqrt(5.0));
    }
    if (options.init_weights()) {
      hada_w2_b.zero_();
    } else {
      nn::init::kaiming_uniform_(hada_w2_b, std::sqrt(5.0));
    }
    if (!hada_t1.defined()) return;
    nn::init::kaiming_uniform_(hada_t1, std::sqrt(5.0));
    nn::init::kaiming_uniform_(hada_t2, std::sqrt(5.0));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Loha(rank=" << rank << ", alpha=" << alpha << ")";
  }

  Tensor hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const LohaOptions& options) { internal::check_dense_update("LohaOptions", options); }

/// Why a site cannot take LoHa, or an empty string.
inline std::string refusal(const LohaOptions&, const SiteInfo& site) {
  return internal::dense_update_refusal(site);
}

inline std::shared_ptr<PieceImpl> make_piece(const LohaOptions& options, const SiteInfo& site) {
  return std::make_shared<LohaImpl>(options, site);
}

inline LohaImpl::LohaImpl(LohaOptions settings, const SiteInfo& site)
    : DenseUpdate(std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Loha: '", site.path, "': ", why);
  const auto add = [this](const char* name, std::vector<int64_t> shape) {
    return register_parameter(name, torch::empty(shape));
  };
  const auto out = site.weight_shape.at(0), in = site.weight_shape.at(1);
  if (options.effective_conv() && internal::has_wide_kernel(site)) {
    const auto [height, width] = internal::kernel_2d(site);
    hada_t1 = add("hada_t1", {rank, rank, height, width});
    hada_w1_a = add("hada_w1_a", {rank, out});
    hada_w1_b = add("hada_w1_b", {rank, in});
    hada_t2 = add("hada_t2", {rank, rank, height, width});
    hada_w2_a = add("hada_w2_a", {rank, out});
    hada_w2_b = add("hada_w2_b", {rank, in});
    return;
  }
  const auto columns = c10::multiply_integers(site.weight_shape) / out;
  hada_w1_a = add("hada_w1_a", {out, rank});
  hada_w1_b = add("hada_w1_b", {rank, columns});
  hada_w2_a = add("hada_w2_a", {out, rank});
  hada_w2_b = add("hada_w2_b", {rank, columns});
}

}  // namespace peft
