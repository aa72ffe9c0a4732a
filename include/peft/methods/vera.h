// VeRA: adds a product of frozen random matrices, shared by all layers and scaled by trained vectors.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/piece.h"
#include "peft/core/shared.h"

namespace peft {

/// Settings of `Vera`. Defaults are Hugging Face's.
struct VeraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "vera";

  explicit VeraOptions(int64_t rank = 256) : rank_(rank) {}

  /// Rank r of the shared matrices, at least 1; larger than a LoRA's, for only vectors train.
  TORCH_ARG(int64_t, rank);
  /// Seed of the shared matrices.
  TORCH_ARG(int64_t, projection_prng_key) = 0;
  /// Write the shared matrices into the adapter's file. Without them a load draws them from the key again.
  TORCH_ARG(bool, save_projection) = true;
  /// Rate of dropout on the adapter's input, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// Start of every entry of d; finite.
  TORCH_ARG(double, d_initial) = 0.1;
  /// False: b = 1 and d ~ N(0, 1), so that the output changes at once.
  TORCH_ARG(bool, init_weights) = true;
};

/// The frozen matrices of one VeRA adapter, wide enough for its widest layer: uniform in ±√(6 / fan_in), from
/// a generator of their own with the key as its seed.
/// Shapes: vera_A: (rank, in); vera_B: (out, rank).
class VeraProjections : public SharedImpl {
 public:
  VeraProjections(int64_t rank, int64_t in, int64_t out, int64_t key) : SharedImpl("VeraProjections") {
    torch::NoGradGuard no_grad;
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(key));
    const auto draw = [&](int64_t rows, int64_t columns) {
      const auto bound = std::sqrt(3.0) * (std::sqrt(2.0) / std::sqrt(static_cast<double>(columns)));
      return torch::empty({rows, columns}).uniform_(-bound, bound, generator);
    };
    vera_A = register_buffer("vera_A", draw(rank, in));
    vera_B = register_buffer("vera_B", draw(out, rank));
  }

  std::shared_ptr<SharedImpl> copy() const override {
    auto result = std::make_shared<VeraProjections>(1, 1, 1, 0);
    result->vera_A.set_data(vera_A.clone());
    result->vera_B.set_data(vera_B.clone());
    return result;
  }

  Tensor vera_A, vera_B;
};

/// VeRA: y = F(x) + b ⊙ (B (d ⊙ (A dropout(x)))), A and B the shared matrices cut to the layer's sizes.
/// Formula: W′ = W + diag(b) B diag(d) A.
/// Shapes: vera_lambda_b: (out); vera_lambda_d: (rank).
/// Trains: both. Count: out + rank a layer.
/// Throws: c10::ValueError for options out of range.
/// Paper: VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454, equation 2. Reference: Hugging Face
/// PEFT.
class VeraImpl : public Piece<VeraImpl, VeraOptions> {
 public:
  VeraImpl(VeraOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    const auto y = layer.forward(x);
    const auto [A, B] = projections();
    auto input = x.to(vera_lambda_d.scalar_type());
    if (is_training() && options.dropout() > 0) input = torch::dropout(input, options.dropout(), true);
    return y + vera_lambda_b * at::linear(vera_lambda_d * at::linear(input, A), B);
  }

  Weights effective(const Weights& weights, const LayerView& layer) const override {
    const auto [A, B] = projections();
    // Half types on the CPU are multiplied in float32 and rounded once, as the reference does.
    const bool widen = vera_lambda_d.is_cpu() && vera_lambda_d.element_size() < 4;
    const auto type = widen ? torch::kFloat32 : vera_lambda_d.scalar_type();
    const auto BA = at::mm(vera_lambda_b.to(type).unsqueeze(1) * B.to(type),
                           vera_lambda_d.to(type).unsqueeze(1) * A.to(type));
    return {weights.weight + layer.fold(BA).to(weights.weight.scalar_type()), weights.bias};
  }

  std::shared_ptr<SharedImpl> make_shared_part(
      const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override {
    int64_t in = 0, out = 0;
    for (const auto& piece : pieces) {
      in = std::max(in, piece->site().fan_in.at(0));
      out = std::max(out, piece->site().fan_out);
    }
    return std::make_shared<VeraProjections>(options.rank(), in, out, options.projection_prng_key());
  }

  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    vera_lambda_d.normal_();  // drawn in any case, as in the reference
    if (options.init_weights()) vera_lambda_d.fill_(options.d_initial());
    vera_lambda_b.fill_(options.init_weights() ? 0.0 : 1.0);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Vera(rank=" << options.rank() << ", dropout=" << options.dropout() << ")";
  }

  Tensor vera_lambda_b, vera_lambda_d;

 private:
  /// The shared matrices, cut to this layer.
  std::pair<Tensor, Tensor> projections() const {
    TORCH_CHECK(shared() != nullptr, "Vera: '", site().path,
                "' has no shared matrices, as after Module::clone (hint: copy models with peft::clone)");
    const auto& both = static_cast<const VeraProjections&>(*shared());
    const auto device = vera_lambda_d.device();
    return {both.vera_A.narrow(1, 0, site().fan_in[0]).to(device),
            both.vera_B.narrow(0, 0, site().fan_out).to(device)};
  }
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const VeraOptions& options) {
  TORCH_CHECK_VALUE(options.rank() > 0, "VeraOptions: rank must be positive, but got ", options.rank());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "VeraOptions: dropout must be in [0, 1), but got ", options.dropout());
  TORCH_CHECK_VALUE(std::isfinite(options.d_initial()), "VeraOptions: d_initial must be finite, but got ",
                    options.d_initial());
}

/// Why a site cannot take VeRA, or an empty string.
inline std::string refusal(const VeraOptions&, const SiteInfo& site) {
  if (site.fan_in.size() == 1 && !site.lookup && !site.bare) return {};
  return "a " + site.layer + " has no VeRA form (hint: linear layers have one)";
}

inline std::shared_ptr<PieceImpl> make_piece(const VeraOptions& options, const SiteInfo& site) {
  return std::make_shared<VeraImpl>(options, site);
}

inline VeraImpl::VeraImpl(VeraOptions settings, const SiteInfo& site)
    : Piece(VeraOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Vera: '", site.path, "': ", why);
  vera_lambda_b = register_parameter("vera_lambda_b", torch::empty({site.fan_out}));
  vera_lambda_d = register_parameter("vera_lambda_d", torch::empty({options.rank()}));
}

}  // namespace peft
