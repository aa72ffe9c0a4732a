// AdaLoRA: low-rank updates in the form of singular value decompositions, whose ranks are shared out while
// they train.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/methods/adalora_layer.h"

namespace peft {

/// Shares the ranks out: scores every rank by the sensitivity and uncertainty of its values, and masks the
/// lowest until a budget that falls with the cube of the time left is met. Hugging Face's `RankAllocator`;
/// importance comes from the value after the update and the clipped gradient before it.
class RankAllocator : public Controller {
 public:
  RankAllocator(AdaLoraOptions settings, std::vector<std::shared_ptr<AdaLoraImpl>> pieces)
      : options(std::move(settings)), pieces_(std::move(pieces)) {
    for (const auto& piece : pieces_) {
      initial_budget_ += piece->lora_A.size(0);
      for (const auto& tensor : tensors(*piece)) {
        importance_.push_back({torch::zeros_like(tensor), torch::zeros_like(tensor)});
      }
    }
  }

  /// Steps taken.
  int64_t step() const { return step_; }
  /// Sum of the ranks that a step leaves, and whether it masks.
  std::pair<int64_t, bool> budget(int64_t step) const {
    const auto target = options.target_rank() * static_cast<int64_t>(pieces_.size());
    const auto end = options.total_step() - options.tfinal();
    if (step <= options.tinit()) return {initial_budget_, false};
    if (step > end) return {target, true};
    const double left =
        1.0 - static_cast<double>(step - options.tinit()) / static_cast<double>(end - options.tinit());
    const double budget =
        static_cast<double>(initial_budget_ - target) * std::pow(left, 3) + static_cast<double>(target);
    return {static_cast<int64_t>(budget), step % options.delta_t() == 0};
  }

  std::vector<const PieceImpl*> pieces() const override {
    std::vector<const PieceImpl*> found;
    for (const auto& piece : pieces_) found.push_back(piece.get());
    return found;
  }

  /// λ · mean over all A and B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F.
  Tensor penalty() const override {
    torch::NoGradGuard no_grad;
    Tensor total;
    for (const auto& piece : pieces_) {
      const auto term =
          internal::orthogonality(piece->lora_A, false) + internal::orthogonality(piece->lora_B, true);
      total = total.defined() ? total + term : term;
    }
    return total * weight();
  }
  void add_penalty_gradients() override {
    if (options.orth_reg_weight() == 0) return;
    for (const auto& piece : pieces_) {
      for (const auto& factor : {piece->lora_A, piece->lora_B}) {
        if (!factor.requires_grad() || factor.numel() == 0) continue;
        auto gradient = internal::gradient_of(factor);
        internal::add_orthogonality_gradient(factor, factor.is_same(piece->lora_B), weight(), gradient);
      }
    }
  }

  void after_update(const StepContext& context) override {
    const auto end = options.total_step() - options.tfinal();
    if (step_ < end) update_importance(context);
    if (step_ > end) {
      for (const auto& piece : pieces_) piece->mask();
    } else if (const auto [ranks, masks] = budget(step_); masks || step_ == end) {
      mask_to(ranks);
      if (step_ == end) {
        for (auto& [sensitivity, uncertainty] : importance_) {
          sensitivity.zero_();
          uncertainty.zero_();
        }
      }
    }
    ++step_;
  }

  NamedTensors state() const override {
    NamedTensors result{{"step", torch::scalar_tensor(step_, torch::kLong)}};
    size_t i = 0;
    for (const auto& piece : pieces_) {
      result.emplace_back(piece->site().path + ".kept", kept_tensor(*piece));
      for (const char* tensor : {"lora_A", "lora_E", "lora_B"}) {
        const auto name = piece->site().path + "." + tensor;
        result.emplace_back(name + ".sensitivity", importance_[i].sensitivity);
        result.emplace_back(name + ".uncertainty", importance_[i++].uncertainty);
      }
    }
    return result;
  }
  void load_state(const std::map<std::string, Tensor>& given) override;

  std::shared_ptr<Controller> copy(const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override {
    std::vector<std::shared_ptr<AdaLoraImpl>> own;
    for (const auto& piece : pieces) own.push_back(std::dynamic_pointer_cast<AdaLoraImpl>(piece));
    auto result = std::make_shared<RankAllocator>(options, std::move(own));
    std::map<std::string, Tensor> values;
    for (const auto& [name, tensor] : state()) values.emplace(name, tensor.clone());
    result->load_state(values);
    return result;
  }

  const AdaLoraOptions options;

 private:
  struct Importance {
    Tensor sensitivity, uncertainty;  ///< both smoothed
    Tensor score() const { return sensitivity * uncertainty; }
  };

  static std::vector<Tensor> tensors(const AdaLoraImpl& piece) {
    return {piece.lora_A, piece.lora_E, piece.lora_B};
  }
  double weight() const { return options.orth_reg_weight() / (2.0 * static_cast<double>(pieces_.size())); }

  void update_importance(const StepContext& context) {
    size_t i = 0;
    for (const auto& piece : pieces_) {
      for (const auto& tensor : tensors(*piece)) {
        auto& [sensitivity, uncertainty] = importance_[i++];
        if (!context.has_gradient(tensor)) continue;
        auto gradient = tensor.grad();
        if (context.clip.defined()) gradient = gradient * context.clip.to(gradient.options());
        const auto now = (tensor.detach() * gradient).abs();
        if (sensitivity.device() != now.device() || sensitivity.scalar_type() != now.scalar_type()) {
          sensitivity = sensitivity.to(now.options());
          uncertainty = uncertainty.to(now.options());
        }
        sensitivity.mul_(options.beta1()).add_(now, 1 - options.beta1());
        uncertainty.mul_(options.beta2()).add_((now - sensitivity).abs(), 1 - options.beta2());
      }
    }
  }

  /// A score for every rank: that of its E, and the means of those of its row of A and its column of B.
  std::vector<Tensor> scores() const {
    std::vector<Tensor> result;
    for (size_t i = 0; i < importance_.size(); i += 3) {
      const auto vectors =
          torch::stack({importance_[i].score().mean(1), importance_[i + 2].score().mean(0)}, 1);
      result.push_back(importance_[i + 1].score().view(-1) + vectors.sum(1));
    }
    return result;
  }

  void mask_to(int64_t ranks) {
    const auto away = initial_budget_ - ranks;
    const auto all = scores();
    std::optional<Tensor> threshold;
    // The reference fails where nothing is to be masked.
    if (away > 0) threshold = std::get<0>(torch::cat(all).kthvalue(away));
    for (size_t i = 0; i < pieces_.size(); ++i) {
      std::vector<bool> stays(pieces_[i]->rows.size(), true);
      if (threshold) {
        const auto above = (all[i] > *threshold).cpu().contiguous();
        stays.assign(above.data_ptr<bool>(), above.data_ptr<bool>() + above.numel());
      }
      pieces_[i]->keep(stays);
    }
  }

  /// A number for each initial rank: 1 kept, 0 masked, 2 before the first masking.
  static Tensor kept_tensor(const AdaLoraImpl& piece) {
    std::vector<uint8_t> flat(static_cast<size_t>(piece.options.init_rank()), 2);
    for (size_t i = 0; i < piece.kept.size(); ++i) flat[i] = piece.kept[i] ? 1 : 0;
    return torch::tensor(flat, torch::kByte);
  }

  std::vector<std::shared_ptr<AdaLoraImpl>> pieces_;
  std::vector<Importance> importance_;  ///< of A, E, B of each piece in turn
  int64_t initial_budget_ = 0, step_ = 0;
};

inline void RankAllocator::load_state(const std::map<std::string, Tensor>& given) {
  torch::NoGradGuard no_grad;
  internal::Problems problems;
  internal::check_tensors(state(), given, problems);
  problems.raise("AdaLora: the state does not fit this adapter");
  step_ = given.at("step").item<int64_t>();
  size_t i = 0;
  for (const auto& piece : pieces_) {
    const auto& path = piece->site().path;
    const auto flat = given.at(path + ".kept").contiguous();
    const auto* values = flat.data_ptr<uint8_t>();
    piece->kept.clear();
    if (flat.numel() > 0 && values[0] != 2) piece->kept.assign(values, values + flat.numel());
    for (const char* tensor : {"lora_A", "lora_E", "lora_B"}) {
      const auto name = path + "." + tensor;
      importance_[i].sensitivity.copy_(given.at(name + ".sensitivity"));
      importance_[i++].uncertainty.copy_(given.at(name + ".uncertainty"));
    }
  }
}

inline std::shared_ptr<Controller> make_controller(const AdaLoraOptions& options,
                                                   const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
  std::vector<std::shared_ptr<AdaLoraImpl>> own;
  for (const auto& piece : pieces) own.push_back(std::dynamic_pointer_cast<AdaLoraImpl>(piece));
  return std::make_shared<RankAllocator>(options, std::move(own));
}

}  // namespace peft
