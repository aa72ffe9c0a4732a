// Block rotation: what methods that turn a layer's inputs by block-diagonal orthogonal matrices share.
#pragma once

#include <string>
#include <tuple>

#include "peft/core/site_traits.h"
#include "peft/kernels/cuda_graph.h"

namespace peft::internal {

/// x · blockdiag(R): the last axis of x, cut into blocks, each times its matrix.
/// Shapes: x: (*, blocks · b); R: (blocks, b, b), or (1, b, b) for all blocks.
inline Tensor turn_blocks(const Tensor& x, const Tensor& R) {
  const auto b = R.size(-1);
  const auto cut = x.reshape({-1, x.size(-1) / b, b});
  const auto turned = R.size(0) == 1 ? at::matmul(cut, R[0]) : at::einsum("nrk,rkc->nrc", {cut, R});
  return turned.reshape(x.sizes());
}

/// (I − Q)(I + Q)⁻¹ of skew-symmetric matrices (*, b, b), orthogonal; in float32 or wider, as the reference.
inline Tensor cayley(const Tensor& Q) {
  const auto wide = Q.element_size() < 4 ? Q.to(torch::kFloat32) : Q;
  const auto I = torch::eye(Q.size(-1), wide.options().requires_grad(false)).expand_as(wide);
  // Without a look at errors, which would wait for the device: I plus a skew matrix has an inverse.
  const auto solved = at::linalg_solve_ex(I + wide, I - wide, /*left=*/false, /*check_errors=*/false);
  return std::get<0>(solved).to(Q.scalar_type());
}

/// R with the blocks where `mask`, of shape (…, blocks), is 1 set to the identity: multiplicative dropout.
inline Tensor drop_blocks(const Tensor& R, const Tensor& mask) {
  const auto drop = mask.to(R.options().requires_grad(false)).unsqueeze(-1).unsqueeze(-1);
  return (1 - drop) * R + drop * torch::eye(R.size(-1), drop.options());
}

/// ⌊rate · blocks⌋ ones in random places, for what is `like` this.
inline Tensor dropped_blocks(double rate, int64_t blocks, const Tensor& like) {
  const auto device = device_of_draws(like);
  const auto dropped = static_cast<int64_t>(rate * static_cast<double>(blocks));
  const auto mask = torch::cat({torch::ones({dropped}, device), torch::zeros({blocks - dropped}, device)});
  return mask.index_select(0, torch::randperm(blocks, torch::dtype(torch::kLong).device(device)));
}

/// How many numbers a rotation turns: the inputs of one output, of a lookup the outputs.
inline int64_t rotated_size(const SiteInfo& site) {
  if (site.lookup) return site.fan_out;
  int64_t size = 1;
  for (const auto inputs : site.fan_in) size *= inputs;
  return size;
}

/// Why the inputs of a site cannot be turned, or an empty string: the reference has it for linear layers,
/// two-dimensional convolutions of square kernels and, where `lookups`, for embeddings.
inline std::string rotation_refusal(const SiteInfo& site, bool lookups) {
  const auto kernel = site.fan_in.size();
  const bool fits =
      site.lookup ? lookups : !site.bare && !site.fan_in_fan_out && (kernel == 1 || kernel == 3);
  const auto name = "a " + site.layer;
  if (!fits) {
    return name + (site.fan_in_fan_out ? " that stores (in, out)" : "") +
           " has no such form (hint: linear layers and two-dimensional convolutions have one)";
  }
  if (site.groups > 1) return name + " of several groups cannot be rotated: each output sees other inputs";
  if (kernel == 3 && site.fan_in[1] != site.fan_in[2]) {
    return name + " must have a square kernel, but got " + std::to_string(site.fan_in[1]) + " x " +
           std::to_string(site.fan_in[2]);
  }
  return {};
}

}  // namespace peft::internal
