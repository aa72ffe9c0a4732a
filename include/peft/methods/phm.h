// PHM: a projection whose matrix is a sum of Kronecker products, the building block of Compacter.
#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "peft/core/compat.h"
#include "peft/core/shared.h"
#include "peft/methods/projection.h"

namespace peft {

/// Where the rule R of PHM projections starts.
enum class PhmRuleInit : std::uint8_t {
  normal,   ///< N(0, 0.01²); where projections share it N(0, `init_range`²)
  uniform,  ///< U(±0.01); where projections share it U(±1)
};

/// Settings of PHM projections. Defaults are AdapterHub's.
struct PhmOptions {
  /// n, how many Kronecker products are added, at least 1. It must divide the width of the model and that of
  /// the bottleneck.
  TORCH_ARG(int64_t, dim) = 4;
  /// Rank k of the weights W_i, at least 1; of factorised ones.
  TORCH_ARG(int64_t, rank) = 1;
  /// W_i as the product of two thin matrices.
  TORCH_ARG(bool, factorized_weights) = true;
  /// All down-projections of the adapter use one W, all up-projections another.
  TORCH_ARG(bool, shared_weights) = false;
  /// R_i as the product of a column and a row.
  TORCH_ARG(bool, factorized_rule) = false;
  /// All projections of the adapter use one R.
  TORCH_ARG(bool, shared_rule) = true;
  /// False: R stays as it was drawn. (AdapterHub's `train_adapter` trains it all the same.)
  TORCH_ARG(bool, learn_rule) = true;
  TORCH_ARG(PhmRuleInit, rule_init) = PhmRuleInit::normal;
  /// Standard deviation of a shared rule's start, at least 0.
  TORCH_ARG(double, init_range) = 1e-4;
  TORCH_ARG(bool, bias) = true;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const PhmOptions& options) {
  TORCH_CHECK_VALUE(options.dim() > 0, "PhmOptions: dim must be positive, but got ", options.dim());
  TORCH_CHECK_VALUE(options.rank() > 0, "PhmOptions: rank must be positive, but got ", options.rank());
  TORCH_CHECK_VALUE(std::isfinite(options.init_range()) && options.init_range() >= 0,
                    "PhmOptions: init_range must be at least 0, but got ", options.init_range());
}

namespace internal {

/// n matrices (n, rows, columns), whole or as products of a left and a right stack. Undefined where others
/// hold them.
struct MatrixStack {
  Tensor whole, left, right;

  bool defined() const { return whole.defined() || left.defined(); }
  Tensor value() const { return whole.defined() ? whole : at::bmm(left, right); }

  /// Registers the tensors: `name`, or `name`_left and `name`_right where a rank is given.
  static MatrixStack add(nn::Module& module, const std::string& name, int64_t n, int64_t rows,
                         int64_t columns, std::optional<int64_t> rank, bool trains = true) {
    const auto tensor = [&](const std::string& key, int64_t height, int64_t width) {
      auto values = torch::empty({n, height, width});
      return trains ? module.register_parameter(key, values) : module.register_buffer(key, values);
    };
    MatrixStack stack;
    if (rank) {
      stack.left = tensor(name + "_left", rows, *rank);
      stack.right = tensor(name + "_right", *rank, columns);
    } else {
      stack.whole = tensor(name, rows, columns);
    }
    return stack;
  }

  /// Xavier normal, matrix by matrix. (AdapterHub draws so whatever `hypercomplex_nonlinearity` says.)
  void draw_weights() const {
    const auto slices = (whole.defined() ? whole : left).size(0);
    for (int64_t i = 0; i < slices; ++i) {
      for (const auto* part : {&whole, &left, &right}) {
        if (part->defined()) nn::init::xavier_normal_(part->select(0, i));
      }
    }
  }
  void draw_rule(PhmRuleInit init, double deviation, double bound) const {
    for (auto part : {whole, left, right}) {
      if (!part.defined()) continue;
      if (init == PhmRuleInit::normal) {
        part.normal_(0, deviation);
      } else {
        part.uniform_(-bound, bound);
      }
    }
  }
};

inline MatrixStack add_rule(nn::Module& module, const PhmOptions& options) {
  const auto n = options.dim();
  const auto rank = options.factorized_rule() ? std::optional<int64_t>(1) : std::nullopt;
  return MatrixStack::add(module, "phm_rule", n, n, n, rank, options.learn_rule());
}

inline MatrixStack add_weights(nn::Module& module, const std::string& name, const PhmOptions& options,
                               int64_t in, int64_t out) {
  const auto n = options.dim();
  const auto rank = options.factorized_weights() ? std::optional<int64_t>(options.rank()) : std::nullopt;
  return MatrixStack::add(module, name, n, in / n, out / n, rank);
}

}  // namespace internal

/// What all PHM projections of an adapter share: the rule, the weights, or both.
/// Shapes: phm_rule: (n, n, n); W_down: (n, width / n, size / n); W_up: (n, size / n, width / n); factorised
/// ones as `_left` (n, rows, k) and `_right` (n, k, columns), of the rule with k = 1.
class PhmShared : public SharedImpl {
 public:
  PhmShared(PhmOptions settings, int64_t model_width, int64_t bottleneck_size)
      : SharedImpl("PhmShared"), options(settings), width(model_width), size(bottleneck_size) {
    if (options.shared_weights()) {
      down = internal::add_weights(*this, "W_down", options, width, size);
      up = internal::add_weights(*this, "W_up", options, size, width);
    }
    if (options.shared_rule()) rule = internal::add_rule(*this, options);
  }

  void initialize() override {
    if (options.shared_weights()) {
      down.draw_weights();
      up.draw_weights();
    }
    if (options.shared_rule()) rule.draw_rule(options.rule_init(), options.init_range(), 1.0);
  }
  /// After the projections, as in AdapterHub.
  int turn() const override { return 1; }

  std::shared_ptr<SharedImpl> copy() const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<PhmShared>(options, width, size);
    internal::copy_tensors(*this, *result);
    return result;
  }

  PhmOptions options;
  int64_t width, size;
  internal::MatrixStack rule, down, up;
};

namespace internal {

/// x ↦ x H + b with H = Σ_i R_i ⊗ W_i. Shapes: R: (n, n, n); W: (n, in / n, out / n); H: (in, out); b: (out).
/// Parameters: n k (in / n + out / n) + out, and n³ of a rule of its own.
class PhmProjection : public Projection {
 public:
  PhmProjection(PhmOptions settings, int64_t in, int64_t out, bool downwards)
      : Projection("PhmProjection"), options(settings), down(downwards) {
    if (!options.shared_rule()) rule = add_rule(*this, options);
    if (!options.shared_weights()) W = add_weights(*this, "W", options, in, out);
    if (options.bias()) b = register_parameter("b", torch::empty({out}));
  }

  Tensor forward(const Tensor& x, const SharedImpl* shared) const override {
    const auto R = rule_of(shared).value().to(x.device()), V = weights_of(shared).value().to(x.device());
    const auto n = R.size(0), rows = V.size(1), columns = V.size(2);
    // One product for all entries of all Kronecker products, then entry ((a, c), (b, q)) to its place.
    const auto sum = at::mm(R.reshape({n, n * n}).t(), V.reshape({n, -1}));
    const auto H = sum.view({n, n, rows, columns}).permute({0, 2, 1, 3}).reshape({n * rows, n * columns});
    const auto y = at::matmul(x, H);
    return b.defined() ? y + b : y;
  }

  torch::ScalarType dtype(const SharedImpl* shared) const override {
    const auto& used = rule_of(shared);
    return (used.whole.defined() ? used.whole : used.left).scalar_type();
  }

  void draw(uint64_t seed) override {
    if (seed) torch::manual_seed(seed);
    if (!options.shared_weights()) W.draw_weights();
    if (options.bias()) b.zero_();
    if (!options.shared_rule()) rule.draw_rule(options.rule_init(), 0.01, 0.01);
  }

  PhmOptions options;
  bool down;
  MatrixStack rule, W;
  Tensor b;

 private:
  const MatrixStack& rule_of(const SharedImpl* shared) const {
    return options.shared_rule() ? tied(shared).rule : rule;
  }
  const MatrixStack& weights_of(const SharedImpl* shared) const {
    if (!options.shared_weights()) return W;
    return down ? tied(shared).down : tied(shared).up;
  }
  static const PhmShared& tied(const SharedImpl* shared) {
    const auto* part = dynamic_cast<const PhmShared*>(shared);
    TORCH_CHECK(
        part,
        "PHM: the projection lacks what the adapter shares, as after Module::clone (hint: copy models "
        "with peft::clone)");
    return *part;
  }
};

}  // namespace internal
}  // namespace peft
