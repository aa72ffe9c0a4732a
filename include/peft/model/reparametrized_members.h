// ReparametrizedMembers: where modules keep the tensors that they register, LibTorch's layers and others.
#pragma once

#include <torch/nn/functional/instancenorm.h>  // which LibTorch 1.13's module needs
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/instancenorm.h>
#include <torch/nn/modules/rnn.h>

#include <algorithm>
#include <concepts>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/parameter_site.h"

namespace peft {

/// Where the modules of a class keep a tensor that they register as a parameter: in the member that their
/// forward reads. Made by `member`.
struct Member {
  /// Finds the member in a module, or a copy of it; nullptr in one of another class.
  using Find = std::function<Tensor*(nn::Module&)>;

  std::string name;  ///< the tensor is registered under
  Find find;
};

/// The member in which modules of a class keep the parameter that they register as `name`. Example:
/// `peft::member("gate", &GateImpl::gate)`.
template <std::derived_from<nn::Module> Module>
Member member(std::string name, Tensor Module::*tensor) {
  return {std::move(name), [tensor](nn::Module& module) -> Tensor* {
            auto* own = dynamic_cast<Module*>(&module);
            return own ? &(own->*tensor) : nullptr;
          }};
}

namespace internal {

/// The members of LibTorch's layers.
inline const std::vector<Member>& layer_members() {
  using Attention = nn::MultiheadAttentionImpl;
  static const auto members = [] {
    std::vector<Member> list{member("in_proj_weight", &Attention::in_proj_weight),
                             member("in_proj_bias", &Attention::in_proj_bias),
                             member("q_proj_weight", &Attention::q_proj_weight),
                             member("k_proj_weight", &Attention::k_proj_weight),
                             member("v_proj_weight", &Attention::v_proj_weight),
                             member("weight", &nn::EmbeddingImpl::weight)};
    const auto with_bias = [&]<class... Layers>(std::tuple<Layers...>*) {
      (list.insert(list.end(), {member("weight", &Layers::weight), member("bias", &Layers::bias)}), ...);
    };
    with_bias(static_cast<
              std::tuple<nn::LinearImpl, nn::Conv1dImpl, nn::Conv2dImpl, nn::Conv3dImpl, nn::LayerNormImpl,
                         nn::GroupNormImpl, nn::BatchNorm1dImpl, nn::BatchNorm2dImpl, nn::BatchNorm3dImpl,
                         nn::InstanceNorm1dImpl, nn::InstanceNorm2dImpl, nn::InstanceNorm3dImpl>*>(nullptr));
    const auto cells = [&]<class... Cells>(std::tuple<Cells...>*) {
      (list.insert(list.end(),
                   {member("weight_ih", &Cells::weight_ih), member("weight_hh", &Cells::weight_hh),
                    member("bias_ih", &Cells::bias_ih), member("bias_hh", &Cells::bias_hh)}),
       ...);
    };
    cells(static_cast<std::tuple<nn::RNNCellImpl, nn::LSTMCellImpl, nn::GRUCellImpl>*>(nullptr));
    return list;
  }();
  return members;
}

/// Reaches the list of tensors that a recurrent layer passes to its function, in the order of registration.
template <class Layer>
struct OpenRecurrent : Layer {
  static auto flat_weights() { return &OpenRecurrent::flat_weights_; }
};

/// Where a recurrent layer reads the tensor it registered as `name`; empty for another module.
template <class... Layers>
Member::Find recurrent_member(const nn::Module& module, const std::string& name) {
  const bool recurrent = ((dynamic_cast<const Layers*>(&module) != nullptr) || ...);
  if (!recurrent) return {};
  const auto names = module.named_parameters(/*recurse=*/false).keys();
  const auto index = static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
  return [index](nn::Module& of) -> Tensor* {
    Tensor* tensor = nullptr;
    const auto attempt = [&]<class Layer>(Layer*) {
      if (auto* layer = dynamic_cast<Layer*>(&of)) {
        tensor = &(layer->*OpenRecurrent<Layer>::flat_weights())[index];
      }
    };
    (attempt(static_cast<Layers*>(nullptr)), ...);
    return tensor;
  };
}

}  // namespace internal
}  // namespace peft
