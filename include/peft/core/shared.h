// Shared: tensors that several pieces of one adapter use.
#pragma once

#include <cstdint>
#include <memory>

#include "peft/core/compat.h"
#include "peft/core/site_traits.h"

namespace peft {
namespace internal {

/// Gives a module of the same make its own copies of another's tensors, with their `requires_grad`, by name.
inline void copy_tensors(const nn::Module& from, nn::Module& to) {
  const auto copy_all = [](const auto& given, auto taken) {
    for (const auto& item : given) {
      taken[item.key()].set_data(item.value().detach().clone());
      taken[item.key()].set_requires_grad(item.value().requires_grad());
    }
  };
  copy_all(from.named_parameters(), to.named_parameters());
  copy_all(from.named_buffers(), to.named_buffers());
}

/// Moves a module to its site's device and floating type; half types are widened to float32 after rounding.
inline void place_like(nn::Module& module, const SiteInfo& site) {
  module.to(site.device, site.dtype);
  if (site.dtype == torch::kFloat16 || site.dtype == torch::kBFloat16) module.to(torch::kFloat32);
}

/// Moves a module of float32 to its site's device, and to float64 in a model of that.
inline void place_in_float32(nn::Module& module, const SiteInfo& site) {
  module.to(site.device);
  if (site.dtype == torch::kFloat64) module.to(torch::kFloat64);
}

/// How many weights of a module train.
inline int64_t trainable(const nn::Module& module) {
  int64_t total = 0;
  for (const auto& parameter : module.parameters()) {
    if (parameter.requires_grad()) total += parameter.numel();
  }
  return total;
}

}  // namespace internal

/// Tensors that all pieces of one method in an adapter use. Registered once, at
/// `<first site>.<adapter>.shared.<method>`; the pieces hold pointers that are not registered, since
/// `parameters()` would list the tensors once a piece. `PieceImpl::make_shared_part` makes it. Registered
/// parameters are what trains; frozen state is registered as buffers.
class SharedImpl : public nn::Module {
 public:
  using nn::Module::Module;

  /// The reference's random draws, before those of the pieces of the same `turn`: once, in float32 on the
  /// CPU. Not run for an adapter that is loaded or copied.
  virtual void initialize() {}
  /// As `PieceImpl::turn`.
  virtual int turn() const { return 0; }

  /// Moves it to the device and floating type of the site that registers it, as `PieceImpl::place` does.
  virtual void place(const SiteInfo& site) { internal::place_like(*this, site); }

  /// A copy with its own tensors and the same `requires_grad`, nothing drawn.
  virtual std::shared_ptr<SharedImpl> copy() const = 0;

  std::shared_ptr<nn::Module> clone(const internal::OptionalDevice& device) const override {
    auto result = copy();
    if (device) result->to(*device);
    return result;
  }
};

}  // namespace peft
