// Bottleneck node: down, an activation, up and the residual, as one node of the autograd graph.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "peft/core/activation_function.h"
#include "peft/core/compat.h"
#include "peft/kernels/fast_paths.h"

namespace peft::internal {

/// A function of each element with its derivative: slope(g, x) = g ⊙ f′(x), in operations that have a
/// history.
struct SmoothFunction {
  ActivationFunction f;
  Tensor (*slope)(const Tensor& g, const Tensor& x);
};

/// The activation functions whose derivative LibTorch has in one operation, by the names of
/// `activation_functions`.
inline std::optional<SmoothFunction> smooth_function(const std::string& name) {
  using Slope = decltype(SmoothFunction::slope);
  static constexpr Slope gelu = [](const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x); };
  static constexpr Slope gelu_tanh = [](const Tensor& g, const Tensor& x) {
    return at::gelu_backward(g, x, "tanh");
  };
  static constexpr Slope relu = [](const Tensor& g, const Tensor& x) {
    return at::threshold_backward(g, x, 0);
  };
  static constexpr Slope silu = [](const Tensor& g, const Tensor& x) -> Tensor {
    if (!torch::GradMode::is_enabled()) return at::silu_backward(g, x);  // that has no derivative
    const auto open = at::sigmoid(x);
    return g * open * (1 + x * (1 - open));
  };
  static constexpr Slope tanh = [](const Tensor& g, const Tensor& x) {
    return at::tanh_backward(g, at::tanh(x));
  };
  static const std::map<std::string, Slope> slopes{{"gelu", gelu},
                                                   {"gelu_accurate", gelu_tanh},
                                                   {"gelu_fast", gelu_tanh},
                                                   {"gelu_new", gelu_tanh},
                                                   {"gelu_python", gelu},
                                                   {"gelu_pytorch_tanh", gelu_tanh},
                                                   {"gelu_python_tanh", gelu_tanh},
                                                   {"relu", relu},
                                                   {"silu", silu},
                                                   {"swish", silu},
                                                   {"tanh", tanh}};
  const auto found = slopes.find(name);
  if (found == slopes.end()) return {};
  return SmoothFunction{activation_function(name), found->second};
}

/// The matrices of a bottleneck. Shapes: down (size, width), down_bias (size), up (width, size), up_bias
/// (width).
struct BottleneckTensors {
  Tensor down, down_bias, up, up_bias;
};

/// y = r + s · (U f(D h + d) + u). With v = D h + d, a = f(v), δ = s (g U) ⊙ f′(v): dr = g, dh = δ D, of one
/// tensor that is both g + δ D; dD = δᵀ h, dd = Σ δ, dU = s gᵀ a, du = s Σ g, sums over the rows.
/// Saves h and the matrices as variables, which are checked for changes in place; v and a plain. What no task
/// asks for is not computed. Can be differentiated again.
class BottleneckNode final : public torch::autograd::Node {
  using Variable = torch::autograd::SavedVariable;
  using Variables = torch::autograd::variable_list;

 public:
  static Tensor run(const Tensor& h, const Tensor& r, const BottleneckTensors& tensors, double s,
                    const SmoothFunction& function) {
    Tensor v, a, y;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      v = at::addmm(tensors.down_bias, rows(h), tensors.down.t());
      a = function.f(v);
      y = at::add(rows(r), tensors.up_bias, s);
      y = y.addmm_(a, tensors.up.t(), 1, s).view(r.sizes());
    }
    bool trains = false;
    for (const auto& t : {h, r, tensors.down, tensors.down_bias, tensors.up, tensors.up_bias}) {
      trains = trains || t.requires_grad();
    }
    if (!trains || !torch::GradMode::is_enabled()) return y;

    const auto node = make_node<BottleneckNode>();
    const auto edge = torch::autograd::impl::gradient_edge;
    node->joined_ = h.is_same(r);
    node->set_next_edges({edge(h), node->joined_ ? torch::autograd::Edge() : edge(r), edge(tensors.down),
                          edge(tensors.down_bias), edge(tensors.up), edge(tensors.up_bias)});
    node->saved_ = {Variable(h, false), Variable(tensors.down, false), Variable(tensors.down_bias, false),
                    Variable(tensors.up, false)};
    node->v_ = v;
    node->a_ = a;
    node->s_ = s;
    node->function_ = function;
    torch::autograd::create_gradient_edge(y, node);
    return y;
  }

  std::string name() const override { return "BottleneckBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    for (auto& variable : saved_) variable.reset_data();
    v_ = a_ = Tensor();
  }

 protected:
  Variables apply(Variables&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    Variables result(6);
    const auto& gradient = gradients.front();
    if (!gradient.defined()) return result;
    const auto h = saved_[0].unpack(), D = saved_[1].unpack(), d = saved_[2].unpack(), U = saved_[3].unpack();
    if (torch::GradMode::is_enabled()) {
      const auto v = at::addmm(d, rows(h), D.t());
      products(gradient, h, D, U, v, function_.f(v), result);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      products(gradient.contiguous(), h, D, U, v_, a_, result);
    }
    return result;
  }

 private:
  static Tensor rows(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

  void products(const Tensor& gradient, const Tensor& h, const Tensor& D, const Tensor& U, const Tensor& v,
                const Tensor& a, Variables& result) const {
    const auto wants = [this](size_t i) { return task_should_compute_output(i); };
    const auto g = rows(gradient);
    const auto scaled = [this](const Tensor& t) { return s_ == 1 ? t : t * s_; };
    if (wants(0) || wants(2) || wants(3)) {
      const auto delta = function_.slope(scaled(at::mm(g, U)), v);
      if (wants(0)) result[0] = (joined_ ? at::addmm(g, delta, D) : at::mm(delta, D)).view(h.sizes());
      if (wants(2)) result[2] = at::mm(delta.t(), rows(h));
      if (wants(3)) result[3] = delta.sum(0);
    }
    if (wants(1)) result[1] = gradient;
    if (wants(4)) result[4] = scaled(at::mm(g.t(), a));
    if (wants(5)) result[5] = scaled(g.sum(0));
  }

  std::array<Variable, 4> saved_;
  Tensor v_, a_;
  double s_ = 1;
  SmoothFunction function_{};
  bool joined_ = false;
  bool released_ = false;
};

/// r + s · (U f(D h + d) + u), or nothing where the node does not fit: everything of one floating type on one
/// device, no autocast, no forward-mode derivatives. Shapes: h, r: (*, width).
inline std::optional<Tensor> bottleneck(const Tensor& h, const Tensor& r, const BottleneckTensors& tensors,
                                        double s, const SmoothFunction& function) {
  const auto alike = [&h](const Tensor& t) {
    return t.scalar_type() == h.scalar_type() && t.device() == h.device() && t.layout() == torch::kStrided &&
           !t._fw_grad(0).defined();
  };
  const bool fits = FastPaths::enabled() && h.dim() > 0 && h.is_floating_point() &&
                    (h.is_cpu() || h.is_cuda()) && !autocasts(h.device().type()) && h.sizes() == r.sizes() &&
                    h.size(-1) == tensors.down.size(1) && alike(h) && alike(r) && alike(tensors.down) &&
                    alike(tensors.down_bias) && alike(tensors.up) && alike(tensors.up_bias);
  if (!fits) return {};
  return BottleneckNode::run(h, r, tensors, s, function);
}

}  // namespace peft::internal
