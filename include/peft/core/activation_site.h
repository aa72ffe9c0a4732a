// ActivationSite: what sites without weights of their own have in common.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/site.h"

namespace peft::internal {

/// What a piece sees where there is no layer.
class NoLayer : public LayerView {
 public:
  explicit NoLayer(std::string path) : path_(std::move(path)) {}
  Tensor forward(const Tensor&) const override { return refuse(); }
  Weights weights() const override { return {refuse(), {}}; }
  Tensor apply(const Tensor&, const Weights&) const override { return refuse(); }
  Tensor low_rank(const Tensor&, const Tensor&, const Tensor&) const override { return refuse(); }
  Tensor fold(const Tensor&) const override { return refuse(); }
  const LayerView& base() const override { return *this; }

 private:
  Tensor refuse() const {
    TORCH_CHECK(false, "'", path_, "' has no layer under it");
    return {};
  }
  std::string path_;
};

/// The refusal of a site whose pieces stand on each other only, in each row.
inline std::string stacks_only(const PieceTree& tree) {
  if (tree.empty()) return {};
  for (const auto block :
       {Composition::Block::fuse, Composition::Block::split, Composition::Block::average}) {
    if (tree.holds(block)) {
      return std::string(Composition::title(block)) +
             " is not defined for its methods (hint: Stack, Parallel and BatchSplit are)";
    }
  }
  return {};
}

/// A site that offers activations, not weights: nothing to merge, nothing registered but adapters.
template <class Derived>
class ActivationSite : public SiteImpl {
 public:
  using SiteImpl::SiteImpl;

  std::unique_ptr<LayerView> base_view() const override { return std::make_unique<NoLayer>(path()); }
  Weights base_weights() const override { return {}; }
  Weights delta(const std::string&) const override { return refuse("effective_delta"); }
  Weights merged_weights(const Composition&) const override { return refuse("merge"); }
  void swap_in(const Weights&, std::vector<std::string>, bool) override { refuse("merge"); }
  void swap_out() override { refuse("unmerge"); }
  bool keeps_original() const override { return false; }
  torch::OrderedDict<std::string, Tensor> base_parameters() const override {
    return torch::OrderedDict<std::string, Tensor>();
  }

  std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>> base_children() const override {
    return {};
  }

  void set_surroundings(torch::ScalarType dtype, torch::Device device) override {
    dtype_ = dtype;
    device_ = device;
  }

  std::shared_ptr<nn::Module> clone(const OptionalDevice& device = {}) const override {
    auto result = std::make_shared<Derived>(static_cast<const Derived&>(*this).options);
    result->set_surroundings(dtype_, device_);
    result->copy_adapters_from(*this);
    if (device) result->to(*device);
    return result;
  }

 protected:
  /// Of the tensors around the site.
  torch::ScalarType dtype_ = torch::kFloat32;
  torch::Device device_ = torch::kCPU;

 private:
  Weights refuse(const char* verb) const {
    TORCH_CHECK(false, verb, ": '", path(), "' works on activations and has no weights");
    return {};
  }
  void clone_(nn::Module& other, const OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: '", path(), "' was registered as another kind of site");
    static_cast<Derived&>(*this) = *copy;
  }
};

}  // namespace peft::internal
