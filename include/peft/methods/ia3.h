// (IA)³: scales a layer's outputs, or its inputs, by a learned vector.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <memory>
#include <ostream>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/core/piece.h"

namespace peft {

/// Settings of `Ia3`. Which layers is the target's business; these say which of them scale their input.
/// Example: `add_adapter(*model, Ia3Options().feedforward({"output.dense"}), named({"key", "value",
/// "output.dense"}))`.
struct Ia3Options {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "ia3";

  /// The layers that scale their input instead of their output: those whose path ends in one of these texts,
  /// whether or not a dot stands before it, as Hugging Face compares them ("v" also means "conv").
  TORCH_ARG(std::vector<std::string>, feedforward) = {};
  /// Instead of names: a regular expression (ECMAScript) for the whole path.
  TORCH_ARG(std::string, feedforward_pattern) = {};
  /// Start at ones, where the method changes nothing. False: N(0, 1), which changes the output at once.
  TORCH_ARG(bool, init) = true;
};

/// (IA)³. Output form: y = F(x) ⊙ l, so W′ = diag(l) W, b′ = b ⊙ l. Feed-forward form: y = F(x ⊙ l), so
/// W′ = W diag(l); in a convolution of several groups each group meets its own channels' part of l.
/// Shapes, as Hugging Face's: ia3_l of a linear layer (out, 1), in the feed-forward form (1, in); of a
/// convolution (1, channels, 1, …). Trains: ia3_l. Count: out, in the feed-forward form in.
/// Several active adapters multiply. Merging is exact up to rounding, and unmerging bit for bit (the
/// reference divides by l + 1e-8).
/// Throws: c10::ValueError for options that contradict each other.
/// Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv
/// 2205.05638, §3.3: l_k and l_v on the keys and values, l_ff on the input of the second feed-forward layer.
class Ia3Impl : public Piece<Ia3Impl, Ia3Options> {
 public:
  Ia3Impl(Ia3Options settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    std::vector<int64_t> shape(site().fan_in.size(), 1);  // channels of a convolution come before its axes
    shape.front() = -1;
    const auto l = ia3_l.view(shape);
    if (!feedforward) return layer.forward(x) * l;
    return layer.forward((x.to(l.scalar_type()) * l).to(x.scalar_type()));
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    const auto scaled = [](const Tensor& tensor, const Tensor& l) {
      return (tensor * l).to(tensor.scalar_type());
    };
    const auto weight = scaled(weights.weight, along_weight());
    if (feedforward || !weights.bias.defined()) return {weight, weights.bias};
    return {weight, scaled(weights.bias, ia3_l.flatten())};
  }

  /// Draws N(0, 1) as the reference does, also where ones take its place.
  void initialize(const LayerView&) override {
    torch::NoGradGuard no_grad;
    ia3_l.copy_(torch::randn(ia3_l.sizes()));
    if (options.init()) ia3_l.fill_(1);
  }

  Changed changed() const override {
    auto result = Piece::changed();
    if (!feedforward && site().has_bias()) result.bias = ia3_l.numel();
    return result;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Ia3(" << (feedforward ? "inputs" : "outputs") << "=" << ia3_l.numel() << ")";
  }
  void copy_state(const Ia3Impl& other) { feedforward = other.feedforward; }

  bool feedforward;  ///< l scales the input
  Tensor ia3_l;

 private:
  /// l in a shape that multiplies the weight as the layer stores it.
  Tensor along_weight() const;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const Ia3Options& options) {
  const auto& names = options.feedforward();
  TORCH_CHECK_VALUE(std::find(names.begin(), names.end(), std::string()) == names.end(),
                    "Ia3Options: feedforward must hold names, but got an empty one");
  TORCH_CHECK_VALUE(names.empty() || options.feedforward_pattern().empty(),
                    "Ia3Options: expected feedforward or feedforward_pattern, but got both");
  internal::check_pattern("Ia3Options: feedforward_pattern", options.feedforward_pattern());
}

/// Why a site cannot take (IA)³, or an empty string.
inline std::string refusal(const Ia3Options&, const SiteInfo& site) {
  if (!site.fan_in.empty() && !site.lookup && !site.bare) return {};
  return "a " + site.layer +
         " has no outputs or inputs for (IA)³ to scale: it is for linear layers and "
         "convolutions";
}

inline std::shared_ptr<PieceImpl> make_piece(const Ia3Options& options, const SiteInfo& site) {
  return std::make_shared<Ia3Impl>(options, site);
}

namespace internal {

/// Whether the options count a site among the feed-forward layers, by its path or that of the module it is a
/// part of.
inline bool is_feedforward(const Ia3Options& options, const SiteInfo& site) {
  const auto& names = options.feedforward();
  const std::regex pattern(options.feedforward_pattern());
  const auto means = [&](const std::string& path) {
    if (!options.feedforward_pattern().empty()) return std::regex_match(path, pattern);
    return std::any_of(names.begin(), names.end(),
                       [&](const std::string& name) { return path.ends_with(name); });
  };
  return means(site.path) || means(site.target());
}

}  // namespace internal

inline Ia3Impl::Ia3Impl(Ia3Options settings, const SiteInfo& site)
    : Piece(Ia3Options::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Ia3: '", site.path, "': ", why);
  feedforward = internal::is_feedforward(options, site);
  const bool linear = site.fan_in.size() == 1;
  std::vector<int64_t> shape(site.fan_in.size() + 1, 1);
  shape[linear && !feedforward ? 0 : 1] = feedforward ? site.fan_in.front() : site.fan_out;
  ia3_l = register_parameter("ia3_l", torch::empty(shape));
}

inline Tensor Ia3Impl::along_weight() const {
  const auto groups = site().groups;
  std::vector<int64_t> shape(site().weight_shape.size(), 1);
  if (feedforward && groups > 1) {
    const auto inputs = ia3_l.numel() / groups, outputs = site().fan_out / groups;
    shape[0] = groups * outputs;
    shape[1] = inputs;
    return ia3_l.view({groups, 1, inputs}).expand({groups, outputs, inputs}).reshape(shape);
  }
  shape[feedforward == site().fan_in_fan_out ? 0 : 1] = -1;
  return ia3_l.view(shape);
}

}  // namespace peft
