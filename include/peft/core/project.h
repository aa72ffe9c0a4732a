// Project: linear layers that share an input, run together.
#pragma once

#include <array>
#include <cstddef>
#include <utility>
#include <vector>

#include "peft/core/adapted.h"
#include "peft/kernels/low_rank_linear.h"

namespace peft {

/// The outputs of linear sites on one input, in the sites' order: what `site->forward(x)` of each gives.
/// Where every site has one low-rank piece or none and its layer is frozen, all run as one node of the
/// autograd graph: x is saved once and read once for all the updates, and its gradient is written in place
/// instead of added up. Otherwise (other methods, several adapters on a site, mixed batches, trained layers)
/// each site runs by itself. For the attention of a model:
/// ```
/// const auto [q, k, v] = peft::project(x, query, key, value);
/// ```
template <class... Layers>
std::array<Tensor, sizeof...(Layers)> project(const Tensor& x, Adapted<Layers>&... sites) {
  if (FastPaths::enabled()) {
    std::vector<internal::LowRankLinear> layers;
    layers.reserve(sizeof...(Layers));
    const auto add = [&layers](const auto& site) {
      auto layer = site->low_rank();
      if (layer) layers.push_back(std::move(*layer));
      return layer.has_value();
    };
    if ((add(sites) && ...)) {
      if (const auto outputs = internal::low_rank_linear(x, layers)) {
        size_t next = 0;
        return {(static_cast<void>(sites), (*outputs)[next++])...};
      }
    }
  }
  return {sites->forward(x)...};
}

}  // namespace peft
