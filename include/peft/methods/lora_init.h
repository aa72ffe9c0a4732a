// LoraInit: how the factors of a LoRA start.
#pragma once

#include <algorithm>
#include <string>

#include "peft/core/site_traits.h"
#include "peft/kernels/nf4.h"
#include "peft/kernels/svd_lowrank.h"

namespace peft {

/// How A and B start. The names are Hugging Face's `init_lora_weights`.
///
/// `pissa`, `pissa_niter`, `olora`, `corda` and `lora_ga` start with a product B₀A₀ that is not zero and take
/// it out of the base, so that nothing changes at the start. Here the base is never written to: the piece
/// keeps A₀ and B₀ and computes s (BA − B₀A₀).
///
/// An embedding takes `kaiming` (A = 0, B ~ N(0, 1)), `random` and `mica`, and starts as with `kaiming` under
/// the other names but `loftq`, which it refuses; a convolution takes `kaiming`, `gaussian`, `random` and
/// `lora_ga` (which is `kaiming` there), and refuses the others. All as Hugging Face's code does.
enum class LoraInit {
  kaiming,      ///< `true`: A ~ U(±1/√fan_in), B = 0. Microsoft's and Hugging Face's code; the paper says
                ///< Gaussian
  gaussian,     ///< "gaussian": A ~ N(0, 1/r) (standard deviation 1/r), B = 0
  random,       ///< `false`: A and B both as a default layer's weights; changes the output at once
  pissa,        ///< the r largest singular triples of W. Paper: arXiv 2404.02948
  pissa_niter,  ///< "pissa_niter_N": the same by a randomised SVD of `LoraOptions::niter` iterations
  olora,        ///< the first r columns of Q and rows of R, W = QR. Paper: arXiv 2406.01775
  orthogonal,   ///< random A and B with BA = 0; the rank must be even
  mica,   ///< A = 0, B the r last left singular vectors of W, frozen: A alone trains. Paper: arXiv 2604.01694
  loftq,  ///< W is quantised, A and B make up for what is lost; see `LoraOptions::loftq_bits`. Paper: arXiv
          ///< 2310.08659
  eva,    ///< B = 0, A the directions in which the layer's inputs vary most, which `initialize_eva` finds;
          ///< until then as a default layer's. Paper: arXiv 2410.07170
  corda,  ///< from W and the covariance of the inputs, which `initialize_corda` measures; until then as
          ///< `kaiming`. Paper: arXiv 2406.05223
  lora_ga,  ///< from the gradient of W, which `initialize_lora_ga` measures; until then as `kaiming`. Paper:
            ///< arXiv 2407.05000
};

/// A word for an error message; Hugging Face's, where it is a word there.
inline const char* to_string(LoraInit init) {
  switch (init) {
    case LoraInit::kaiming:
      return "kaiming";
    case LoraInit::gaussian:
      return "gaussian";
    case LoraInit::random:
      return "random";
    case LoraInit::pissa:
      return "pissa";
    case LoraInit::pissa_niter:
      return "pissa_niter";
    case LoraInit::olora:
      return "olora";
    case LoraInit::orthogonal:
      return "orthogonal";
    case LoraInit::mica:
      return "mica";
    case LoraInit::loftq:
      return "loftq";
    case LoraInit::eva:
      return "eva";
    case LoraInit::corda:
      return "corda";
    case LoraInit::lora_ga:
      return "lora_ga";
  }
  return "?";
}

namespace internal {

/// Factors of a start: A (rank, in), B (out, rank).
struct StartFactors {
  Tensor A, B;
};

/// True where the start's product is to be taken out of the base: the piece keeps A₀ and B₀.
inline bool subtracts_start(LoraInit init, const SiteInfo& site) {
  return site.fan_in.size() == 1 && !site.lookup &&
         (init == LoraInit::pissa || init == LoraInit::pissa_niter || init == LoraInit::olora ||
          init == LoraInit::corda || init == LoraInit::lora_ga);
}

/// True for a start that needs no more than the shapes, whatever the layer.
inline bool is_plain(LoraInit init) {
  return init == LoraInit::kaiming || init == LoraInit::gaussian || init == LoraInit::random;
}

/// Why a layer cannot start so, or an empty string.
inline std::string start_refusal(LoraInit init, int64_t rank, const SiteInfo& site) {
  if (is_plain(init)) return {};
  const auto start = std::string("init ") + to_string(init);
  const auto never = "a " + site.layer + " has no " + start + " (hint: kaiming)";
  if (site.lookup && init == LoraInit::loftq) return never;
  if (site.lookup && init != LoraInit::mica) return {};
  const bool needs_data = init == LoraInit::eva || init == LoraInit::corda || init == LoraInit::lora_ga;
  if (site.bare || site.experts > 1 || (site.weights_only && needs_data)) return never;
  if (site.fan_in.size() != 1) return init == LoraInit::lora_ga ? std::string() : never;
  if (init == LoraInit::orthogonal && rank % 2 != 0) {
    return start + " needs an even rank, but got rank " + std::to_string(rank);
  }
  if (init == LoraInit::orthogonal || init == LoraInit::eva) return {};
  const auto available = std::min(site.fan_in[0], site.fan_out);
  const auto needed = init == LoraInit::lora_ga ? 2 * rank : rank;
  if (needed <= available) return {};
  return start + " needs " + std::to_string(needed) + " singular vectors for rank " + std::to_string(rank) +
         ", but the weight has " + std::to_string(available);
}

/// U diag(S / s) Vᵀ, split evenly between the factors.
inline StartFactors split(const Tensor& U, const Tensor& S, const Tensor& Vh, double scaling) {
  const auto root = (S / scaling).sqrt();
  return {root.view({-1, 1}) * Vh, U * root};
}

/// PiSSA's start: s BA is the best approximation of W of that rank.
inline StartFactors pissa(const Tensor& W, int64_t rank, double scaling) {
  const auto [U, S, Vh] = at::linalg_svd(W, /*full_matrices=*/false);
  return split(U.narrow(1, 0, rank), S.narrow(0, 0, rank), Vh.narrow(0, 0, rank), scaling);
}

/// The same from a randomised SVD; draws.
inline StartFactors pissa_niter(const Tensor& W, int64_t rank, double scaling, int64_t niter) {
  const auto found = svd_lowrank(W, rank, niter);
  return split(found.U, found.S, found.V.t(), scaling);
}

/// OLoRA's start. Unlike PiSSA's it is not divided by s, as in the reference: s BA is s times the part of W.
inline StartFactors olora(const Tensor& W, int64_t rank) {
  const auto [Q, R] = at::linalg_qr(W);
  return {R.narrow(0, 0, rank), Q.narrow(1, 0, rank)};
}

/// Factors whose columns and rows span orthogonal spaces, so that BA = 0 up to rounding; draws.
inline StartFactors orthogonal(int64_t rank, int64_t in, int64_t out) {
  const auto Q = std::get<0>(at::linalg_qr(torch::randn({rank, rank})));
  const auto half = [&](int64_t first) { return Q.slice(0, first, rank, 2); };
  const auto A = torch::randn({in, rank / 2}).mm(half(0)).t() / 10.0;
  const auto B = torch::randn({rank / 2, out}).t().mm(half(1)) / 10.0;
  return {A, B};
}

/// The left singular vectors of W's `rank` smallest singular values.
inline Tensor minor_left_vectors(const Tensor& W, int64_t rank) {
  const auto U = std::get<0>(at::linalg_svd(W, /*full_matrices=*/false));
  return U.narrow(1, U.size(1) - rank, rank);
}

/// LoftQ's start and the quantised weight it belongs to.
struct LoftqStart {
  StartFactors factors;
  Tensor quantized;  ///< as W, read back
};

/// Alternates between quantising what the factors leave and fitting the factors to what quantising loses. As
/// the reference it leaves s out: quantized + s BA ≈ W holds for α = r only.
inline LoftqStart loftq(const Tensor& W, int64_t rank, int64_t bits, int64_t iterations) {
  LoftqStart start;
  auto left = W;
  for (int64_t i = 0; i < iterations; ++i) {
    start.quantized = bits == 4 ? nf4_round_trip(left) : int8_round_trip(left);
    start.factors = pissa(W - start.quantized, rank, /*scaling=*/1.0);
    left = W - start.factors.B.mm(start.factors.A);
  }
  return start;
}

}  // namespace internal
}  // namespace peft
