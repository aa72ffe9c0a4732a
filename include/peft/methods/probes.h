// Probes: what methods that look at data before they train see of a model while it runs.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"

namespace peft::internal {

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
    for (const auto& site : sites_) site->detach(probe_name);
    if (!sites_.empty()) sites_.front()->activation()->set(before_);
    model_.train(mode_);
    for (size_t i = 0; i < modules_.size(); ++i) modules_[i]->train(modes_[i]);
  }
  Probes(const Probes&) = delete;
  Probes& operator=(const Probes&) = delete;

  void add(const std::shared_ptr<SiteImpl>& site, ProbeImpl::Run run) {
    add(site, std::make_shared<ProbeImpl>(site->info(), std::move(run)));
  }
  void add(const std::shared_ptr<SiteImpl>& site, std::shared_ptr<PieceImpl> piece) {
    site->attach({std::move(piece), std::make_shared<Origin>(), record_});
    if (sites_.empty()) {
      before_ = *site->activation()->get();
      site->activation()->set({Composition(probe_name), {probe_name}, {probe_name}, true});
    }
    sites_.push_back(site);
  }

 private:
  nn::Module& model_;
  bool mode_;
  std::vector<std::shared_ptr<nn::Module>> modules_;  ///< parents first, so that modes can be put back
  std::vector<bool> modes_;
  std::vector<std::shared_ptr<SiteImpl>> sites_;
  ActiveSet before_;
  std::shared_ptr<AdapterRecord> record_ = [] {
    auto record = std::make_shared<AdapterRecord>();
    record->name = probe_name;
    return record;
  }();
};

/// Takes one piece off its site and out of its adapter.
inline void remove_piece(const Adapter& adapter, const Adapter::Entry& gone) {
  auto attached = gone.site->pieces(adapter.name());
  gone.site->detach(adapter.name());
  for (auto& other : attached) {
    if (other.piece != gone.piece) gone.site->attach(std::move(other));
  }
  const auto& activation = gone.site->activation();
  activation->set(*activation->get());  // whose trees hold the piece
  auto entries = adapter.entries();
  std::erase_if(entries, [&](const Adapter::Entry& entry) { return entry.piece == gone.piece; });
  adapter.set_entries(std::move(entries));
}

}  // namespace peft::internal
