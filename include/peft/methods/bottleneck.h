// Bottleneck adapters: small networks after, or beside, the sublayers of a frozen model.
#pragma once

#include <torch/nn/init.h>
#include <torch/nn/modules/normalization.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/residual.h"
#include "peft/kernels/bottleneck_node.h"
#include "peft/methods/bottleneck_options.h"
#include "peft/methods/phm.h"
#include "peft/methods/projection.h"

namespace peft {
namespace internal {

/// N(0, deviation²) cut at ±bound, drawn as torch.nn.init.trunc_normal_ does: what lies outside is redrawn,
/// each time with as many draws as there are entries.
inline void draw_cut_normal(Tensor tensor, double deviation, double bound) {
  tensor.normal_(0, deviation);
  const auto edge = static_cast<double>(static_cast<float>(bound));
  for (auto outside = tensor.abs().gt(edge); outside.any().item<bool>(); outside = tensor.abs().gt(edge)) {
    tensor.copy_(at::where(outside, torch::empty_like(tensor).normal_(0, deviation), tensor));
  }
}

}  // namespace internal

/// Channels of the bottleneck at a site of this width.
inline int64_t bottleneck_size(const BottleneckOptions& options, const SiteInfo& site, int64_t width) {
  if (options.size() > 0) return options.size();
  auto factor = options.reduction_factor();
  if (site.join) {
    const auto own = options.layer_factors().find(site.join->layer);
    if (own != options.layer_factors().end()) factor = own->second;
  }
  return std::max<int64_t>(1, internal::floor_divide(static_cast<double>(width), factor));
}

/// A bottleneck adapter. With z(h) = s · (U f(D LN?(h) + d) + u), dropout and the gate on it, o the
/// sublayer's output, t its input, N the model's norm at the join (the identity where the model has none
/// there):
///   sequential: a = z(h) + r, where h = o, with `original_ln_before` h = N(o + t); r is `residual`'s choice;
///   parallel:   a = z(t) + o;
///   then, with `original_ln_after`, N(a + t), else a.
/// On a layer F that is no join: F(x) + z(F(x)), parallel F(x) + z(x). `ln_after`: on z + r or on z alone.
/// Several active ones follow each other, each on what the one below gave; the last one's `original_ln_after`
/// counts.
/// Shapes: adapter_down.weight: (size, width), .bias: (size); adapter_up.weight: (width, size), .bias:
/// (width); scaling: (1) or (width); gate.weight: (1, width), .bias: (1); adapter_norm_before and
/// adapter_norm_after .weight, .bias: (width).
/// Trains: all of them. Count: 2 width size + size + width, + 1 or width of a trained scaling, + width + 1 of
/// a gate, + 2 width a norm.
/// Throws: c10::ValueError for options out of range, a width PHM projections cannot divide.
/// Paper: Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751; Towards a Unified View, arXiv
/// 2110.04366, table 1. Reference: AdapterHub's adapters.
class BottleneckImpl : public Piece<BottleneckImpl, BottleneckOptions, ResidualPieceImpl> {
 public:
  BottleneckImpl(BottleneckOptions settings, const SiteInfo& site);

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    const auto y = layer.forward(x);
    return output({options.parallel() ? x : y, y});
  }
  Entry enter(const Tensor& output, const Tensor& skip, const JoinNorm& norm) override {
    if (options.parallel()) return {skip, output};
    const auto [input, residual] = before(output, skip, norm);
    return {input, residual};
  }
  Result run(const Entry& entry) override {
    const auto made = scaled(entry.hidden);
    const auto z = gated(entry.hidden, made);
    if (options.parallel()) return {entry.residual + (adapter_norm_after ? normed(z) : z), made};
    return {around(z, entry.residual), made};
  }
  Tensor output(const Entry& entry) override {
    const auto fused = fused_output(entry);
    return fused ? *fused : run(entry).output;
  }
  bool reads_skip() const override { return options.parallel(); }
  Tensor join(const Tensor& output, const Tensor& skip, const JoinNorm& norm) override {
    return options.original_ln_after() ? norm.forward(output + skip) : output;
  }

  /// What a sequential bottleneck reads at a join, and its residual.
  std::pair<Tensor, Tensor> before(const Tensor& output, const Tensor& skip, const JoinNorm& norm) const {
    Tensor input = output, residual = output;
    if (options.original_ln_before()) {
      const auto sum = output + skip;
      input = norm.forward(sum);
      if (options.residual() == BottleneckResidual::sum) residual = sum;
    }
    if (options.residual() == BottleneckResidual::input) residual = input;
    return {input, residual};
  }
  /// s · (U f(D LN?(h) + d) + u), before dropout, gate and residual.
  Tensor scaled(const Tensor& h);
  /// z and the residual, normed where asked to.
  Tensor around(const Tensor& z, const Tensor& residual) {
    if (!adapter_norm_after) return z + residual;
    if (options.adapter_residual_before_ln()) return normed(z + residual);
    return normed(z) + residual;
  }

  void initialize(const LayerView&) override;

  std::shared_ptr<SharedImpl> make_shared_part(
      const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override;

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Bottleneck(" << width << " -> " << size << " -> " << width << ", "
           << options.non_linearity() << (options.parallel() ? ", parallel" : "")
           << (options.phm() ? ", PHM" : "") << ")";
  }

  int64_t width, size;
  std::shared_ptr<internal::Projection> adapter_down, adapter_up;
  std::shared_ptr<internal::DenseProjection> gate;  ///< nullptr without gating
  Tensor scaling;                                   ///< undefined unless it trains
  nn::LayerNorm adapter_norm_before{nullptr}, adapter_norm_after{nullptr};

 private:
  /// z(h) of what `scaled` made of h, in h's type.
  Tensor gated(const Tensor& h, Tensor z);
  /// r + z(h) in one node of the graph; nothing where more than matrices and f is between them, or h and the
  /// matrices are of different types.
  std::optional<Tensor> fused_output(const Entry& entry) const {
    const bool drops = is_training() && (options.dropout() > 0 || options.hidden_dropout() > 0 ||
                                         options.stochastic_depth() > 0);
    if (!smooth_ || drops || options.phm() || gate || scaling.defined() || adapter_norm_before ||
        adapter_norm_after) {
      return {};
    }
    const auto& down = dynamic_cast<const internal::DenseProjection&>(*adapter_down);
    const auto& up = dynamic_cast<const internal::DenseProjection&>(*adapter_up);
    return internal::bottleneck(entry.hidden, entry.residual, {down.weight, down.bias, up.weight, up.bias},
                                options.scaling(), *smooth_);
  }
  /// The adapter's own norm, in its type.
  Tensor normed(const Tensor& x) {
    return adapter_norm_after->forward(x.to(adapter_norm_after->weight.scalar_type())).to(x.scalar_type());
  }
  ActivationFunction activation_;
  std::optional<internal::SmoothFunction> smooth_;
};

/// Why a site cannot take a bottleneck, or an empty string.
inline std::string refusal(const BottleneckOptions& options, const SiteInfo& site) {
  const auto a = "a " + site.layer;
  if (!options.leave_out().empty() || !options.layer_factors().empty()) {
    if (!site.join) return "leave_out and layer_factors are for joins that know their layer";
    if (std::count(options.leave_out().begin(), options.leave_out().end(), site.join->layer)) {
      return "layer " + std::to_string(site.join->layer) + " is left out (leave_out)";
    }
  }
  if (site.weights_only || site.bare) return a + " that runs on weights alone has no output to adapt";
  if (site.offers_to(Needs::residual)) return {};
  if (site.fan_in.size() > 1) return a + " does not have its channels in the last dimension";
  if (options.parallel() && site.lookup) return a + " reads indices, which a parallel bottleneck cannot";
  if (options.parallel() && !site.fan_in.empty() && site.fan_in[0] != site.fan_out) {
    return "a parallel bottleneck needs inputs as wide as outputs, but got " +
           std::to_string(site.fan_in[0]) + " and " + std::to_string(site.fan_out);
  }
  if (site.width == 0 && options.width() == 0) {
    return "the width of its activations is not known (hint: BottleneckOptions::width)";
  }
  return {};
}

inline std::shared_ptr<PieceImpl> make_piece(const BottleneckOptions& options, const SiteInfo& site) {
  return std::make_shared<BottleneckImpl>(options, site);
}

inline BottleneckImpl::BottleneckImpl(BottleneckOptions settings, const SiteInfo& site)
    : Piece(BottleneckOptions::method, std::move(settings), site) {
  check(options);
  const auto why = refusal(options, site);
  TORCH_CHECK_VALUE(why.empty(), "Bottleneck: '", site.path, "': ", why);
  width = site.width > 0 ? site.width : options.width();
  TORCH_CHECK_VALUE(options.width() == 0 || options.width() == width, "Bottleneck: '", site.path,
                    "' has activations of width ", width, ", but BottleneckOptions::width is ",
                    options.width());
  size = bottleneck_size(options, site, width);
  const auto n = options.phm() ? options.phm()->dim() : 1;
  TORCH_CHECK_VALUE(width % n == 0 && size % n == 0, "Bottleneck: '", site.path,
                    "': PHM projections need a width and a bottleneck that ", n, " divides, but got ", width,
                    " and ", size);
  activation_ = activation_function(options.non_linearity());
  smooth_ = internal::smooth_function(options.non_linearity());

  const auto norm = [&](const char* name) {
    return register_module(name, nn::LayerNorm(nn::LayerNormOptions({width})));
  };
  const auto projection = [&](const char* name, bool down) -> std::shared_ptr<internal::Projection> {
    const auto in = down ? width : size, out = down ? size : width;
    if (!options.phm()) return register_module(name, std::make_shared<internal::DenseProjection>(in, out));
    return register_module(name, std::make_shared<internal::PhmProjection>(*options.phm(), in, out, down));
  };
  if (options.ln_before()) adapter_norm_before = norm("adapter_norm_before");
  adapter_down = projection("adapter_down", true);
  adapter_up = projection("adapter_up", false);
  if (options.trained_scaling() != TrainedScaling::none) {
    const auto channels = options.trained_scaling() == TrainedScaling::channel ? width : 1;
    scaling = register_parameter("scaling", torch::ones({channels}));
  }
  if (options.ln_after()) adapter_norm_after = norm("adapter_norm_after");
  if (options.gating()) {
    gate = register_module("gate", std::make_shared<internal::DenseProjection>(width, 1));
  }
}

inline Tensor BottleneckImpl::scaled(const Tensor& h) {
  TORCH_CHECK_VALUE(h.size(-1) == width, "Bottleneck: '", site().path, "': activations must have width ",
                    width, ", but got ", internal::shape_text(h.sizes()));
  auto x = h.to(adapter_down->dtype(shared().get()));
  if (adapter_norm_before) x = adapter_norm_before->forward(x);
  x = activation_(adapter_down->forward(x, shared().get()));
  if (is_training() && options.hidden_dropout() > 0) x = torch::dropout(x, options.hidden_dropout(), true);
  auto z = adapter_up->forward(x, shared().get());
  if (is_training() && options.stochastic_depth() > 0 && !options.parallel()) {
    const auto kept = 1.0 - options.stochastic_depth();
    std::vector<int64_t> rows(static_cast<size_t>(z.dim()), 1);
    rows[0] = z.size(0);
    z = z * torch::empty(rows, z.options()).bernoulli_(kept).div_(kept);
  }
  if (scaling.defined()) return z * scaling;
  return options.scaling() == 1.0 ? z : z * options.scaling();
}

inline Tensor BottleneckImpl::gated(const Tensor& h, Tensor z) {
  if (is_training() && options.dropout() > 0) z = torch::dropout(z, options.dropout(), true);
  if (gate) {
    TORCH_CHECK_VALUE(h.dim() == 3, "Bottleneck: '", site().path,
                      "': a gate needs activations (batch, time, width), but got ",
                      internal::shape_text(h.sizes()));
    const auto open = at::sigmoid(gate->forward(h.to(z.scalar_type())));
    z = z * open.mean(1, /*keepdim=*/true);
  }
  return z.to(h.scalar_type());
}

inline void BottleneckImpl::initialize(const LayerView&) {
  torch::NoGradGuard no_grad;
  const auto seed = static_cast<uint64_t>(options.init_weights_seed());
  // What AdapterHub's constructors draw, then its initialisation of what is there.
  adapter_down->draw(seed);
  adapter_up->draw(seed);
  if (gate) gate->draw(seed);
  if (seed) torch::manual_seed(seed);
  const auto normal = [](Tensor weight) { weight.normal_(0.0, 0.02); };
  if (auto* down = dynamic_cast<internal::DenseProjection*>(adapter_down.get())) {
    auto& up = dynamic_cast<internal::DenseProjection&>(*adapter_up);
    switch (options.init_weights()) {
      case BottleneckInit::bert:
        down->restart(normal);
        up.restart(normal);
        break;
      case BottleneckInit::mam_adapter:
        down->restart([](const Tensor& weight) { nn::init::kaiming_uniform_(weight, std::sqrt(5.0)); });
        up.restart([](Tensor weight) { weight.zero_(); });
        break;
      case BottleneckInit::houlsby:
        for (auto* layer : {down, &up}) {
          layer->restart([](const Tensor& weight) { internal::draw_cut_normal(weight, 0.01, 0.02); });
        }
        break;
    }
  }
  if (gate && options.init_weights() != BottleneckInit::houlsby) gate->restart(normal);
}

inline std::shared_ptr<SharedImpl> BottleneckImpl::make_shared_part(
    const std::vector<std::shared_ptr<PieceImpl>>& pieces) const {
  if (!options.phm() || (!options.phm()->shared_rule() && !options.phm()->shared_weights())) return nullptr;
  for (const auto& piece : pieces) {
    const auto& other = dynamic_cast<const BottleneckImpl&>(*piece);
    TORCH_CHECK_VALUE(!options.phm()->shared_weights() || (other.width == width && other.size == size),
                      "Bottleneck: shared PHM weights need one shape at all sites, but got ", width, " -> ",
                      size, " at '", site().path, "' and ", other.width, " -> ", other.size, " at '",
                      other.site().path, "'");
  }
  return std::make_shared<PhmShared>(*options.phm(), width, size);
}

}  // namespace peft
