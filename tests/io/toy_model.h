// Toy and Rare: small models with every kind of layer the file tests need; tests/reference/compare_peft.py
// and compare_methods.py have their twins.
#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>

#include <string>

#include "peft/core/adapted.h"
#include "peft/core/parameter_site.h"
#include "peft/model/reparametrized.h"

namespace peft_test {

/// A block of an encoder.
struct ToyBlockImpl : torch::nn::Cloneable<ToyBlockImpl> {
  ToyBlockImpl() { ToyBlockImpl::reset(); }
  void reset() override {
    fc = register_module("fc", peft::Linear(8, 6));
    out = register_module("out", peft::Linear(6, 8));
  }
  torch::Tensor forward(const torch::Tensor& x) { return x + out->forward(fc->forward(x).tanh()); }
  peft::Linear fc{nullptr}, out{nullptr};
};
TORCH_MODULE(ToyBlock);

/// Blocks under `encoder.blocks.N`.
struct ToyEncoderImpl : torch::nn::Cloneable<ToyEncoderImpl> {
  ToyEncoderImpl() { ToyEncoderImpl::reset(); }
  void reset() override {
    blocks = register_module("blocks", torch::nn::ModuleList());
    for (int i = 0; i < 3; ++i) blocks->push_back(ToyBlock());
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& block : *blocks) x = block->as<ToyBlock>()->forward(x);
    return x;
  }
  torch::nn::ModuleList blocks{nullptr};
};
TORCH_MODULE(ToyEncoder);

/// (batch, time) of ids below 10 → (batch, 3).
struct ToyImpl : torch::nn::Cloneable<ToyImpl>, peft::Described {
  ToyImpl() { ToyImpl::reset(); }
  void reset() override {
    emb = register_module("emb", peft::Embedding(10, 8));
    q = register_module("q", peft::Linear(8, 8));
    v = register_module("v", peft::Linear(8, 8));
    ln = register_module("ln", peft::LayerNorm(torch::nn::LayerNormOptions({8})));
    encoder = register_module("encoder", ToyEncoder());
    mlp = register_module(
        "mlp", torch::nn::Sequential(torch::nn::Linear(8, 8), torch::nn::Tanh(), torch::nn::Linear(8, 8)));
    conv1 = register_module("conv1", peft::Conv1d(torch::nn::Conv1dOptions(8, 6, 3).padding(1)));
    conv = register_module("conv", peft::Conv2d(torch::nn::Conv2dOptions(2, 4, 3).padding(1)));
    conv3 = register_module("conv3", peft::Conv3d(torch::nn::Conv3dOptions(1, 2, 3).padding(1)));
    head = register_module("head", peft::Linear(10, 3));
  }
  torch::Tensor forward(const torch::Tensor& ids) {
    const peft::ForwardScope scope;
    auto x = emb->forward(ids);
    x = mlp->forward(encoder->forward(ln->forward(q->forward(x).tanh() + v->forward(x))));
    const auto h = conv1->forward(x.transpose(1, 2)).tanh();
    const auto image = conv->forward(h.view({h.size(0), 2, 3, h.size(2)})).tanh();
    const auto volume = conv3->forward(image.unsqueeze(1));
    return head->forward(torch::cat({x.mean(1), volume.flatten(2).mean(2)}, 1));
  }
  peft::ModelDescription describe() const override { return description; }

  peft::ModelDescription description;
  peft::Embedding emb{nullptr};
  peft::Linear q{nullptr}, v{nullptr};
  peft::LayerNorm ln{nullptr};
  ToyEncoder encoder{nullptr};
  torch::nn::Sequential mlp{nullptr};
  peft::Conv1d conv1{nullptr};
  peft::Conv2d conv{nullptr};
  peft::Conv3d conv3{nullptr};
  peft::Linear head{nullptr};
};
TORCH_MODULE(Toy);

/// Two experts of two layers: mean over the experts of down tanh(up x).
struct ExpertsImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) {
    const auto h = torch::einsum("eoi,...i->e...o", {up(), x}).tanh();
    return torch::einsum("eoi,e...i->e...o", {down(), h}).mean(0);
  }
  peft::Adapted<peft::Parameter> up = peft::register_parameter(*this, "up", torch::randn({2, 6, 8}));
  peft::Adapted<peft::Parameter> down = peft::register_parameter(*this, "down", torch::randn({2, 8, 6}));
};
TORCH_MODULE(Experts);

/// Two experts stored (in, out), and a matrix of no layer.
struct TurnedImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) {
    const auto h = torch::einsum("eio,...i->...o", {stack(), x}).tanh();
    return torch::matmul(h, flat().t());
  }
  peft::Adapted<peft::Parameter> stack =
      peft::register_parameter(*this, "stack", torch::randn({2, 8, 5}), /*is_transposed=*/true);
  peft::Adapted<peft::Parameter> flat = peft::register_parameter(*this, "flat", torch::randn({4, 5}));
};
TORCH_MODULE(Turned);

/// (batch, time) of ids below 10 → (batch, 3), through the layers one meets less often.
struct RareImpl : torch::nn::Module {
  RareImpl() {
    emb = register_module("emb", peft::Embedding(10, 8));
    attn = register_module("attn", peft::MultiheadAttention(8, 2));
    experts = register_module("experts", Experts());
    turned = register_module("turned", Turned());
    lstm = register_module("lstm", peft::LSTM(4, 6));
    conv = register_module("conv", peft::Conv1d(torch::nn::Conv1dOptions(6, 4, 3).groups(2).padding(1)));
    head = register_module("head", peft::Linear(4, 3));
  }
  torch::Tensor forward(const torch::Tensor& ids) {
    const peft::ForwardScope scope;
    const auto x = emb->forward(ids).transpose(0, 1);
    auto h = std::get<0>(attn->forward(x, x, x));
    h = std::get<0>(lstm->forward(turned->forward(h + experts->forward(h))));
    return head->forward(conv->forward(h.permute({1, 2, 0})).tanh().mean(2));
  }
  peft::Embedding emb{nullptr};
  peft::MultiheadAttention attn{nullptr};
  Experts experts{nullptr};
  Turned turned{nullptr};
  peft::LSTM lstm{nullptr};
  peft::Conv1d conv{nullptr};
  peft::Linear head{nullptr};
};
TORCH_MODULE(Rare);

}  // namespace peft_test
