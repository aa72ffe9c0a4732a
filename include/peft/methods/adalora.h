// AdaLoRA: low-rank updates in the form of singular value decompositions, whose ranks are shared out while
// they train.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/kernels/orthogonality.h"
#include "peft/methods/adalora_importance.h"
#include "peft/methods/adalora_layer.h"

namespace peft {

/// Shares the ranks out: scores every rank by the sensitivity and uncertainty of its values, and masks the
/// lowest until a budget that falls with the cube of the time left is met. Hugging Face's `RankAllocator`;
/// importance comes from the value after the update and the clipped gradient before it.
class RankAllocator : public ControllerOf<AdaLoraImpl> {
 public:
  RankAllocator(AdaLoraOptions settings, Pieces pieces)
      : ControllerOf(std::move(pieces)), options(std::move(settings)), importance_(pieces_) {
    for (const auto& piece : pieces_) initial_budget_ += piece->lora_A.size(0);
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

  /// λ · mean over all A and B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F.
  Tensor penalty() const override {
    torch::NoGradGuard no_grad;
    const auto of_B = internal::orthogonality(factors(internal::Factor::B), true);
    return (internal::orthogonality(factors(internal::Factor::A), false) + of_B) * weight();
  }
  void add_penalty_gradients() override {
    if (options.orth_reg_weight() == 0) return;
    for (const auto factor : {internal::Factor::A, internal::Factor::B}) {
      auto matrices = factors(factor);
      std::erase_if(matrices, [](const Tensor& matrix) { return !matrix.requires_grad(); });
      if (matrices.empty()) continue;
      std::vector<Tensor> gradients;
      for (const auto& matrix : matrices) gradients.push_back(internal::gradient_of(matrix));
      internal::add_orthogonality_gradients(matrices, gradients, factor == internal::Factor::B, weight());
      internal::mark_written(gradients);
    }
  }

  void after_update(const StepContext& context) override {
    const auto end = options.total_step() - options.tfinal();
    const auto [ranks, masks] = budget(step_);
    if (step_ < end) {
      const auto scores = importance_.update({options.beta1(), options.beta2()}, context, masks);
      if (masks) mask_to(ranks, scores);
    } else if (step_ == end) {
      mask_to(ranks, importance_.scores());
      importance_.clear();
    } else {
      mask();
    }
    ++step_;
  }

  NamedTensors state() const override {
    NamedTensors result{{"step", torch::scalar_tensor(step_, torch::kLong)}};
    importance_.follow_tensors();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const auto& path = pieces_[i]->site().path;
      result.emplace_back(path + ".kept", kept_tensor(*pieces_[i]));
      for (const auto factor : internal::all_factors) {
        const auto [sensitivity, uncertainty] = importance_.of(i, factor);
        result.emplace_back(path + name_of(factor) + ".sensitivity", sensitivity);
        result.emplace_back(path + name_of(factor) + ".uncertainty", uncertainty);
      }
    }
    return result;
  }
  void load_state(const std::map<std::string, Tensor>& given) override;

  std::shared_ptr<Controller> copy(const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override {
    auto result = std::make_shared<RankAllocator>(options, own(pieces));
    const auto from = state(), into = result->state();  // named by the paths in one model each
    std::map<std::string, Tensor> values;
    for (size_t i = 0; i < from.size(); ++i) values.emplace(into[i].first, from[i].second.clone());
    result->load_state(values);
    return result;
  }

  const AdaLoraOptions options;

 private:
  static const char* name_of(internal::Factor factor) {
    return factor == internal::Factor::A ? ".lora_A" : factor == internal::Factor::E ? ".lora_E" : ".lora_B";
  }
  double weight() const { return options.orth_reg_weight() / (2.0 * static_cast<double>(pieces_.size())); }

  /// A or B of the layers that have a rank left.
  std::vector<Tensor> factors(internal::Factor factor) const {
    std::vector<Tensor> found;
    for (const auto& piece : pieces_) {
      const auto& tensor = internal::factor_of(*piece, factor);
      if (tensor.numel() > 0) found.push_back(tensor);
    }
    return found;
  }

  /// Keeps so many ranks of all, those with the highest scores. Waits for the device once.
  void mask_to(int64_t ranks, const std::vector<Tensor>& scores) {
    std::vector<Tensor> parts;
    for (const auto& part : scores) parts.push_back(part.view(-1).to(scores.front().options()));
    const auto all = torch::cat(parts);
    const auto away = initial_budget_ - ranks;
    // The reference fails where nothing is to be masked.
    const auto above =
        (away > 0 ? all > std::get<0>(all.kthvalue(away)) : torch::ones_like(all, torch::kBool))
            .cpu()
            .contiguous();
    const bool* stays = above.data_ptr<bool>();
    for (const auto& stack : importance_.stacks()) {
      for (const auto i : stack.members) {
        pieces_[i]->kept.assign(static_cast<size_t>(options.init_rank()), false);
        for (const auto row : pieces_[i]->rows) pieces_[i]->kept[row] = *stays++;
      }
    }
    mask();
  }

  /// Puts 0 into the E of every rank that was not kept. Waits for no device.
  void mask() const {
    torch::NoGradGuard no_grad;
    for (const auto& stack : importance_.stacks()) {
      std::vector<Tensor> values;
      std::vector<float> stays;
      for (const auto i : stack.members) {
        const auto& piece = *pieces_[i];
        values.push_back(piece.lora_E);
        for (const auto row : piece.rows) stays.push_back(piece.kept.empty() || piece.kept[row] ? 1 : 0);
      }
      if (stays.empty()) continue;
      if (internal::has_loop(values.front())) {
        auto stay = stays.cbegin();
        for (const auto& E : values) multiply(E, stay);
      } else {
        const auto count = static_cast<int64_t>(values.size());
        const auto masks = torch::tensor(stays, torch::kFloat).view({count, -1, 1});
        at::_foreach_mul_(values, masks.to(values.front().options().requires_grad(false)).unbind());
      }
      internal::mark_written(values);
    }
  }
  /// Multiplies the rows of a column on the CPU with factors, which it takes from `factor` on.
  static void multiply(const Tensor& column, std::vector<float>::const_iterator& factor) {
    const auto run = [&]<class T>(T* value) {
      for (int64_t i = 0; i < column.size(0); ++i) value[i * column.stride(0)] *= static_cast<T>(*factor++);
    };
    column.scalar_type() == torch::kFloat ? run(column.data_ptr<float>()) : run(column.data_ptr<double>());
  }

  /// A number for each initial rank: 1 kept, 0 masked, 2 before the first masking.
  static Tensor kept_tensor(const AdaLoraImpl& piece) {
    std::vector<uint8_t> flat(static_cast<size_t>(piece.options.init_rank()), 2);
    for (size_t i = 0; i < piece.kept.size(); ++i) flat[i] = piece.kept[i] ? 1 : 0;
    return torch::tensor(flat, torch::kByte);
  }

  mutable internal::AdaLoraImportance importance_;  ///< which follows the pieces where they are moved
  int64_t initial_budget_ = 0, step_ = 0;
};

inline void RankAllocator::load_state(const std::map<std::string, Tensor>& given) {
  torch::NoGradGuard no_grad;
  internal::Problems problems;
  internal::check_tensors(state(), given, problems);
  problems.raise("AdaLora: the state does not fit this adapter");
  step_ = given.at("step").item<int64_t>();
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const auto& path = pieces_[i]->site().path;
    const auto flat = given.at(path + ".kept").to(torch::kCPU).contiguous();
    const auto* values = flat.data_ptr<uint8_t>();
    pieces_[i]->kept.clear();
    if (flat.numel() > 0 && values[0] != 2) pieces_[i]->kept.assign(values, values + flat.numel());
    for (const auto factor : internal::all_factors) {
      const auto [sensitivity, uncertainty] = importance_.of(i, factor);
      sensitivity.copy_(given.at(path + name_of(factor) + ".sensitivity"));
      uncertainty.copy_(given.at(path + name_of(factor) + ".uncertainty"));
    }
  }
}

inline std::shared_ptr<Controller> make_controller(const AdaLoraOptions& options,
                                                   const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
  return std::make_shared<RankAllocator>(options, RankAllocator::own(pieces));
}

}  // namespace peft
