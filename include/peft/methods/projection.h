// Projection: the matrices that bottleneck adapters are made of.
#pragma once

#include <cmath>
#include <cstdint>

#include "peft/core/compat.h"
#include "peft/core/shared.h"
#include "peft/methods/draws.h"

namespace peft::internal {

/// One projection of a bottleneck.
class Projection : public nn::Module {
 public:
  using nn::Module::Module;
  /// `shared`: of the adapter; nullptr where it shares nothing.
  virtual Tensor forward(const Tensor& x, const SharedImpl* shared) const = 0;
  virtual torch::ScalarType dtype(const SharedImpl* shared) const = 0;
  /// The draws of the reference's constructor; a seed other than 0 sets the global generator first where the
  /// reference does.
  virtual void draw(uint64_t seed) = 0;
};

/// A whole matrix. Shapes: weight: (out, in); bias: (out).
class DenseProjection : public Projection {
 public:
  DenseProjection(int64_t in, int64_t out) : Projection("DenseProjection") {
    weight = register_parameter("weight", torch::empty({out, in}));
    bias = register_parameter("bias", torch::empty({out}));
  }
  Tensor forward(const Tensor& x, const SharedImpl* = nullptr) const override {
    return at::linear(x, weight, bias);
  }
  torch::ScalarType dtype(const SharedImpl* = nullptr) const override { return weight.scalar_type(); }
  void draw(uint64_t = 0) override { draw_linear(weight, bias); }
  /// Other weights, from `fill`, and biases 0.
  template <class Fill>
  void restart(const Fill& fill) {
    fill(weight);
    bias.zero_();
  }

  Tensor weight, bias;
};

/// Python's `a // b` of floating-point numbers, as a whole number.
inline int64_t floor_divide(double a, double b) {
  const double quotient = (a - std::fmod(a, b)) / b, whole = std::floor(quotient);
  return static_cast<int64_t>(quotient - whole > 0.5 ? whole + 1 : whole);
}

}  // namespace peft::internal
