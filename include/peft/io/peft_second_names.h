// PEFT second names: tensors that Hugging Face's model has under another name than ours, or under two.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/described.h"

namespace peft::internal {

/// The key of a tensor under its second name, where `key` may be that of its own; else an empty string.
inline std::string second_key(std::string key, const SecondName& names) {
  constexpr std::string_view level = "base_layer.";
  if (const auto at = key.rfind(level); at != std::string::npos) key.erase(at, level.size());
  if (!key.ends_with("." + names.own)) return {};
  return key.substr(0, key.size() - names.own.size()) + names.second;
}

/// Puts what stands under a tensor's own name under the second one too, or there alone.
inline void add_second_name(std::vector<std::pair<std::string, Tensor>>& tensors, const SecondName& names) {
  for (size_t i = 0, count = tensors.size(); i < count; ++i) {
    const auto key = second_key(tensors[i].first, names);
    if (key.empty()) continue;
    if (names.kind == SecondName::Kind::only) {
      tensors[i].first = key;
    } else {
      tensors.emplace_back(key, tensors[i].second);
    }
  }
}

}  // namespace peft::internal
