// What every method must pass on every layer kind it supports; a new method joins with one line.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/core/adapter.h"
#include "peft/core/residual.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/model/summary.h"
#include "peft/train/optimizer.h"

namespace suite {

using torch::Tensor;
namespace nn = torch::nn;

/// A layer kind: how to make a site of it, run it, and an input for it. Everything in double precision.
struct LayerCase {
  std::string name;
  std::function<std::shared_ptr<nn::Module>()> make;
  std::function<Tensor(nn::Module&, const Tensor&)> forward;
  Tensor input;
};

template <class Site, class... Arguments>
LayerCase layer(std::string name, Tensor input, Arguments... arguments) {
  if (input.is_floating_point()) input = input.to(torch::kFloat64);
  return {std::move(name),
          [=] {
            torch::manual_seed(1);
            Site site(arguments...);
            site->to(torch::kFloat64);
            return std::static_pointer_cast<nn::Module>(site.ptr());
          },
          [](nn::Module& module, const Tensor& x) -> Tensor {
            if constexpr (requires { module.as<typename Site::Impl>()->forward(x, x); }) {
              return module.as<typename Site::Impl>()->forward(x, torch::tanh(x));
            } else {
              return module.as<typename Site::Impl>()->forward(x);
            }
          },
          std::move(input)};
}

inline std::vector<LayerCase> layer_cases() {
  torch::manual_seed(7);
  const auto conv2d = [](int64_t in, int64_t out) { return nn::Conv2dOptions(in, out, 3); };
  return {
      layer<peft::Linear>("Linear", torch::randn({2, 5, 6}), 6, 4),
      layer<peft::Linear>("Linear without bias", torch::randn({5, 6}), nn::LinearOptions(6, 4).bias(false)),
      layer<peft::Embedding>("Embedding", torch::tensor({{0, 3, 4}, {2, 2, 6}}), 7, 5),
      // The padding row itself has no gradient, by definition.
      layer<peft::Embedding>("Embedding with padding", torch::tensor({{1, 3, 4}, {2, 2, 6}}),
                             nn::EmbeddingOptions(7, 5).padding_idx(0)),
      layer<peft::Conv1d>("Conv1d", torch::randn({2, 4, 9}), nn::Conv1dOptions(4, 6, 3).stride(2).padding(1)),
      layer<peft::Conv2d>("Conv2d", torch::randn({2, 4, 6, 5}), conv2d(4, 6).padding(1)),
      layer<peft::Conv2d>("Conv2d 1x1 without bias", torch::randn({2, 4, 3, 3}),
                          nn::Conv2dOptions(4, 6, 1).bias(false)),
      layer<peft::Conv2d>("Conv2d dilated, strided", torch::randn({2, 4, 9, 8}),
                          conv2d(4, 6).dilation(2).stride(2)),
      layer<peft::Conv2d>("Conv2d padded 'same'", torch::randn({2, 4, 6, 5}),
                          conv2d(4, 6).padding(torch::kSame)),
      layer<peft::Conv3d>("Conv3d", torch::randn({1, 4, 4, 5, 3}), nn::Conv3dOptions(4, 6, 2)),
  };
}

/// Layers that have weights but no low-rank form, and forms whose adapted path cannot be folded into the
/// weight.
inline std::vector<LayerCase> other_layer_cases() {
  torch::manual_seed(8);
  return {
      layer<peft::LayerNorm>("LayerNorm", torch::randn({3, 6}), nn::LayerNormOptions({6})),
      layer<peft::Residual>("Residual", torch::randn({2, 3, 6}), nn::LayerNormOptions({6})),
  };
}

inline bool always(const peft::SiteInfo&) { return true; }
inline bool never(const peft::SiteInfo&) { return false; }

/// What a method promises.
struct Promise {
  std::vector<peft::Part> parts;
  std::function<int64_t(const peft::SiteInfo&)> count;  ///< the paper's formula
  bool no_op_at_start = true;
  bool whole_gradient = true;  ///< false: the method takes a part of its formula for a constant
  std::function<bool(const peft::SiteInfo&)> merges = always;
};

inline double largest(const Tensor& a, const Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  return a.numel() ? (a - b).abs().max().item<double>() : 0.0;
}

/// Moves an adapter away from its start, so that it does something.
inline void shake(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : adapter.named_parameters()) tensor.add_(torch::randn_like(tensor), 0.3);
  adapter.accept_changes();
}

inline std::vector<Tensor> copies(const nn::Module& module) {
  std::vector<Tensor> values;
  for (const auto& parameter : module.parameters()) values.push_back(parameter.detach().clone());
  return values;
}

/// Central differences of sum(forward · weights) in every entry of every trainable tensor.
inline void check_gradients(const LayerCase& layer_case, nn::Module& site, const peft::Adapter& adapter) {
  const auto weights = torch::randn_like(layer_case.forward(site, layer_case.input).detach());
  const auto loss = [&] { return (layer_case.forward(site, layer_case.input) * weights).sum(); };
  for (auto& [name, tensor] : adapter.named_parameters()) tensor.mutable_grad() = Tensor();
  loss().backward();
  for (auto& [name, tensor] : adapter.named_parameters()) {
    INFO(name);
    REQUIRE(tensor.grad().defined());
    torch::NoGradGuard no_grad;
    auto flat = tensor.view(-1);
    const auto gradient = tensor.grad().contiguous().view(-1);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      const double value = flat[i].item<double>(), h = 1e-5;
      flat[i] = value + h;
      const auto up = loss().item<double>();
      flat[i] = value - h;
      const auto down = loss().item<double>();
      flat[i] = value;
      const auto numeric = (up - down) / (2 * h);
      REQUIRE(gradient[i].item<double>() == Approx(numeric).epsilon(1e-6).margin(1e-7));
    }
  }
  adapter.accept_changes();
}

/// Saves one module and loads the bytes into another.
inline void through_archive(const nn::Module& from, nn::Module& to) {
  torch::serialize::OutputArchive out;
  from.save(out);
  std::ostringstream bytes;
  out.save_to(bytes);
  std::istringstream again(bytes.str());
  torch::serialize::InputArchive in;
  in.load_from(again);
  to.load(in);
}

/// The property suite of one method on one layer kind.
inline void check_properties(const LayerCase& layer_case, const Promise& promise) {
  INFO(layer_case.name);
  auto site = layer_case.make();
  const auto& x = layer_case.input;
  const auto run = [&](nn::Module& module) { return layer_case.forward(module, x).detach(); };
  const auto plain = run(*site);
  const auto base = copies(*site);

  torch::manual_seed(3);
  auto adapter = peft::add_adapter(*site, promise.parts, "one");
  const auto info = adapter.entries().front().site->info();
  int64_t count = 0;
  std::set<const peft::SiteImpl*> counted;
  for (const auto& entry : adapter.entries()) {
    if (counted.insert(entry.site.get()).second) count += promise.count(entry.site->info());
  }
  CHECK(adapter.count() == count);
  CHECK(adapter.count() == peft::summary(*site).trainable);
  if (promise.no_op_at_start) CHECK(torch::equal(run(*site), plain));

  shake(adapter);
  const auto adapted = run(*site);
  CHECK(largest(adapted, plain) > 1e-3);

  // Only adapter tensors get gradients, each that trains does.
  layer_case.forward(*site, x).square().sum().backward();
  const auto is_ours = [](const std::string& key) { return ("." + key).find(".one.") != std::string::npos; };
  for (const auto& item : site->named_parameters()) {
    INFO(item.key());
    CHECK(item.value().requires_grad() == is_ours(item.key()));
    CHECK(item.value().grad().defined() == item.value().requires_grad());
  }
  if (promise.whole_gradient) check_gradients(layer_case, *site, adapter);

  // Off, the model is what it was, bit for bit.
  {
    const auto off = peft::disabled(*site);
    CHECK(torch::equal(run(*site), plain));
  }
  CHECK(torch::equal(run(*site), adapted));

  // Copies have the same output, their own tensors, the same frozen base.
  const auto copy = std::dynamic_pointer_cast<nn::Module>(site->clone());
  CHECK(torch::equal(run(*copy), adapted));
  for (const auto& item : copy->named_parameters()) {
    CHECK(item.value().requires_grad() == is_ours(item.key()));
  }
  shake(peft::adapter(*copy, "one"));
  CHECK(torch::equal(run(*site), adapted));
  CHECK(largest(run(*copy), adapted) > 0);

  // Archives: adapted → adapted, and plain → adapted.
  auto fresh = layer_case.make();
  peft::add_adapter(*fresh, promise.parts, "one");
  through_archive(*site, *fresh);
  CHECK(torch::equal(run(*fresh), adapted));
  auto expected = layer_case.make();
  peft::add_adapter(*expected, promise.parts, "one");
  through_archive(*site, *expected);
  auto other = layer_case.make();
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : other->parameters()) parameter.add_(0.1);
    for (auto& item : expected->named_parameters()) {
      if (!is_ours(item.key())) item.value().add_(0.1);
    }
  }
  through_archive(*other, *fresh);
  CHECK(torch::equal(run(*fresh), run(*expected)));

  // Merged alone, and after another adapter.
  const auto check_merge = [&](nn::Module& module) {
    const auto before = run(module);
    const auto originals = copies(module);
    peft::merge(module);
    CHECK(largest(run(module), before) < 1e-10);
    CHECK_THROWS_WITH(peft::merge(module), Contains("is merged (hint: unmerge first)"));
    CHECK_THROWS_WITH(peft::set_active(module, {}), Contains("unmerge first"));
    peft::unmerge(module);
    const auto after = copies(module);
    for (size_t i = 0; i < originals.size(); ++i) CHECK(torch::equal(originals[i], after[i]));
    CHECK(torch::equal(run(module), before));
  };
  if (promise.merges(info)) {
    check_merge(*site);
    auto below = layer_case.make();
    const auto first = info.fan_in.empty() || info.groups > 1  // whose LoRA cannot be merged
                           ? peft::on(peft::ReplaceOptions(), peft::all())
                           : peft::on(peft::LoraOptions(2).init(peft::LoraInit::random), peft::all());
    shake(peft::add_adapter(*below, {first}, "first"));
    shake(peft::add_adapter(*below, promise.parts, "one"));
    check_merge(*below);
  } else {
    CHECK_THROWS_WITH(peft::merge(*site), Contains("cannot be merged"));
  }

  // The base has not changed.
  size_t i = 0;
  for (const auto& item : site->named_parameters()) {
    if (!is_ours(item.key())) CHECK(torch::equal(item.value(), base.at(i++)));
  }
  CHECK(i == base.size());
}

}  // namespace suite
