// load_loralib: reads what Microsoft's loralib saves.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/pattern.h"
#include "peft/core/problems.h"
#include "peft/io/pickle.h"
#include "peft/io/safetensors.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"

namespace peft {

/// What a file of loralib does not say of its adapter.
struct LoralibOptions {
  explicit LoralibOptions(double alpha) : alpha_(alpha) {}

  /// `lora_alpha` of the layers; loralib's own default is 1.
  TORCH_ARG(double, alpha);
  /// Other α for some layers: the first regular expression that matches the path, or what follows a dot in
  /// it.
  TORCH_ARG(std::vector<Pattern<double>>, alpha_pattern) = {};
  /// `enable_lora` of the `MergedLinear` layers; needed where there are any.
  TORCH_ARG(std::vector<bool>, enable) = {};
};

namespace internal {

/// A loralib state dict, sorted by layer.
class LoralibFile {
 public:
  struct Factors {
    Tensor A, B;
  };

  LoralibFile(const std::filesystem::path& file, LoralibOptions options, Problems& problems)
      : options_(std::move(options)) {
    const auto tensors = file.extension() == ".safetensors" ? load_safetensors(file) : load_pickle(file);
    for (const auto& [key, tensor] : tensors) {
      const auto dot = key.rfind('.');
      const auto path = dot == std::string::npos ? "" : key.substr(0, dot);
      const auto name = dot == std::string::npos ? key : key.substr(dot + 1);
      if (!tensor.is_floating_point()) {
        problems.add("'" + key + "' must be of a floating type, but got " +
                     c10::toString(tensor.scalar_type()));
      } else if (name == "bias") {
        biases_.emplace(path, tensor);
      } else if (name != "lora_A" && name != "lora_B") {
        problems.add("'" + key +
                     "' must be a lora_A, a lora_B or a bias, as loralib.lora_state_dict writes them");
      } else if (tensor.dim() != 2 || tensor.numel() == 0) {
        problems.add("'" + key + "' must be a matrix, but has shape " + shape_text(tensor.sizes()));
      } else {
        (name == "lora_A" ? factors_[path].A : factors_[path].B) = tensor;
      }
    }
    for (const auto& [path, pair] : factors_) {
      if (!pair.A.defined()) problems.add("'" + at(path) + "lora_A' is missing");
      if (!pair.B.defined()) problems.add("'" + at(path) + "lora_B' is missing");
    }
    if (factors_.empty()) problems.add("it holds no lora_A and lora_B");
  }

  const std::map<std::string, Factors>& factors() const { return factors_; }
  const std::map<std::string, Tensor>& biases() const { return biases_; }

  /// The options of one layer's LoRA.
  LoraOptions options(const SiteInfo& site) const {
    const auto& [A, B] = factors_.at(site.path);
    LoraOptions lora(B.size(1));
    lora.alpha(options_.alpha()).alpha_pattern(options_.alpha_pattern());
    return merged(site) ? lora.enable(options_.enable()) : lora;
  }

  /// Why a layer cannot have the factors that are there for it, or an empty string.
  std::string refusal(const SiteInfo& site) const {
    const auto& [A, B] = factors_.at(site.path);
    if (site.fan_in.size() > 1) {
      return "a " + site.layer + " has other factors in loralib than here, and cannot be converted";
    }
    if (merged(site) && options_.enable().empty()) {
      return "lora_A has shape " + shape_text(A.sizes()) + " and lora_B " + shape_text(B.sizes()) +
             ", which a layer of " + std::to_string(site.fan_out) +
             " outputs has with several blocks only (hint: LoralibOptions::enable, as `enable_lora` of "
             "MergedLinear)";
    }
    const auto lora = options(site);
    const auto why = peft::refusal(lora, site);
    if (!why.empty()) return why;
    const LoraImpl piece(lora, site);
    if (A.sizes() == piece.lora_A.sizes() && B.sizes() == piece.lora_B.sizes()) return {};
    return "expected lora_A " + shape_text(piece.lora_A.sizes()) + " and lora_B " +
           shape_text(piece.lora_B.sizes()) + ", but got " + shape_text(A.sizes()) + " and " +
           shape_text(B.sizes());
  }

  static std::string at(const std::string& path) { return path.empty() ? "" : path + "."; }

 private:
  /// True for the factors of a MergedLinear.
  bool merged(const SiteInfo& site) const {
    const auto& [A, B] = factors_.at(site.path);
    return A.size(0) != B.size(1) || B.size(0) != site.fan_out;
  }

  LoralibOptions options_;
  std::map<std::string, Factors> factors_;
  std::map<std::string, Tensor> biases_;
};

}  // namespace internal

/// Reads what `torch.save(loralib.lora_state_dict(model, bias=…), file)` wrote, or the same as safetensors,
/// and puts it on the model as LoRA, frozen unless it is to train on: loralib's Linear, MergedLinear and
/// Embedding, with biases as they were saved. Ranks follow from the shapes; the file does not say α. Draws
/// nothing.
///
/// Throws: c10::ValueError listing all problems, the model unchanged: keys that are none of loralib's, layers
/// that are not there or have other shapes, convolutions (another method in loralib), what `add_adapter`
/// throws.
///
/// Example:
/// ```
/// const auto options = peft::LoralibOptions(32).enable({true, false, true});
/// auto adapter = peft::load_loralib(*model, "gpt2_lora.pt", options);
/// ```
inline Adapter load_loralib(nn::Module& model, const std::filesystem::path& file,
                            const LoralibOptions& options, const std::string& name = "default",
                            bool trainable = false) {
  using namespace internal;
  torch::NoGradGuard no_grad;
  const auto title = "load_loralib: '" + file.string() + "'";
  Problems problems;
  const LoralibFile read(file, options, problems);
  problems.raise(title);

  auto lora =
      on(LoraOptions().alpha(options.alpha()).alpha_pattern(options.alpha_pattern()).enable(options.enable()),
         where([&](const SiteInfo& site) { return read.factors().count(site.path) > 0; }));
  std::map<std::string, std::string> refused;
  lora.refusal = [&](const SiteInfo& site) {
    if (!read.factors().count(site.path)) return std::string("no factors");
    auto why = read.refusal(site);
    if (!why.empty()) refused[site.path] = why;
    return why;
  };
  lora.make = [&](const SiteInfo& site) { return make_piece(read.options(site), site); };
  std::vector<Part> parts{lora};
  if (!read.biases().empty()) {
    parts.push_back(
        on(BiasOptions(), where([&](const SiteInfo& site) { return read.biases().count(site.path) > 0; })));
  }
  Problems unplanned;
  auto plan = plan_adapter(model, parts, name, /*extends=*/false, unplanned);
  for (const auto& [path, why] : refused) problems.add("'" + path + "': " + why);
  if (problems.empty()) problems.add(unplanned);
  problems.raise(title);

  std::vector<std::string> paths;
  for (const auto& node : plan.nodes) paths.push_back(node.path);
  const auto must_be_there = [&](const std::string& path, const std::string& method) {
    const bool found =
        std::any_of(plan.entries.begin(), plan.entries.end(), [&](const Adapter::Entry& entry) {
          return entry.site->path() == path && entry.piece->method() == method;
        });
    if (found) return;
    const bool known = std::find(paths.begin(), paths.end(), path) != paths.end();
    problems.add("'" + path + "' has a " + method + " in the file, but " +
                 (known
                      ? "cannot take one (hint: declare it as peft::Linear, peft::Embedding, … in its parent)"
                      : "the model has no such layer; closest: " + closest(path, paths)));
  };
  for (const auto& item : read.factors()) must_be_there(item.first, LoraOptions::method);
  for (const auto& item : read.biases()) must_be_there(item.first, BiasOptions::method);
  for (const auto& entry : plan.entries) {
    const auto bias = std::dynamic_pointer_cast<BiasImpl>(entry.piece);
    if (!bias) continue;
    const auto& given = read.biases().at(entry.site->path());
    if (given.sizes() != bias->bias.sizes()) {
      problems.add("'" + LoralibFile::at(entry.site->path()) + "bias' expected shape " +
                   shape_text(bias->bias.sizes()) + ", but got " + shape_text(given.sizes()));
    }
  }
  problems.raise(title);

  plan.place();
  for (const auto& entry : plan.entries) {
    if (const auto piece = std::dynamic_pointer_cast<LoraImpl>(entry.piece)) {
      piece->lora_A.copy_(read.factors().at(entry.site->path()).A);
      piece->lora_B.copy_(read.factors().at(entry.site->path()).B);
    } else {
      std::static_pointer_cast<BiasImpl>(entry.piece)->bias.copy_(read.biases().at(entry.site->path()));
    }
  }
  const Adapter adapter(make_record(model, name));
  commit(plan, adapter, trainable);
  return adapter;
}

}  // namespace peft
