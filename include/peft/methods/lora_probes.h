// Probes: what the starts of LoRA that need data see of a model while it runs.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/methods/lora.h"

namespace peft {
namespace internal {

/// Looks at a layer's input on its way, or runs the layer with a weight of its own.
class ProbeImpl final : public PieceImpl {
 public:
  using Run = std::function<Tensor(const Tensor&, const LayerView&)>;
  ProbeImpl(SiteInfo site, Run run) : PieceImpl("probe", std::move(site)), run_(std::move(run)) {}

  Tensor forward(const Tensor& x, const LayerView& layer) override { return run_(x, layer); }
  Weights effective(const Weights& weights, const LayerView&) const override { return weights; }
  void initialize(const LayerView&) override {}
  std::shared_ptr<PieceImpl> copy() const override { return std::make_shared<ProbeImpl>(site(), run_); }

 private:
  Run run_;
};

/// While it lives, the model runs without any adapter, in the given mode, with probes on some of its sites.
class Probes {
 public:
  Probes(nn::Module& model, bool training)
      : model_(model), mode_(model.is_training()), modules_(model.modules(/*include_self=*/false)) {
    for (const auto& module : modules_) modes_.push_back(module->is_training());
    model.train(training);
  }
  ~Probes() {
    for (const auto& site : sites_) site->detach(name);
    if (!sites_.empty()) sites_.front()->activation()->set(before_);
    model_.train(mode_);
    for (size_t i = 0; i < modules_.size(); ++i) modules_[i]->train(modes_[i]);
  }
  Probes(const Probes&) = delete;
  Probes& operator=(const Probes&) = delete;

  void add(const std::shared_ptr<SiteImpl>& site, ProbeImpl::Run run) {
    auto piece = std::make_shared<ProbeImpl>(site->info(), std::move(run));
    site->attach({std::move(piece), std::make_shared<Origin>(), record_});
    if (sites_.empty()) {
      before_ = *site->activation()->get();
      site->activation()->set({{name}, {name}, true});
    }
    sites_.push_back(site);
  }

 private:
  static constexpr const char* name = "lora_data_init";
  nn::Module& model_;
  bool mode_;
  std::vector<std::shared_ptr<nn::Module>> modules_;  ///< parents first, so that modes can be put back
  std::vector<bool> modes_;
  std::vector<std::shared_ptr<SiteImpl>> sites_;
  ActiveSet before_;
  std::shared_ptr<AdapterRecord> record_ = [] {
    auto record = std::make_shared<AdapterRecord>();
    record->name = name;
    return record;
  }();
};

/// A LoRA that waits for its start.
struct Waiting {
  Adapter::Entry entry;
  std::shared_ptr<LoraImpl> lora;

  const std::string& path() const { return entry.site->path(); }
  /// The untouched weight as (out, in), float32 on the CPU.
  Tensor weight() const {
    const auto W = entry.site->base_view()->weights().weight.detach().to(torch::kCPU, torch::kFloat32);
    return lora->site().fan_in_fan_out ? W.t() : W;
  }
};

/// The pieces of an adapter that were added with this start: LoRAs, or those within another method's pieces.
inline std::vector<Waiting> waiting_for(LoraInit init, const Adapter& adapter, const std::string& title) {
  std::vector<Waiting> found;
  for (const auto& entry : adapter.entries()) {
    auto candidates = entry.piece->modules(/*include_self=*/false);
    candidates.insert(candidates.begin(), entry.piece);
    for (const auto& module : candidates) {
      const auto lora = std::dynamic_pointer_cast<LoraImpl>(module);
      const bool fits = lora && !lora->site().lookup && lora->site().fan_in.size() == 1;
      if (fits && lora->options.init() == init) found.push_back({entry, lora});
    }
  }
  TORCH_CHECK_VALUE(!found.empty(), title, ": adapter '", adapter.name(),
                    "' has no LoRA on a linear layer that was added with LoraOptions::init(LoraInit::",
                    to_string(init), ")");
  TORCH_CHECK(!adapter.record().has_optimizer, title, ": adapter '", adapter.name(),
              "' already has an optimizer (hint: call ", title, " first)");
  for (const auto& one : found) {
    TORCH_CHECK(!one.entry.site->is_merged(), title, ": '", one.path(), "' is merged (hint: unmerge first)");
  }
  return found;
}

}  // namespace internal
}  // namespace peft
