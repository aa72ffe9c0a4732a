// Controller: what a method does across all its sites around each step of the optimizer.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/piece.h"
#include "peft/core/problems.h"

namespace peft {

/// Tensors under their names.
using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// What a controller may know of the step it takes part in.
struct StepContext {
  Tensor clip;  ///< what the update multiplies the gradients with; undefined: they are used as they are
  std::function<bool(const Tensor&)> has_gradient;  ///< whether backward reached a parameter
};

/// The state of a method across its sites (ranks, importances) and its part in a training step. `peft::AdamW`
/// and `Adafactor` call, in this order: `add_penalty_gradients`, the clipping, `grow`, the update,
/// `after_update`, `mark` of the pieces. Around a foreign optimizer, `Adapter::before_step` and
/// `Adapter::after_step` do. A method that has one offers the free function `make_controller(options,
/// pieces)`.
class Controller {
 public:
  Controller() = default;
  Controller(const Controller&) = delete;
  Controller& operator=(const Controller&) = delete;
  virtual ~Controller() = default;

  /// The pieces it rules, in the model's order.
  virtual std::vector<const PieceImpl*> pieces() const = 0;

  /// Divides by the loss's scale, given inverted, what backward left beside gradients (`GradScaler`).
  virtual void unscale(const Tensor&) {}

  /// The reference's penalty term, weight included, of the tensors as they are; undefined without one.
  virtual Tensor penalty() const { return {}; }
  /// Adds the gradient of `penalty` to the parameters' gradients, in closed form.
  virtual void add_penalty_gradients() {}

  /// True if `grow` may add parameters.
  virtual bool grows() const { return false; }
  /// Parameters that this step adds to the adapter, or lets train from now on: one new group of the
  /// optimizer, with its default options. Empty: none.
  virtual NamedTensors grow(const StepContext&) { return {}; }
  /// The groups `grow` has made so far.
  virtual std::vector<NamedTensors> groups() const { return {}; }
  /// True if each such group begins the schedule anew, with the steps that are left.
  virtual bool restarts_schedule() const { return false; }

  virtual void after_update(const StepContext&) {}

  /// All that the next step depends on beside the pieces' tensors, for a checkpoint.
  virtual NamedTensors state() const = 0;
  /// Takes over what `state` gave; gives the pieces the number and shapes of tensors they had then. Throws
  /// c10::ValueError, before anything is changed, for a state that does not fit.
  virtual void load_state(const std::map<std::string, Tensor>& state) = 0;

  /// The same state for the copies of its pieces, in the same order.
  virtual std::shared_ptr<Controller> copy(const std::vector<std::shared_ptr<PieceImpl>>& pieces) const = 0;
};

/// A controller of pieces of one type.
template <class PieceType>
class ControllerOf : public Controller {
 public:
  using Pieces = std::vector<std::shared_ptr<PieceType>>;
  explicit ControllerOf(Pieces pieces) : pieces_(std::move(pieces)) {}

  /// Pieces of any type as what they are.
  static Pieces own(const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
    Pieces found;
    for (const auto& piece : pieces) found.push_back(std::dynamic_pointer_cast<PieceType>(piece));
    return found;
  }
  std::vector<const PieceImpl*> pieces() const override {
    std::vector<const PieceImpl*> found;
    for (const auto& piece : pieces_) found.push_back(piece.get());
    return found;
  }

 protected:
  Pieces pieces_;
};

/// Notices parameters that were changed between two forwards in training by something else than the
/// controller's step, which is an optimizer that leaves the controller out.
class StepGuard {
 public:
  /// To be called by the forward of a piece that a controller rules. Throws c10::Error if the parameters are
  /// not those of the last `mark`; the first call marks.
  void check(const PieceImpl& piece, std::initializer_list<Tensor> parameters) const {
    if (!piece.is_training() || !torch::GradMode::is_enabled() || !parameters.begin()->requires_grad()) {
      return;
    }
    const auto now = sum(parameters);
    int64_t unset = none;
    if (version_.compare_exchange_strong(unset, now) || unset == now) return;
    TORCH_CHECK(false, "'", piece.site().path, "': '", piece.method(),
                "' was changed since the last forward, but its step was left out (hint: train with "
                "peft::AdamW(adapter), or call adapter.before_step() and adapter.after_step() around another "
                "optimizer's step; after a change of your own, adapter.accept_changes())");
  }
  void mark(std::initializer_list<Tensor> parameters) const { version_ = sum(parameters); }

 private:
  static constexpr int64_t none = -1;
  static int64_t sum(std::initializer_list<Tensor> parameters) {
    int64_t total = 0;
    for (const auto& parameter : parameters) total += static_cast<int64_t>(parameter._version());
    return total;
  }
  mutable std::atomic<int64_t> version_{none};
};

namespace internal {

/// A parameter's gradient, made if there is none.
inline Tensor gradient_of(const Tensor& parameter) {
  if (!parameter.grad().defined()) Tensor(parameter).mutable_grad() = torch::zeros_like(parameter);
  return parameter.grad();
}

/// Tells autograd that tensors were written to, which LibTorch's `_foreach` operations do not.
inline void mark_written(const std::vector<Tensor>& tensors) {
  for (const auto& tensor : tensors) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace internal
}  // namespace peft
