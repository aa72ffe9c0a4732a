// LoraOptions: the settings of LoRA, their ranges, and which layers can take it.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/core/site_traits.h"
#include "peft/methods/lora_init.h"

namespace peft {

/// Settings of `Lora`. Defaults are Hugging Face's.
struct LoraOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "lora";

  explicit LoraOptions(int64_t rank = 8) : rank_(rank) {}

  /// Rank r of the update, at least 1.
  TORCH_ARG(int64_t, rank);
  /// α; the product is scaled by α / r.
  TORCH_ARG(double, alpha) = 8.0;
  /// Rate of dropout on the adapter's input, in [0, 1). Not applied on embeddings, as in the reference.
  TORCH_ARG(double, dropout) = 0.0;
  /// Scale by α / √r instead (arXiv 2312.03732).
  TORCH_ARG(bool, rslora) = false;
  /// A bias on B, inside the scaled term, zero at the start. Needs a bias in the base to be merged.
  TORCH_ARG(bool, lora_bias) = false;
  TORCH_ARG(LoraInit, init) = LoraInit::kaiming;
  /// Subspace iterations of `LoraInit::pissa_niter`, at least 0.
  TORCH_ARG(int64_t, niter) = 16;
  /// Bits a weight is quantised to by `LoraInit::loftq`: 4 (NF4 in blocks of 64) or 8 (int8 by rows). The
  /// adapter then runs on the weight as it is after quantising, which it keeps beside the untouched base:
  /// W′ = Q + s · B A. With α = r it starts near W.
  TORCH_ARG(int64_t, loftq_bits) = 4;
  /// Rounds of quantising and fitting, at least 1.
  TORCH_ARG(int64_t, loftq_iter) = 1;
  /// Other ranks for some layers: the first regular expression that matches the path, or what follows a dot
  /// in it.
  TORCH_ARG(std::vector<Pattern<int64_t>>, rank_pattern) = {};
  /// Other α for some layers, likewise.
  TORCH_ARG(std::vector<Pattern<double>>, alpha_pattern) = {};
  /// For a linear layer that stacks several projections (q, k, v): which of its equal blocks of rows to
  /// adapt, each with its own rank-r factors. Empty: the layer is one. As loralib's
  /// `MergedLinear(enable_lora)`.
  TORCH_ARG(std::vector<bool>, enable) = {};
  /// In place of s: g = the mean over the tokens of σ(G x + g₀), one number a row of the batch (UniPELT,
  /// arXiv 2110.07577). Linear layers with inputs (batch, time, in).
  TORCH_ARG(bool, gating) = false;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const LoraOptions& options) {
  TORCH_CHECK_VALUE(options.rank() > 0, "LoraOptions: rank must be positive, but got ", options.rank());
  TORCH_CHECK_VALUE(std::isfinite(options.alpha()), "LoraOptions: alpha must be finite, but got ",
                    options.alpha());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "LoraOptions: dropout must be in [0, 1), but got ", options.dropout());
  TORCH_CHECK_VALUE(options.niter() >= 0, "LoraOptions: niter must be at least 0, but got ", options.niter());
  TORCH_CHECK_VALUE(options.loftq_bits() == 4 || options.loftq_bits() == 8,
                    "LoraOptions: loftq_bits must be 4 or 8, but got ", options.loftq_bits());
  TORCH_CHECK_VALUE(options.loftq_iter() > 0, "LoraOptions: loftq_iter must be positive, but got ",
                    options.loftq_iter());
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(rank > 0, "LoraOptions: rank_pattern of '", pattern, "' must be positive, but got ",
                      rank);
    internal::check_pattern("LoraOptions: rank_pattern", pattern);
  }
  for (const auto& [pattern, alpha] : options.alpha_pattern()) {
    TORCH_CHECK_VALUE(std::isfinite(alpha), "LoraOptions: alpha_pattern of '", pattern,
                      "' must be finite, but got ", alpha);
    internal::check_pattern("LoraOptions: alpha_pattern", pattern);
  }
  const auto& enable = options.enable();
  TORCH_CHECK_VALUE(enable.empty() || std::find(enable.begin(), enable.end(), true) != enable.end(),
                    "LoraOptions: enable must switch on at least one block, but got ", enable.size(),
                    " times false");
}

/// Why a site cannot take LoRA, or an empty string.
inline std::string refusal(const LoraOptions& options, const SiteInfo& site) {
  const auto name = "a " + site.layer;
  if (site.fan_in.empty() && site.experts == 1)
    return name + " has no low-rank form (hint: a `Replace` piece trains all of it)";
  const auto rank = internal::first_match(options.rank_pattern(), site.target(), options.rank());
  if (rank % site.groups != 0) {
    return name + " of " + std::to_string(site.groups) +
           " groups needs a rank that is a multiple of it, but got rank " + std::to_string(rank);
  }
  if (options.lora_bias() && (site.lookup || site.bare || site.files.kind == FileNames::Kind::part))
    return name + " takes no lora_bias";
  if (const auto why = internal::start_refusal(options.init(), rank, site); !why.empty()) return why;
  const auto alpha = internal::first_match(options.alpha_pattern(), site.target(), options.alpha());
  if (internal::subtracts_start(options.init(), site) && alpha <= 0) {
    return std::string("init ") + to_string(options.init()) + " needs a positive alpha, but got " +
           c10::str(alpha);
  }
  if (options.gating()) {
    if (site.fan_in.size() != 1 || site.lookup || site.weights_only || site.bare)
      return name + " takes no gating";
    if (options.lora_bias()) return "lora_bias cannot be combined with gating";
    if (internal::subtracts_start(options.init(), site) || options.init() == LoraInit::loftq)
      return std::string("init ") + to_string(options.init()) + " cannot be combined with gating";
  }
  if (const auto blocks = static_cast<int64_t>(options.enable().size()); blocks > 0) {
    if (site.fan_in.size() != 1 || site.lookup) return name + " has no blocks of rows to enable";
    if (site.fan_out % blocks != 0) {
      return name + " of " + std::to_string(site.fan_out) + " outputs cannot be cut into " +
             std::to_string(blocks) + " equal blocks (enable)";
    }
    if (options.lora_bias()) return "lora_bias cannot be combined with enable";
    if (!internal::is_plain(options.init()))
      return std::string("init ") + to_string(options.init()) + " cannot be combined with enable";
  }
  return {};
}

}  // namespace peft
