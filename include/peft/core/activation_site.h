// ActivationSite: what sites without weights of their own have in common.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/site.h"

namespace peft::internal {

/// A site that offers activations, not weights: nothing to merge, nothing registered but adapters.
template <class Derived>
class ActivationSite : public SiteImpl {
 public:
  using SiteImpl::SiteImpl;

  std::unique_ptr<LayerView> base_view() const override {
    refuse("initialize");
    return nullptr;
  }
  Weights base_weights() const override { return {}; }
  Weights delta(const std::string&) const override { return refuse("effective_delta"); }
  Weights merged_weights(const std::vector<std::string>&) const override { return refuse("merge"); }
  void swap_in(const Weights&, std::vector<std::string>, bool) override { refuse("merge"); }
  void swap_out() override { refuse("unmerge"); }
  bool keeps_original() const override { return false; }
  torch::OrderedDict<std::string, Tensor> base_parameters() const override {
    return torch::OrderedDict<std::string, Tensor>();
  }

  std::shared_ptr<nn::Module> clone(const OptionalDevice& device = {}) const override {
    auto result = std::make_shared<Derived>(static_cast<const Derived&>(*this).options);
    result->copy_adapters_from(*this);
    if (device) result->to(*device);
    return result;
  }

 private:
  Weights refuse(const char* verb) const {
    TORCH_CHECK(false, verb, ": '", path(), "' works on activations and has no weights");
  }
  void clone_(nn::Module& other, const OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: '", path(), "' was registered as another kind of site");
    static_cast<Derived&>(*this) = *copy;
  }
};

}  // namespace peft::internal
