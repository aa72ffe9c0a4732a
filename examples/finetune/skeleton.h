// Skeleton: a model of the layers that some adapters' folders speak of, without their weights.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapted.h"
#include "peft/io/peft_tensors.h"
#include "peft/io/pickle.h"
#include "peft/io/safetensors.h"

namespace finetune {

/// Gathers what the tensors of adapters say of the shapes of the layers they belong to, and builds sites of
/// these shapes, in the order of their names (numbers in them by value). Weights are zeros that take no
/// memory, but where a file brings the base's own (PEFT saves embeddings so).
class Skeleton {
 public:
  /// Reads the shapes in an adapter's folder. `name`: what messages call it.
  /// Throws: c10::Error where its tensors cannot be read; std::runtime_error naming the first layer that has
  /// another shape in a folder read before.
  void add(const std::filesystem::path& folder, const std::string& name) {
    std::map<std::string, Tensors> layers;
    for (const auto& [key, tensor] : read(folder)) {
      wide_ = wide_ || tensor.scalar_type() == torch::kFloat64;
      const auto [path, part] = split(key);
      if (!path.empty()) layers[path].emplace(part, tensor);
    }
    for (const auto& [path, tensors] : layers) {
      auto said = shape_of(tensors);
      const auto [known, fresh] = layers_.emplace(path, said);
      if (fresh) {
        known->second.from = name;
      } else if (!known->second.agree(said)) {
        throw std::runtime_error(
            fmt::format("'{}' is {} in '{}', but {} in '{}' (hint: adapters of one base)", path,
                        known->second.text(), known->second.from, said.text(), name));
      }
    }
  }

  /// A module whose children are the layers, under their paths.
  std::shared_ptr<torch::nn::Module> build() const {
    const auto root = std::make_shared<Folder>();
    std::vector<std::string> paths;
    for (const auto& [path, layer] : layers_) paths.push_back(path);
    std::sort(paths.begin(), paths.end(), comes_before);
    for (const auto& path : paths) {
      auto folder = root;
      size_t begin = 0;
      for (auto dot = path.find('.'); dot != std::string::npos; dot = path.find('.', begin)) {
        folder = folder->subfolder(path.substr(begin, dot - begin));
        begin = dot + 1;
      }
      folder->put(path.substr(begin), site(layers_.at(path)));
    }
    if (wide_) root->to(torch::kFloat64);
    return root;
  }

 private:
  using Tensor = torch::Tensor;
  using Tensors = std::map<std::string, Tensor>;  ///< of one layer, by what follows its path

  class Folder : public torch::nn::Module {
   public:
    std::shared_ptr<Folder> subfolder(const std::string& name) {
      if (named_children().contains(name)) {
        if (auto found = std::dynamic_pointer_cast<Folder>(named_children()[name])) return found;
        throw std::runtime_error(fmt::format("'{}' cannot be a layer and hold layers", name));
      }
      return register_module(name, std::make_shared<Folder>());
    }
    void put(const std::string& name, std::shared_ptr<torch::nn::Module> module) {
      register_module(name, std::move(module));
    }
  };

  /// A layer as far as tensors tell; 0 for what they do not.
  struct Layer {
    bool lookup = false, bias = false;
    std::vector<int64_t> fan_in;  ///< inputs and a convolution's kernel; empty of a norm
    int64_t fan_out = 0, groups = 1;
    Tensor weight;  ///< the base's own, where the file has it
    std::string from;

    /// Takes over what the other knows besides. False where they contradict each other.
    bool agree(const Layer& other) {
      const auto settle = [](int64_t& mine, int64_t theirs) {
        if (mine == 0) mine = theirs;
        return theirs == 0 || mine == theirs;
      };
      if (fan_in.empty()) {
        fan_in = other.fan_in;
        lookup = other.lookup;
        groups = other.groups;
      }
      bool same = settle(fan_out, other.fan_out);
      if (!other.fan_in.empty()) {
        same =
            same && lookup == other.lookup && groups == other.groups && fan_in.size() == other.fan_in.size();
        for (size_t i = 0; same && i < fan_in.size(); ++i) same = settle(fan_in[i], other.fan_in[i]);
      }
      bias = bias || other.bias;
      if (!weight.defined()) weight = other.weight;
      return same;
    }
    std::string text() const {
      const auto shown = [](int64_t size) { return size ? std::to_string(size) : std::string("?"); };
      const std::string kind = lookup               ? "an embedding"
                               : fan_in.empty()     ? "a norm"
                               : fan_in.size() == 1 ? "linear"
                                                    : "a convolution";
      std::string inputs;
      for (const auto size : fan_in) inputs += (inputs.empty() ? "" : " × ") + shown(size);
      return fmt::format("{} ({} → {})", kind, inputs, shown(fan_out));
    }
  };

  static std::map<std::string, Tensor> read(const std::filesystem::path& folder) {
    std::error_code ignored;
    const auto file = folder / peft::internal::tensor_file_name;
    if (std::filesystem::exists(file, ignored)) return peft::load_safetensors(file);
    return peft::load_pickle(folder / peft::internal::pickle_file_name);
  }

  /// (path, part) of a key: "a.b.lora_A.weight" is ("a.b", "lora_A"), with an adapter's name in it too. Both
  /// empty for a copy that Python saves besides.
  static std::pair<std::string, std::string> split(std::string key) {
    if (key.find(".modules_to_save.") != std::string::npos ||
        key.find(".original_module.") != std::string::npos)
      return {};
    if (key.starts_with(peft::internal::model_prefix)) key.erase(0, peft::internal::model_prefix.size());
    for (const char* part : {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "ia3_l"}) {
      const auto at = key.rfind("." + std::string(part));
      if (at == std::string::npos) continue;
      const bool bias = key.ends_with(".bias");
      return {key.substr(0, at), std::string(part) + (bias ? ".bias" : "")};
    }
    const auto dot = key.rfind('.');
    if (dot == std::string::npos) return {};
    auto path = key.substr(0, dot);
    const std::string level = ".base_layer";
    if (path.ends_with(level)) path.erase(path.size() - level.size());
    return {path, key.substr(dot + 1)};
  }

  static Layer shape_of(const Tensors& tensors) {
    Layer layer;
    const auto part = [&](const char* name) {
      const auto found = tensors.find(name);
      return found == tensors.end() ? Tensor() : found->second;
    };
    const auto sizes_after_first = [](const Tensor& t) {
      return std::vector<int64_t>(t.sizes().begin() + 1, t.sizes().end());
    };
    const auto A = part("lora_A"), B = part("lora_B");
    const auto rows = part("lora_embedding_A"), columns = part("lora_embedding_B");
    // One factor alone is an error that load_adapter words; here it is a layer all the same.
    const bool has_A = A.defined() && A.dim() >= 2, has_B = B.defined() && B.dim() >= 2;
    if (has_A || has_B) {
      layer.fan_in = has_A ? sizes_after_first(A) : std::vector<int64_t>(static_cast<size_t>(B.dim()) - 1);
      if (has_B) layer.fan_out = B.size(0);
      if (has_A && has_B) layer.groups = std::max<int64_t>(1, A.size(0) / std::max<int64_t>(1, B.size(1)));
    } else if (rows.defined() || columns.defined()) {
      layer.lookup = true;
      layer.fan_in = {rows.defined() && rows.dim() == 2 ? rows.size(1) : 0};
      if (columns.defined() && columns.dim() == 2) layer.fan_out = columns.size(0);
    } else if (const auto l = part("ia3_l"); l.defined() && l.dim() == 2) {
      layer.fan_in = {l.size(0) == 1 ? l.size(1) : 0};
      layer.fan_out = l.size(1) == 1 ? l.size(0) : 0;
    } else if (l.defined() && l.dim() > 2) {
      layer.fan_in.assign(static_cast<size_t>(l.dim()) - 1, 1);
      layer.fan_in.front() = layer.fan_out = l.size(1);
    }
    layer.weight = part("weight");
    if (layer.weight.defined() && layer.weight.dim() > 0 && layer.fan_out == 0) {
      layer.fan_out = layer.weight.size(0);
      if (layer.weight.dim() > 1) layer.fan_in = sizes_after_first(layer.weight);
    }
    const auto bias = part("bias");
    layer.bias = bias.defined() || part("lora_B.bias").defined();
    if (bias.defined() && layer.fan_out == 0) layer.fan_out = bias.numel();
    return layer;
  }

  static std::shared_ptr<torch::nn::Module> site(const Layer& layer) {
    namespace nn = torch::nn;
    auto in = layer.fan_in;
    for (auto& size : in) size = std::max<int64_t>(1, size);
    const auto out = std::max<int64_t>(1, layer.fan_out);
    const auto with_weight = [&](auto base, std::vector<int64_t> shape) {
      base->weight.set_data(layer.weight.defined() && layer.weight.sizes() == shape
                                ? layer.weight.to(torch::kFloat32)
                                : torch::zeros({}).expand(shape));
      return peft::Adapted(base).ptr();
    };
    const auto set_bias = [&](auto& base) {
      if (layer.bias) base->bias.set_data(torch::zeros({out}));
    };
    if (in.empty()) return peft::Adapted(nn::LayerNorm(nn::LayerNormOptions({out}))).ptr();
    if (layer.lookup) return with_weight(nn::Embedding(1, 1), {in[0], out});
    if (in.size() == 1) {
      nn::Linear base(nn::LinearOptions(1, 1).bias(layer.bias));
      set_bias(base);
      return with_weight(base, {out, in[0]});
    }
    const auto convolution =
        [&]<size_t dims>(std::integral_constant<size_t, dims>) -> std::shared_ptr<nn::Module> {
      std::vector<int64_t> kernel(in.begin() + 1, in.end());
      const auto options = nn::ConvOptions<dims>(in[0], out, torch::ExpandingArray<dims>(kernel))
                               .groups(layer.groups)
                               .bias(layer.bias);
      if constexpr (dims == 1) return peft::Conv1d(nn::Conv1d(options)).ptr();
      if constexpr (dims == 2) return peft::Conv2d(nn::Conv2d(options)).ptr();
      if constexpr (dims == 3) return peft::Conv3d(nn::Conv3d(options)).ptr();
    };
    if (in.size() == 2) return convolution(std::integral_constant<size_t, 1>());
    if (in.size() == 3) return convolution(std::integral_constant<size_t, 2>());
    if (in.size() == 4) return convolution(std::integral_constant<size_t, 3>());
    throw std::runtime_error(fmt::format("a layer of {} axes is none this program knows", in.size() + 1));
  }

  /// "layer.2" before "layer.10".
  static bool comes_before(const std::string& a, const std::string& b) {
    const auto digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
    size_t i = 0, j = 0;
    while (i < a.size() && j < b.size()) {
      if (digit(a[i]) && digit(b[j])) {
        size_t end_a = i, end_b = j;
        while (end_a < a.size() && digit(a[end_a])) ++end_a;
        while (end_b < b.size() && digit(b[end_b])) ++end_b;
        const auto number_a = a.substr(i, end_a - i), number_b = b.substr(j, end_b - j);
        if (number_a.size() != number_b.size()) return number_a.size() < number_b.size();
        if (number_a != number_b) return number_a < number_b;
        i = end_a;
        j = end_b;
      } else {
        if (a[i] != b[j]) return a[i] < b[j];
        ++i;
        ++j;
      }
    }
    return a.size() - i < b.size() - j;
  }

  std::map<std::string, Layer> layers_;
  bool wide_ = false;
};

}  // namespace finetune
