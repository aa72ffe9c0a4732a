// NF4 and int8: what a weight becomes when it is quantised and read back.
#pragma once

#include <array>

#include "peft/core/compat.h"

namespace peft::internal {

/// The sixteen values of "normal float" with four bits, times a block's largest magnitude.
/// Paper: QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314, appendix E.
inline constexpr std::array<float, 16> nf4_values{-1.0F,
                                                  -0.6961928009986877F,
                                                  -0.5250730514526367F,
                                                  -0.39491748809814453F,
                                                  -0.28444138169288635F,
                                                  -0.18477343022823334F,
                                                  -0.09105003625154495F,
                                                  0.0F,
                                                  0.07958029955625534F,
                                                  0.16093020141124725F,
                                                  0.24611230194568634F,
                                                  0.33791524171829224F,
                                                  0.44070982933044434F,
                                                  0.5626170039176941F,
                                                  0.7229568362236023F,
                                                  1.0F};

/// A float32 tensor quantised to NF4 in blocks of 64 (row-major, the last one may be short), each scaled by
/// its largest magnitude, and read back: bitsandbytes' `quantize_4bit` and `dequantize_4bit` without double
/// quantisation.
inline Tensor nf4_round_trip(const Tensor& weight) {
  constexpr int64_t block = 64;
  const auto flat = weight.to(torch::kFloat32).contiguous().view(-1);
  const auto blocks = (flat.numel() + block - 1) / block;
  const auto padded = torch::constant_pad_nd(flat, {0, blocks * block - flat.numel()}).view({blocks, block});
  const auto largest = std::get<0>(padded.abs().max(1, /*keepdim=*/true)).clamp_min(1e-38);
  const auto values =
      torch::tensor(c10::ArrayRef<float>(nf4_values.data(), nf4_values.size()), torch::kFloat32)
          .to(flat.device());
  const auto middles = (values.slice(0, 0, 15) + values.slice(0, 1, 16)) / 2;
  // What lies in the middle of two takes the lower one.
  const auto codes = at::bucketize(padded / largest, middles, /*out_int32=*/false, /*right=*/false);
  return (values.index_select(0, codes.view(-1)).view_as(padded) * largest)
      .view(-1)
      .narrow(0, 0, flat.numel())
      .view(weight.sizes());
}

/// A matrix quantised row by row to int8, each row scaled by its largest magnitude, and read back: what
/// bitsandbytes' `Int8Params`, which rounds to float16 first, makes of it.
inline Tensor int8_round_trip(const Tensor& weight) {
  const auto W = weight.to(torch::kFloat16).to(torch::kFloat32);
  const auto largest = std::get<0>(W.abs().max(1, /*keepdim=*/true));
  const auto codes = torch::where(largest > 0, W * (127.0 / largest), torch::zeros_like(W)).round();
  return codes * largest * (1.0 / 127.0);
}

}  // namespace peft::internal
