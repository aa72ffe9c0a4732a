// AdaLoRA, the importances: what is kept of every weight, and the score of every rank, a few operations for
// the whole model.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/kernels/importance.h"
#include "peft/methods/adalora_layer.h"

namespace peft::internal {

/// The tensors of a piece.
enum class Factor : size_t { A, E, B };
inline constexpr std::array all_factors{Factor::A, Factor::E, Factor::B};
inline const Tensor& factor_of(const AdaLoraImpl& piece, Factor factor) {
  return factor == Factor::A ? piece.lora_A : factor == Factor::E ? piece.lora_E : piece.lora_B;
}

/// Layers of one shape, type and device. What is kept of their weights lies end to end: all A, all E, all B.
struct AdaLoraStack {
  std::vector<size_t> members;  ///< indices of its pieces
  std::array<std::vector<int64_t>, 3> shapes;
  Tensor sensitivity, uncertainty;  ///< both smoothed

  /// All A, E or B of such a buffer: (members, shape of one).
  Tensor all(const Tensor& flat, Factor factor) const {
    const auto count = static_cast<int64_t>(members.size());
    int64_t offset = 0;
    for (size_t before = 0; before < static_cast<size_t>(factor); ++before) {
      offset += count * c10::multiply_integers(shapes[before]);
    }
    auto shape = shapes[static_cast<size_t>(factor)];
    shape.insert(shape.begin(), count);
    return flat.narrow(0, offset, c10::multiply_integers(shape)).view(shape);
  }

  /// A score for every rank: that of its E, and the means of those of its row of A and its column of B.
  /// Shape: (members, ranks).
  Tensor scores() const {
    const auto score = sensitivity * uncertainty;
    return all(score, Factor::E).squeeze(-1) +
           (all(score, Factor::A).mean(2) + all(score, Factor::B).mean(1));
  }
};

/// The importances of all pieces.
class AdaLoraImportance {
 public:
  using Pieces = std::vector<std::shared_ptr<AdaLoraImpl>>;

  explicit AdaLoraImportance(Pieces pieces) : pieces_(std::move(pieces)) { arrange(); }

  const std::vector<AdaLoraStack>& stacks() const { return stacks_; }

  /// Moves the importances along with the tensors. What else is here takes them as they are.
  void follow_tensors() {
    const auto stays = [&](const AdaLoraStack& stack) {
      return std::all_of(stack.members.begin(), stack.members.end(),
                         [&](size_t i) { return is_like(pieces_[i]->lora_A, stack.sensitivity); });
    };
    if (std::all_of(stacks_.begin(), stacks_.end(), stays)) return;
    const auto before = *this;
    arrange();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      for (const auto factor : all_factors) {
        const auto from = before.of(i, factor), to = of(i, factor);
        to.first.copy_(from.first);
        to.second.copy_(from.second);
      }
    }
  }

  /// Takes in a step's weights and gradients, of the tensors that have one. With `scored`, returns the
  /// `scores` after it, made while the values are in the cache.
  std::vector<Tensor> update(const ImportanceSettings& settings, const StepContext& context, bool scored) {
    follow_tensors();
    std::vector<Tensor> scores;
    for (const auto& stack : stacks_) {
      if (!has_loop(stack.sensitivity)) {
        update_composed(stack, settings, context);
        if (scored) scores.push_back(stack.scores());
        continue;
      }
      const auto ranks = stack.shapes[static_cast<size_t>(Factor::E)].front();
      auto of_stack = torch::zeros({scored ? static_cast<int64_t>(stack.members.size()) : 0, ranks},
                                   stack.sensitivity.options());
      if (stack.sensitivity.scalar_type() == torch::kFloat) {
        update_loop<float>(stack, settings, context, scored ? of_stack.data_ptr<float>() : nullptr);
      } else {
        update_loop<double>(stack, settings, context, scored ? of_stack.data_ptr<double>() : nullptr);
      }
      if (scored) scores.push_back(of_stack);
    }
    return scores;
  }
  /// The scores of each stack's ranks.
  std::vector<Tensor> scores() const {
    std::vector<Tensor> result;
    for (const auto& stack : stacks_) result.push_back(stack.scores());
    return result;
  }
  void clear() {
    for (auto& stack : stacks_) {
      stack.sensitivity.zero_();
      stack.uncertainty.zero_();
    }
  }

  /// Views of what is kept of A, E or B of a piece: sensitivity and uncertainty.
  std::pair<Tensor, Tensor> of(size_t piece, Factor factor) const {
    const auto stack = std::find_if(stacks_.begin(), stacks_.end(), [piece](const auto& each) {
      return std::find(each.members.begin(), each.members.end(), piece) != each.members.end();
    });
    TORCH_INTERNAL_ASSERT(stack != stacks_.end(), "no piece ", piece);
    const auto slot = std::find(stack->members.begin(), stack->members.end(), piece) - stack->members.begin();
    return {stack->all(stack->sensitivity, factor)[slot], stack->all(stack->uncertainty, factor)[slot]};
  }

 private:
  static bool is_like(const Tensor& a, const Tensor& b) {
    return a.scalar_type() == b.scalar_type() && a.device() == b.device();
  }

  /// Makes the stacks anew from what the pieces' tensors are now, without importances.
  void arrange() {
    stacks_.clear();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      std::array<std::vector<int64_t>, 3> shapes;
      int64_t size = 0;
      for (const auto factor : all_factors) {
        const auto& tensor = factor_of(*pieces_[i], factor);
        shapes[static_cast<size_t>(factor)] = tensor.sizes().vec();
        size += tensor.numel();
      }
      const auto& A = pieces_[i]->lora_A;
      auto stack = std::find_if(stacks_.begin(), stacks_.end(), [&](const AdaLoraStack& other) {
        return other.shapes == shapes && is_like(pieces_[other.members.front()]->lora_A, A);
      });
      if (stack == stacks_.end()) stack = stacks_.insert(stack, {{}, shapes, {}, {}});
      stack->members.push_back(i);
      size *= static_cast<int64_t>(stack->members.size());
      stack->sensitivity = torch::zeros({size}, A.options().requires_grad(false));
      stack->uncertainty = torch::zeros_like(stack->sensitivity);
    }
  }

  /// `scores`: where those of the ranks go, zeros; null: nowhere.
  template <class T>
  void update_loop(const AdaLoraStack& stack, const ImportanceSettings& settings, const StepContext& context,
                   T* scores) const {
    const ImportanceConstants<T> constants(settings,
                                           context.clip.defined() ? context.clip.item<double>() : 1.0);
    // Keeps what has to be copied; addresses are all that the threads touch.
    std::vector<Tensor> copies;
    const auto address = [&copies](const Tensor& tensor) {
      copies.push_back(tensor.is_contiguous() ? tensor : tensor.contiguous());
      return copies.back().template data_ptr<T>();
    };
    struct Part {
      const T *value = nullptr, *gradient = nullptr;
      T *sensitivity, *uncertainty;
    };
    const size_t count = stack.members.size();
    std::array<std::vector<Part>, 3> parts;
    std::array<int64_t, 3> sizes;
    int64_t offset = 0;
    for (const auto factor : all_factors) {
      auto& of_factor = parts[static_cast<size_t>(factor)];
      auto& size = sizes[static_cast<size_t>(factor)];
      size = c10::multiply_integers(stack.shapes[static_cast<size_t>(factor)]);
      for (const auto i : stack.members) {
        of_factor.push_back({nullptr, nullptr, stack.sensitivity.data_ptr<T>() + offset,
                             stack.uncertainty.data_ptr<T>() + offset});
        offset += size;
        const auto& tensor = factor_of(*pieces_[i], factor);
        if (!context.has_gradient(tensor)) continue;
        of_factor.back().value = address(tensor);
        of_factor.back().gradient = address(tensor.grad());
      }
    }
    const auto ranks = stack.shapes[static_cast<size_t>(Factor::E)].front();
    const auto level = cpu_level();
    at::parallel_for(0, static_cast<int64_t>(count), /*grain_size=*/4, [&](int64_t begin, int64_t end) {
      std::vector<T> sums;
      for (int64_t i = begin; i < end; ++i) {
        // The order in which `scores` adds them.
        for (const auto factor : {Factor::A, Factor::B, Factor::E}) {
          const auto& part = parts[static_cast<size_t>(factor)][static_cast<size_t>(i)];
          const auto size = sizes[static_cast<size_t>(factor)];
          if (part.value != nullptr) {
            smooth_importance(level, part.value, part.gradient, part.sensitivity, part.uncertainty, size,
                              constants);
          }
          if (scores == nullptr || ranks == 0) continue;
          T* score = scores + i * ranks;
          // A's rows are ranks, B's columns; E has one value for each.
          const int64_t rows = factor == Factor::A ? ranks : 1, row = size / rows;
          for (int64_t k = 0; k < rows; ++k) {
            add_product_means(level, part.sensitivity + k * row, part.uncertainty + k * row, row,
                              factor == Factor::A ? 1 : ranks, score + k, sums);
          }
        }
      }
    });
  }

  void update_composed(const AdaLoraStack& stack, const ImportanceSettings& settings,
                       const StepContext& context) const {
    std::vector<Tensor> values, gradients;
    std::vector<int64_t> sizes;
    std::vector<bool> reached;
    for (const auto factor : all_factors) {
      for (const auto i : stack.members) {
        const auto& tensor = factor_of(*pieces_[i], factor);
        sizes.push_back(tensor.numel());
        reached.push_back(context.has_gradient(tensor));
        if (!reached.back()) continue;
        values.push_back(tensor.detach().reshape(-1));
        gradients.push_back(tensor.grad().reshape(-1));
      }
    }
    if (values.size() == sizes.size()) {
      smooth_importance(torch::cat(values), torch::cat(gradients), stack.sensitivity, stack.uncertainty,
                        settings, context.clip);
      return;
    }
    const auto sensitivity = stack.sensitivity.split_with_sizes(sizes),
               uncertainty = stack.uncertainty.split_with_sizes(sizes);
    for (size_t i = 0, k = 0; i < sizes.size(); ++i) {
      if (!reached[i]) continue;
      smooth_importance(values[k], gradients[k], sensitivity[i], uncertainty[i], settings, context.clip);
      ++k;
    }
  }

  Pieces pieces_;
  std::vector<AdaLoraStack> stacks_;
};

}  // namespace peft::internal
