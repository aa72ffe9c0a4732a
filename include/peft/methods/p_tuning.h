// P-tuning: virtual tokens before the text, made by a small network while they train.
#pragma once

#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/draws.h"
#include "peft/methods/prompt.h"

namespace peft {

/// The network that makes the virtual tokens.
enum class PromptEncoderKind : std::uint8_t { mlp, lstm };

/// Settings of `PTuning`. Defaults are Hugging Face's.
struct PTuningOptions {
  static constexpr Needs needs = Needs::input;
  static constexpr const char* method = "p_tuning";

  explicit PTuningOptions(int64_t num_virtual_tokens = 20) : num_virtual_tokens_(num_virtual_tokens) {}

  /// Length V of the prompt, at least 1. It takes that many of the model's positions.
  TORCH_ARG(int64_t, num_virtual_tokens);
  TORCH_ARG(PromptEncoderKind, encoder) = PromptEncoderKind::mlp;
  /// Width h of the network, at least 1; 0: that of the word vectors.
  TORCH_ARG(int64_t, hidden_size) = 0;
  /// Layers of the LSTM, at least 1. An MLP has three whatever it says.
  TORCH_ARG(int64_t, layers) = 2;
  /// Rate of dropout between the layers of the LSTM, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// The vectors alone, without the network that made them: as files have them, for inference.
  TORCH_ARG(bool, table) = false;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const PTuningOptions& options) {
  TORCH_CHECK_VALUE(options.num_virtual_tokens() > 0,
                    "PTuningOptions: num_virtual_tokens must be positive, but got ",
                    options.num_virtual_tokens());
  TORCH_CHECK_VALUE(options.hidden_size() >= 0, "PTuningOptions: hidden_size must be at least 0, but got ",
                    options.hidden_size());
  TORCH_CHECK_VALUE(options.layers() > 0, "PTuningOptions: layers must be positive, but got ",
                    options.layers());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() < 1,
                    "PTuningOptions: dropout must be in [0, 1), but got ", options.dropout());
}

/// The network: P = W₃ ReLU(W₂ ReLU(W₁ Z + b₁) + b₂) + b₃ for each token, or with H the outputs of a
/// bidirectional LSTM over the tokens, P = W₂ ReLU(W₁ H + b₁) + b₂.
/// Shapes: embedding (Z): (V, width); W₁: (h, width), W₂: (h, h), W₃: (width, h); with the LSTM, whose layers
/// have h units in each direction, W₁: (2h, 2h), W₂: (width, 2h).
class PromptEncoder : public nn::Module {
 public:
  PromptEncoder(PTuningOptions settings, int64_t width)
      : nn::Module("PromptEncoder"), options_(std::move(settings)), hidden_(options_.hidden_size()) {
    if (hidden_ == 0) hidden_ = width;
    embedding = register_parameter("embedding", torch::empty({options_.num_virtual_tokens(), width}));
    if (options_.encoder() == PromptEncoderKind::mlp) {
      for (const auto& [out, in] : {std::pair(hidden_, width), {hidden_, hidden_}, {width, hidden_}})
        add_linear(out, in);
      return;
    }
    const auto gates = 4 * hidden_;
    for (int64_t layer = 0; layer < options_.layers(); ++layer) {
      for (const char* direction : {"", "_reverse"}) {
        const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
          lstm.push_back(register_parameter("lstm_" + name + "_l" + std::to_string(layer) + direction,
                                            torch::empty(shape)));
        };
        add("weight_ih", {gates, layer == 0 ? width : 2 * hidden_});
        add("weight_hh", {gates, hidden_});
        add("bias_ih", {gates});
        add("bias_hh", {gates});
      }
    }
    add_linear(2 * hidden_, 2 * hidden_);
    add_linear(width, 2 * hidden_);
  }

  /// PyTorch's initial values, drawn in its order.
  void initialize() {
    torch::NoGradGuard no_grad;
    embedding.normal_();
    const auto bound = 1 / std::sqrt(static_cast<double>(hidden_));
    for (auto& tensor : lstm) tensor.uniform_(-bound, bound);
    for (size_t i = 0; i < linear.size(); i += 2) internal::draw_linear(linear[i], linear[i + 1]);
  }

  /// P, (V, width).
  Tensor forward() {
    auto x = embedding;
    if (!lstm.empty()) {
      const auto state = torch::zeros({2 * options_.layers(), 1, hidden_}, x.options().requires_grad(false));
      x = std::get<0>(at::lstm(x.unsqueeze(0), {state, state}, lstm, /*has_biases=*/true, options_.layers(),
                               options_.dropout(), is_training(), /*bidirectional=*/true,
                               /*batch_first=*/true))
              .squeeze(0);
    }
    for (size_t i = 0; i < linear.size(); i += 2) {
      x = at::linear(i == 0 ? x : at::relu(x), linear[i], linear[i + 1]);
    }
    return x;
  }

  Tensor embedding;
  std::vector<Tensor> lstm;    ///< of each layer and direction W_ih, W_hh, b_ih, b_hh
  std::vector<Tensor> linear;  ///< W₁, b₁, W₂, b₂, …

 private:
  void add_linear(int64_t out, int64_t in) {
    const auto name = "mlp_" + std::to_string(linear.size() / 2);
    linear.push_back(register_parameter(name + "_weight", torch::empty({out, in})));
    linear.push_back(register_parameter(name + "_bias", torch::empty({out})));
  }

  PTuningOptions options_;
  int64_t hidden_;
};

/// A prompt (`Prompt`) whose vectors P a network makes from trained ones in every forward. A file has P
/// alone, and cannot train on; the library's own checkpoints keep the network. Trains: the network, its
/// embedding included. Count: V · width, and for the MLP width h + h + h² + h + h width + width, for the LSTM
/// of L layers 2 (4 h (width + h + 2) + (L − 1) 4 h (3 h + 2)) + 4 h² + 2 h + 2 h width + width. Throws:
/// c10::ValueError for options out of range, more virtual tokens than the model has positions. Paper: GPT
/// Understands, Too, arXiv 2103.10385, §3. Reference: Hugging Face PEFT's P_TUNING; the authors' code has h /
/// 2 units a direction and other layers, and puts the prompt where a template says.
class PTuningImpl : public Piece<PTuningImpl, PTuningOptions, PromptPieceImpl> {
 public:
  PTuningImpl(PTuningOptions settings, const SiteInfo& site)
      : Piece(PTuningOptions::method, std::move(settings), site) {
    check(options);
    internal::check_room(options.num_virtual_tokens(), site);
    if (options.table()) {
      prompt_embeddings =
          register_parameter("prompt_embeddings", torch::empty({options.num_virtual_tokens(), site.width}));
    } else {
      encoder = register_module("encoder", std::make_shared<PromptEncoder>(options, site.width));
    }
  }

  void initialize(const LayerView&) override {
    TORCH_CHECK_VALUE(encoder, "PTuning: a table of vectors must come from a file, but is to be initialized");
    encoder->initialize();
  }

  /// P, (V, width): of the network, or read from a file.
  Tensor vectors() const { return encoder ? encoder->forward() : prompt_embeddings; }
  Tensor prompt(const Embedded&) override { return vectors().unsqueeze(0); }
  int64_t num_virtual_tokens() const override { return options.num_virtual_tokens(); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::PTuning(num_virtual_tokens=" << options.num_virtual_tokens() << ")";
  }

  std::shared_ptr<PromptEncoder> encoder;  ///< nullptr with `table`
  Tensor prompt_embeddings;                ///< with `table`
};

/// Why a site cannot take a P-tuned prompt, or an empty string.
inline std::string refusal(const PTuningOptions&, const SiteInfo& site) {
  return refusal(PromptOptions(), site);
}

inline std::shared_ptr<PieceImpl> make_piece(const PTuningOptions& options, const SiteInfo& site) {
  return std::make_shared<PTuningImpl>(options, site);
}

}  // namespace peft
