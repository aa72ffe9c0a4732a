// Shadow: a trained tensor in the type of the layer it works on, cast once a step.
#pragma once

#include <mutex>

#include <c10/core/InferenceMode.h>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/kept.h"
#include "peft/kernels/thin_products.h"

namespace peft {

/// True where the CPU has instructions for products of bfloat16. Elsewhere LibTorch emulates them, which is
/// several times slower than float32: such a base then saves memory, not time.
inline bool cpu_multiplies_bfloat16() {
#if PEFT_HAS_AVX
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

namespace internal {

/// Whether factors of this many ranks are to meet a layer in `type` through shadows: where no kernel takes
/// them as they are, or the BLAS is faster on factors in the layer's type.
inline bool wants_shadows(const Tensor& A, torch::ScalarType type) {
  if (!is_half(type) || A.scalar_type() == type) return false;
  const bool emulated = type == torch::kBFloat16 && !cpu_multiplies_bfloat16();
  if (A.is_cpu() && emulated) {
    TORCH_WARN_ONCE(
        "peft: this CPU has no instructions for bfloat16, so a base in it is slower than one in float32");
  }
  const bool slow = type == torch::kFloat16 || emulated;  // the BLAS
  return !has_thin_kernel(type, A) || A.size(0) > (slow ? 32 : 8);
}

/// A copy of a master in another floating type, made anew when the master has changed: activations then need
/// no cast. Its gradient becomes the master's, in the master's type; it serves any number of forwards and
/// backwards in between, since a cast keeps nothing for its backward. Several threads may ask at once, on a
/// GPU on one stream.
class Shadow {
 public:
  Shadow() = default;
  // A copy of the owner has a master of its own.
  Shadow(const Shadow&) {}
  Shadow& operator=(const Shadow&) { return *this; }
  ~Shadow() = default;

  /// `master` in `type`; itself where that is its type.
  Tensor of(const Tensor& master, torch::ScalarType type) const {
    if (master.scalar_type() == type) return master;
    if (!master.is_leaf() || master.is_inference() || c10::InferenceMode::is_enabled()) {
      return master.to(type);
    }
    const torch::AutoGradMode with_history(true);
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool stands = cast_.defined() && cast_.scalar_type() == type && master_.is(master) &&
                        cast_.requires_grad() == master.requires_grad();
    if (!stands) {
      cast_ = master.to(type);
      master_ = ValueMark(master);
    }
    return cast_;
  }

 private:
  mutable std::mutex mutex_;
  mutable Tensor cast_;
  mutable ValueMark master_;
};

}  // namespace internal
}  // namespace peft
