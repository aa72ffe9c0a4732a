// Low-rank linear: frozen linear layers that share an input, with their low-rank updates, as one node of the
// autograd graph.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/kernels/hash_dropout.h"
#include "peft/kernels/low_rank_term.h"
#include "peft/kernels/product_order.h"
#include "peft/kernels/thin_products.h"
#include "peft/kernels/workspace.h"

namespace peft {

namespace internal {

/// y_k = x W_kᵀ + b_k + s_k · drop_k(x) (A_k ⊙ E_k)ᵀ B_kᵀ, W and b constants.
/// With Ã all A ⊙ E below each other, h = x Ãᵀ and z = [s_k g_k B_k] beside each other: dx = Σ g_k W_k + z Ã,
/// dÃ = zᵀ x, dA = dÃ ⊙ E, dE = Σ_columns dÃ ⊙ A, dB_k = s_k g_kᵀ h_k; x is read once for all layers, dx
/// written by accumulation. Saves x, the W and the factors as variables, which are checked for changes in
/// place; h and Ã plain. What no task asks for is not computed. Can be differentiated again.
class LowRankLinearNode final : public torch::autograd::Node {
  using Variable = torch::autograd::SavedVariable;
  using Variables = torch::autograd::variable_list;

 public:
  /// Runs the layers. Gives the outputs a history where a gradient can reach x or a factor.
  static Variables run(const Tensor& x, const std::vector<LowRankLinear>& layers) {
    bool learns = false;
    for (const auto& [linear, term] : layers) {
      for (const auto& factor : factors(term)) {
        learns = learns || (factor.defined() && factor.requires_grad());
      }
    }
    const bool trains = torch::GradMode::is_enabled() && (learns || x.requires_grad());
    Forward forward(x, layers, learns && trains);
    if (!trains) return std::move(forward.outputs);

    auto node = make_node<LowRankLinearNode>();
    node->save(x, layers, forward);
    for (auto& y : forward.outputs) torch::autograd::create_gradient_edge(y, node);
    return std::move(forward.outputs);
  }

  std::string name() const override { return "LowRankLinearBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    x_.reset_data();
    h_ = A_ = Tensor();
    for (auto& layer : layers_) {
      for (auto* saved : {&layer.W, &layer.A, &layer.B, &layer.E}) saved->reset_data();
      layer.turned_B = Tensor();
    }
  }

 protected:
  Variables apply(Variables&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    Variables result(num_outputs());
    if (std::none_of(gradients.begin(), gradients.end(), [](const Tensor& g) { return g.defined(); })) {
      return result;
    }
    std::vector<Part> parts;
    parts.reserve(layers_.size());
    for (size_t k = 0; k < layers_.size(); ++k) {
      const auto& layer = layers_[k];
      Part part{layer, gradients[k], {}, {}, {}, {}, {}};
      if (part.g.defined()) part.g = part.g.reshape({-1, layer.out});
      part.W = layer.W.unpack();
      part.A = layer.A.unpack();
      part.B = layer.B.unpack();
      part.E = layer.E.unpack();
      for (size_t i = 0; i < 3; ++i) part.wanted[i] = task_should_compute_output(1 + 3 * k + i);
      parts.push_back(std::move(part));
    }
    const auto x = x_.unpack();
    if (torch::GradMode::is_enabled()) {
      differentiable(x, parts, result);
    } else {
      fast(x, parts, result);
    }
    return result;
  }

 private:
  struct Layer {
    Variable W, A, B, E;
    Tensor turned_B, score;
    int64_t out = 0, rank = 0;
    double scale = 0;  ///< s / (1 − p)
    std::optional<HashDropout> dropout;
    ProductOrder order;
    bool needs_G() const { return score.defined() || order.through_weight; }
  };
  /// A layer in one backward.
  struct Part {
    const Layer& layer;
    Tensor g;  ///< (T, out); undefined: nothing came
    Tensor W, A, B, E;
    bool wanted[3] = {};  ///< dA, dB, dE
    bool wants_A() const { return wanted[0] || wanted[2]; }
  };

  static std::vector<Tensor> factors(const std::optional<LowRankTerm>& term) {
    return term ? std::vector<Tensor>{term->A, term->B, term->E} : std::vector<Tensor>(3);
  }

  /// Rows of x that stay in the cores' caches while they are dropped and multiplied.
  static int64_t block_rows(const Tensor& x) {
    const auto bytes = static_cast<int64_t>(x.element_size()) * std::max<int64_t>(1, x.size(1));
    return std::max<int64_t>(16, at::get_num_threads() * (int64_t{1} << 18) / bytes);
  }

  /// Bᵀ, copied so that its rows are contiguous where a kernel needs that, or many tokens pay for it.
  static Tensor turned_B(const Tensor& B, int64_t T) {
    return T >= 64 || has_thin_kernel(B, B.size(1)) ? B.t().contiguous() : B.t();
  }
  /// Some of the columns of a matrix.
  static Tensor columns(const Tensor& t, int64_t first, int64_t count) {
    return count == t.size(1) ? t : t.narrow(1, first, count);
  }
  /// Some of the rows.
  static Tensor rows(const Tensor& t, int64_t first, int64_t count) {
    return count == t.size(0) ? t : t.narrow(0, first, count);
  }

  /// W + s B Ã, for use until the next is asked for.
  static Tensor merged(const Tensor& W, const Tensor& B, const Tensor& A, double scale) {
    const auto sum = workspace<Scratch::merged>(W.size(0), W.size(1), W);
    Tensor(sum).copy_(W);
    thin_update(sum, B, A, scale);
    return sum;
  }

  static ProductOrder order_of(const Tensor& x, const LowRankLinear& layer, bool learns) {
    if (!layer.term) return {};
    const auto& W = layer.linear.weight;
    const bool mergeable = layer.term->dropout == 0 && at::elementSize(x.scalar_type()) >= 4;
    const LowRankShape shape{x.size(0), W.size(1), W.size(0), layer.term->A.size(0), learns, mergeable};
    auto order = ProductOrder::cheapest(shape);
    // G would be rounded to a half type before it meets factors in float32.
    order.through_weight = order.through_weight && layer.term->A.scalar_type() == x.scalar_type();
    ProductOrderReport::note(shape, order);
    return order;
  }

  /// What runs forward, and what of it backward uses.
  struct Forward {
    Forward(const Tensor& input, const std::vector<LowRankLinear>& layers, bool learns) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto x = input.reshape({-1, input.size(-1)});
      std::vector<Tensor> factors;
      bool beside = learns;
      for (const auto& layer : layers) {
        const auto& term = layer.term;
        orders.push_back(order_of(x, layer, learns));
        beside = beside || (term && !orders.back().merged_forward);
        const bool drops = term && term->dropout > 0;
        dropouts.push_back(drops ? std::optional(HashDropout::draw(term->dropout)) : std::nullopt);
        if (term) factors.push_back(term->E.defined() ? at::mul(term->A, term->E) : term->A);
      }
      A = factors.size() == 1 ? factors.front() : at::cat(factors);
      B.resize(layers.size());
      multiply(x, layers, beside);
      auto shape = input.sizes().vec();
      for (auto& y : outputs) {
        shape.back() = y.size(1);
        y = y.view(shape);
      }
    }

    Variables outputs;
    std::vector<std::optional<HashDropout>> dropouts;
    std::vector<ProductOrder> orders;
    Tensor A, h;            ///< h: undefined where nothing uses it
    std::vector<Tensor> B;  ///< turned over

   private:
    void multiply(const Tensor& x, const std::vector<LowRankLinear>& layers, bool beside) {
      const auto each = [&](const auto& use) {
        int64_t first = 0;
        for (size_t k = 0; k < layers.size(); ++k) {
          const auto rank = layers[k].term ? layers[k].term->A.size(0) : 0;
          use(k, first, rank);
          first += rank;
        }
      };
      each([&](size_t k, int64_t first, int64_t rank) {
        const auto& [linear, term] = layers[k];
        const auto W = orders[k].merged_forward
                           ? merged(linear.weight, term->B, rows(A, first, rank), term->scale)
                           : linear.weight;
        outputs.push_back(linear.bias.defined() ? at::addmm(linear.bias, x, W.t()) : at::mm(x, W.t()));
      });
      if (!beside) return;
      h = empty_thin(x.size(0), x.scalar_type(), A, x.size(1));
      if (std::none_of(dropouts.begin(), dropouts.end(), [](const auto& d) { return d.has_value(); })) {
        thin_inner(h, x, A);
      } else {
        const auto input = x.contiguous();
        const auto T = x.size(0), block = std::min(T, block_rows(x));
        const auto dropped = workspace<Scratch::dropped>(block, x.size(1), x);
        for (int64_t begin = 0; begin < T; begin += block) {
          const auto count = std::min(block, T - begin);
          const auto from = input.narrow(0, begin, count), into = dropped.narrow(0, 0, count);
          each([&](size_t k, int64_t first, int64_t rank) {
            if (rank == 0) return;
            dropouts[k]->mask(begin, from, into);
            thin_inner(columns(h.narrow(0, begin, count), first, rank), into, rows(A, first, rank));
          });
        }
      }
      each([&](size_t k, int64_t first, int64_t rank) {
        if (rank == 0) return;
        const auto& term = *layers[k].term;
        B[k] = turned_B(term.B, x.size(0));
        if (orders[k].merged_forward) return;
        thin_update(outputs[k], columns(h, first, rank), B[k], term.scale / (1 - term.dropout));
      });
    }
  };

  void save(const Tensor& x, const std::vector<LowRankLinear>& layers, const Forward& forward) {
    std::vector<Tensor> inputs{x};
    bool learns = false;
    for (size_t k = 0; k < layers.size(); ++k) {
      const auto& [linear, term] = layers[k];
      for (const auto& factor : factors(term)) {
        inputs.push_back(factor);
        learns = learns || (factor.defined() && factor.requires_grad());
      }
      Layer layer;
      layer.out = linear.weight.size(0);
      if (x.requires_grad()) layer.W = Variable(linear.weight, false);
      if (term) {
        layer.A = Variable(term->A, false);
        layer.B = Variable(term->B, false);
        layer.E = Variable(term->E, false);
        layer.turned_B = forward.B[k];
        layer.score = term->score;
        layer.rank = term->A.size(0);
        layer.scale = term->scale / (1 - term->dropout);
        layer.dropout = forward.dropouts[k];
        layer.order = forward.orders[k];
      }
      layers_.push_back(std::move(layer));
    }
    if (learns) x_ = Variable(x, false);
    shape_ = x.sizes().vec();
    h_ = forward.h;
    A_ = forward.A;
    set_next_edges(torch::autograd::collect_next_edges(inputs));
  }

  /// Calls `use` with each part that has a term and a gradient, and the first of its ranks.
  template <class Use>
  static void each(std::vector<Part>& parts, const Use& use) {
    int64_t first = 0;
    for (size_t k = 0; k < parts.size(); ++k) {
      if (parts[k].layer.rank && parts[k].g.defined()) use(k, parts[k], first);
      first += parts[k].layer.rank;
    }
  }

  /// In as few passes over the activations as there can be.
  void fast(const Tensor& input, std::vector<Part>& parts, Variables& result) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool wants_x = task_should_compute_output(0);
    bool complete = true, drops = false, wants_A = false, merges = true;
    int64_t T = 0;
    auto type = A_.scalar_type();
    for (auto& part : parts) {
      merges = merges && (part.layer.rank == 0 || part.layer.order.merged_backward);
      complete = complete && part.g.defined();
      if (!part.g.defined()) continue;
      part.g = part.g.contiguous();
      T = part.g.size(0);
      type = part.g.scalar_type();
      drops = drops || part.layer.dropout;
      wants_A = wants_A || (part.wants_A() && !part.layer.needs_G());
    }
    Tensor dx;
    int64_t rank_before = 0;
    for (const auto& part : parts) {
      const auto first = std::exchange(rank_before, rank_before + part.layer.rank);
      if (!wants_x || !part.g.defined()) continue;
      const auto W = merges && part.layer.rank
                         ? merged(part.W, part.B, rows(A_, first, part.layer.rank), part.layer.scale)
                         : part.W;
      dx = dx.defined() ? dx.addmm_(part.g, W) : at::mm(part.g, W);
    }
    const bool adds = wants_x && !merges;
    const auto x = input.defined() ? input.reshape({T, shape_.back()}) : Tensor();
    auto dA = wants_A ? at::zeros_like(A_) : Tensor();
    if (adds || wants_A) {
      const auto z = empty_thin(T, type, A_, layers_.front().out);
      if (!complete) Tensor(z).zero_();
      each(parts, [&](size_t, const Part& part, int64_t first) {
        // Of factors that do not train a merged forward has turned none.
        const auto B = part.layer.turned_B.defined() ? part.layer.turned_B : turned_B(part.B, T);
        thin_inner(columns(z, first, part.layer.rank), part.g, B, part.layer.scale);
      });
      if (drops) {
        through_dropout(parts, x, z, dx, dA, A_);
      } else {
        if (adds) thin_update(dx, z, A_);
        if (wants_A) thin_outer(dA, z, x);
      }
    }
    if (wants_x) result[0] = dx.view(shape_);
    each(parts, [&](size_t k, const Part& part, int64_t first) {
      const auto rank = part.layer.rank;
      Tensor own, dB;
      if (part.layer.needs_G()) {
        const bool wanted = part.layer.score.defined() || part.wants_A() || part.wanted[1];
        if (wanted && x.defined())
          std::tie(own, dB) = through_G(part, dropped(part.layer, x), rows(A_, first, rank));
      } else {
        if (dA.defined()) own = rows(dA, first, rank);
        if (part.wanted[1]) {
          // Turned over: the BLAS are slow at a few columns out of a tall product.
          const auto turned = at::zeros({rank, part.layer.out}, A_.options());
          thin_outer(turned, columns(h_, first, rank), part.g, part.layer.scale);
          dB = turned.t().contiguous();
        }
      }
      auto* gradients = &result[1 + 3 * k];
      if (part.wanted[1]) gradients[1] = dB;
      if (part.wanted[2]) gradients[2] = at::mul(own, part.A).sum(1, /*keepdim=*/true);
      if (part.wanted[0]) gradients[0] = part.E.defined() ? own.mul_(part.E) : own;
    });
  }

  /// dx += m ⊙ (z Ã) and dÃ = zᵀ (m ⊙ x), in blocks of rows that stay in the cache, each layer with its own
  /// mask, which is computed once. `dx` or `dA` may be undefined.
  static void through_dropout(std::vector<Part>& parts, const Tensor& input, const Tensor& z,
                              const Tensor& dx, const Tensor& dA, const Tensor& A) {
    const auto& like = dx.defined() ? dx : input;
    const auto x = dA.defined() ? input.contiguous() : Tensor();
    const auto T = like.size(0), block = std::min(T, block_rows(like));
    Tensor dropped, update;
    if (dA.defined()) dropped = workspace<Scratch::dropped>(block, like.size(1), like);
    if (dx.defined()) update = workspace<Scratch::update>(block, like.size(1), A);
    for (int64_t begin = 0; begin < T; begin += block) {
      const auto count = std::min(block, T - begin);
      const auto part_of = [&](const Tensor& t, int64_t from) {
        return t.defined() ? t.narrow(0, from, count) : t;
      };
      each(parts, [&](size_t, const Part& part, int64_t first) {
        const auto rank = part.layer.rank;
        const auto own = columns(z.narrow(0, begin, count), first, rank);
        const auto into = part_of(update, 0);
        if (into.defined()) thin_update(into, own, A.narrow(0, first, rank), 1, /*adds=*/false);
        part.layer.dropout->mask(begin, part_of(x, begin), part_of(dropped, 0), into, part_of(dx, begin));
        if (dA.defined()) thin_outer(dA.narrow(0, first, rank), own, part_of(dropped, 0));
      });
    }
  }

  /// m ⊙ x.
  static Tensor dropped(const Layer& layer, const Tensor& x) {
    if (!layer.dropout) return x;
    const auto result = at::empty(x.sizes(), x.options());
    layer.dropout->mask(0, x.contiguous(), result);
    return result;
  }

  /// dÃ and dB out of G = gᵀ x, and the score if one is wanted; B Ã and G exist a block of rows at a time.
  /// `x`: dropped.
  static std::pair<Tensor, Tensor> through_G(const Part& part, const Tensor& x, const Tensor& A) {
    const auto scale = part.layer.scale;
    auto dA = at::zeros_like(A), dB = at::zeros_like(part.B);
    const auto& score = part.layer.score;
    const auto sum = score.defined() ? at::zeros({}, A.options()) : Tensor();
    constexpr int64_t rows = 256;
    for (int64_t first = 0; first < part.layer.out; first += rows) {
      const auto count = std::min(rows, part.layer.out - first);
      const auto B = part.B.narrow(0, first, count);
      const auto G = at::mm(part.g.narrow(1, first, count).t(), x).to(A.scalar_type());
      dA.addmm_(B.t(), G, 1, scale);
      dB.narrow(0, first, count).addmm_(G, A.t(), 0, scale);
      if (score.defined()) Tensor(sum).add_(at::mm(B, A).mul_(G).abs_().sum());
    }
    if (score.defined()) {
      const auto entries = static_cast<double>(part.layer.out * A.size(1));
      Tensor(score).copy_(Tensor(sum).mul_(std::abs(scale) / std::sqrt(entries)));
    }
    return {dA, dB};
  }

  /// The same out of place, in operations that have a history.
  void differentiable(const Tensor& input, std::vector<Part>& parts, Variables& result) const {
    const bool wants_x = task_should_compute_output(0);
    const auto x = input.defined() ? input.reshape({-1, shape_.back()}) : Tensor();
    Tensor dx;
    const auto add = [&](const Tensor& term) { dx = dx.defined() ? dx + term : term; };
    if (wants_x) {
      for (const auto& part : parts) {
        if (part.g.defined()) add(at::mm(part.g, part.W));
      }
    }
    each(parts, [&](size_t k, const Part& part, int64_t) {
      const auto scale = part.layer.scale;
      const auto A = part.E.defined() ? part.A * part.E : part.A;
      const auto g = part.g.to(A.scalar_type());
      const auto z = at::mm(g, part.B) * scale;
      const auto ones = at::ones({z.size(0), A.size(1)}, A.options().requires_grad(false));
      const auto mask = dropped(part.layer, ones);
      if (wants_x) add((at::mm(z, A) * mask).to(part.g.scalar_type()));
      if (!x.defined()) return;
      const auto kept = x.to(A.scalar_type()) * mask, dA = at::mm(z.t(), kept);
      auto* gradients = &result[1 + 3 * k];
      if (part.wanted[0]) gradients[0] = part.E.defined() ? dA * part.E : dA;
      if (part.wanted[1]) gradients[1] = at::mm(g.t(), at::mm(kept, A.t())) * scale;
      if (part.wanted[2]) gradients[2] = (dA * part.A).sum(1, /*keepdim=*/true);
      if (!part.layer.score.defined()) return;
      const torch::NoGradGuard no_grad;
      through_G(part, kept.to(part.g.scalar_type()), A);
    });
    if (wants_x) result[0] = dx.view(shape_);
  }

  std::vector<Layer> layers_;
  Variable x_;
  Tensor h_, A_;
  std::vector<int64_t> shape_;
  bool released_ = false;
};

/// The layers' outputs, or nothing where the node does not fit.
inline std::optional<std::vector<Tensor>> low_rank_linear(const Tensor& x,
                                                          const std::vector<LowRankLinear>& layers) {
  if (!low_rank_linear_fits(x, layers)) return {};
  return LowRankLinearNode::run(x, layers);
}

}  // namespace internal
}  // namespace peft
