// IncreLoRA: a low-rank update whose matrices start at rank 1 and grow where the loss asks for it.
#pragma once

#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/controller.h"
#include "peft/kernels/orthogonality.h"
#include "peft/methods/increlora_layer.h"

namespace peft {

/// Decides which layers grow: those whose smoothed score, times its uncertainty, is largest. The author's
/// `RankAllocator`. Step t, counted from 0, after clipping and before the update:
/// at t = 0 every layer gets a reserve of δ chunks; while the sum of the ranks is below its target,
/// Ī ← β1 Ī + (1 − β1) s, U ← β2 U + (1 − β2) |s − Ī|, and at each multiple of `incre_interval` above
/// `init_warmup` the layers with the `top_h` largest Ī·U (more where they tie) take their reserve into use
/// and get a new one. What begins to train is a new group of the optimizer. Once the target is met the
/// reserves go silent (E = 0). An overshoot, possible with δ > 1 and ties, also ends growth; then the
/// reserves stay as they are, and one note says so.
class RankGrower : public ControllerOf<IncreLoraImpl> {
 public:
  /// Throws c10::ValueError if the target lies below the ranks at the start.
  RankGrower(IncreLoraOptions settings, Pieces pieces)
      : ControllerOf(std::move(pieces)), options(std::move(settings)), grown_(pieces_.size(), 0) {
    const auto count = static_cast<int64_t>(pieces_.size());
    delta_ = options.incre_rank_num().value_or(internal::default_growth(options.target_rank()));
    target_ = options.target_total_rank().value_or(options.target_rank() * count);
    const auto initial = options.rank() * count;
    TORCH_CHECK_VALUE(target_ >= initial, "IncreLoraOptions: target_total_rank must be at least ", initial,
                      ", the ranks of ", count, " layers at the start, but got ", target_);
    sensitivity_ = torch::zeros({count}, kind());
    uncertainty_ = torch::zeros({count}, kind());
    follow_ranks();
  }

  /// Steps taken.
  int64_t step() const { return step_; }
  /// Sum of the active ranks, and what it grows to.
  int64_t total_rank() const { return total_; }
  int64_t target() const { return target_; }
  /// Ī·U of each piece. Waits for the device.
  std::vector<double> importance() const {
    const auto values = (sensitivity_ * uncertainty_).to(torch::kCPU, torch::kDouble).contiguous();
    return {values.data_ptr<double>(), values.data_ptr<double>() + values.numel()};
  }

  bool grows() const override { return true; }
  bool restarts_schedule() const override { return options.multi_lr(); }

  /// λ · mean over all A and B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F, reserves included;
  /// undefined for λ = 0.
  Tensor penalty() const override {
    torch::NoGradGuard no_grad;
    if (options.reg_orth_coef() == 0) return {};
    const auto of_B = internal::orthogonality(matrices(true), true);
    return (internal::orthogonality(matrices(false), false) + of_B) * weight();
  }
  void add_penalty_gradients() override {
    if (options.reg_orth_coef() == 0) return;
    for (const bool of_B : {false, true}) {
      const auto terms = internal::orthogonality_gradients(matrices(of_B), of_B, weight());
      auto term = terms.begin();
      std::vector<Tensor> gradients, parts;
      for (const auto& piece : pieces_) {
        const int64_t dimension = of_B ? 1 : 0;
        int64_t first = 0;
        for (const auto& chunk : of_B ? piece->lora_B : piece->lora_A) {
          const auto width = chunk.size(dimension);
          if (chunk.requires_grad()) {
            gradients.push_back(internal::gradient_of(chunk));
            parts.push_back(options.couple_chunks() ? term->narrow(dimension, first, width) : *term);
          }
          first += width;
          if (!options.couple_chunks()) ++term;
        }
        if (options.couple_chunks()) ++term;
      }
      if (gradients.empty()) continue;
      at::_foreach_add_(gradients, parts);
      internal::mark_written(gradients);
    }
  }

  void unscale(const Tensor& inverse) override {
    for (const auto& piece : pieces_) {
      if (piece->score.defined()) piece->score.mul_(inverse);
    }
  }

  NamedTensors grow(const StepContext&) override {
    for (size_t i = 0; i < pieces_.size(); ++i) {
      TORCH_CHECK(pieces_[i]->chunks() == chunks_after(grown_[i]), "'", pieces_[i]->site().path,
                  "': IncreLoRA's chunks were changed outside its training (hint: go on from a checkpoint)");
    }
    const auto t = step_++;
    if (t == 0) {
      for (const auto& piece : pieces_) piece->reserve(delta_);
    }
    if (total_ < target_) {
      update_importance();
      const bool due = t > options.init_warmup() && t % options.incre_interval() == 0;
      if (const auto chosen = due ? most_important() : std::vector<size_t>(); !chosen.empty()) {
        for (const auto i : chosen) {
          pieces_[i]->activate(delta_);
          pieces_[i]->reserve(delta_);
        }
        add_growth(chosen);
        follow_ranks();
        finish(t);
        return groups().back();
      }
    }
    return t == 0 && options.advance_learn() ? groups().front() : NamedTensors();
  }

  std::vector<NamedTensors> groups() const override {
    std::vector<NamedTensors> result;
    const auto add = [&](size_t piece, char kind, const std::vector<Tensor>& list, int64_t first) {
      const auto& path = pieces_[piece]->site().path;
      const auto prefix = (path.empty() ? "" : path + ".") + IncreLoraOptions::method + ".lora_" + kind + "_";
      for (int64_t i = first; i < first + delta_; ++i) {
        result.back().emplace_back(prefix + std::to_string(i), list.at(static_cast<size_t>(i)));
      }
    };
    if (step_ > 0 && options.advance_learn()) {
      result.emplace_back();
      for (size_t i = 0; i < pieces_.size(); ++i) {
        add(i, 'A', pieces_[i]->lora_A, 1);
        add(i, 'B', pieces_[i]->lora_B, 1);
      }
    }
    for (size_t growth = 0; growth < growths_.size(); ++growth) {
      result.emplace_back();
      for (const auto i : growths_[growth]) {
        const auto end = chunks_after(growths_of(i, growth));  // before it grew
        const auto learnt = options.advance_learn() ? end : end - delta_;
        add(i, 'E', pieces_[i]->lora_E, end - delta_);
        add(i, 'A', pieces_[i]->lora_A, learnt);
        add(i, 'B', pieces_[i]->lora_B, learnt);
      }
    }
    return result;
  }

  NamedTensors state() const override {
    const auto count = static_cast<int64_t>(pieces_.size());
    auto growths = torch::zeros({static_cast<int64_t>(growths_.size()), count}, torch::kByte);
    for (size_t i = 0; i < growths_.size(); ++i) {
      for (const auto piece : growths_[i]) growths[static_cast<int64_t>(i)][static_cast<int64_t>(piece)] = 1;
    }
    return {{"step", torch::scalar_tensor(step_, torch::kLong)},
            {"growths", growths},
            {"score", scores()},
            {"sensitivity", sensitivity_.to(kind())},
            {"uncertainty", uncertainty_.to(kind())}};
  }
  void load_state(const std::map<std::string, Tensor>& given) override {
    const auto count = static_cast<int64_t>(pieces_.size());
    const auto found = given.find("growths");
    const auto rows = found != given.end() && found->second.dim() == 2 ? found->second.size(0) : 0;
    auto expected = state();
    expected[1].second = torch::empty({rows, count}, torch::kByte);
    internal::Problems problems;
    internal::check_tensors(expected, given, problems);
    problems.raise("IncreLoRA: the state does not fit this adapter");
    const auto step = given.at("step").item<int64_t>();
    TORCH_CHECK_VALUE(step > 0 || rows == 0, "IncreLoRA: the state has grown ", rows, " times in ", step,
                      " steps");

    step_ = step;
    const auto growths = found->second.to(torch::kCPU);
    growths_.clear();
    grown_.assign(pieces_.size(), 0);
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<size_t> chosen;
      for (int64_t piece = 0; piece < count; ++piece) {
        if (growths[i][piece].item<uint8_t>() != 0) chosen.push_back(static_cast<size_t>(piece));
      }
      add_growth(chosen);
    }
    for (size_t i = 0; i < pieces_.size(); ++i) {
      pieces_[i]->resize(chunks_after(grown_[i]), options.rank() + delta_ * grown_[i]);
      pieces_[i]->score = given.at("score")[static_cast<int64_t>(i)].to(kind()).clone();
    }
    sensitivity_ = given.at("sensitivity").to(kind()).clone();
    uncertainty_ = given.at("uncertainty").to(kind()).clone();
    follow_ranks();
  }
  std::shared_ptr<Controller> copy(const std::vector<std::shared_ptr<PieceImpl>>& pieces) const override {
    auto result = std::make_shared<RankGrower>(options, own(pieces));
    result->step_ = step_;
    result->growths_ = growths_;
    result->grown_ = grown_;
    result->note = note;
    result->sensitivity_ = sensitivity_.clone();
    result->uncertainty_ = uncertainty_.clone();
    const auto score = scores();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      result->pieces_[i]->score = score[static_cast<int64_t>(i)].clone();
    }
    return result;
  }

  const IncreLoraOptions options;
  /// Takes what a user should know: that growth has overshot its target.
  std::function<void(const std::string&)> note = [](const std::string& line) { std::cerr << line + "\n"; };

 private:
  /// The matrices that are to be orthogonal: a layer's chunks of A or B together, or each by itself.
  std::vector<Tensor> matrices(bool of_B) const {
    std::vector<Tensor> found;
    for (const auto& piece : pieces_) {
      const auto& chunks = of_B ? piece->lora_B : piece->lora_A;
      if (options.couple_chunks()) {
        found.push_back(torch::cat(chunks, of_B ? 1 : 0));
      } else {
        found.insert(found.end(), chunks.begin(), chunks.end());
      }
    }
    return found;
  }
  /// λ over the number of matrices.
  double weight() const {
    size_t count = 0;
    for (const auto& piece : pieces_) count += options.couple_chunks() ? 2 : 2 * piece->lora_A.size();
    return options.reg_orth_coef() / static_cast<double>(count);
  }

  void add_growth(const std::vector<size_t>& chosen) {
    growths_.push_back(chosen);
    for (const auto piece : chosen) ++grown_[piece];
  }
  /// How often a piece had grown before a growth.
  int64_t growths_of(size_t piece, size_t growth) const {
    return std::count_if(
        growths_.begin(), growths_.begin() + static_cast<std::ptrdiff_t>(growth),
        [&](const auto& grown) { return std::find(grown.begin(), grown.end(), piece) != grown.end(); });
  }
  /// The chunks of a piece that has grown so often.
  int64_t chunks_after(int64_t growths) const { return step_ == 0 ? 1 : 1 + delta_ * (growths + 1); }

  /// Type and device of the importances: the first piece's, which may be moved at any time.
  torch::TensorOptions kind() const { return pieces_.at(0)->lora_A[0].options().requires_grad(false); }
  Tensor scores() const {
    const auto like = kind();
    std::vector<Tensor> values;
    for (const auto& piece : pieces_) {
      values.push_back(piece->score.defined() ? piece->score.to(like) : torch::zeros({}, like));
    }
    return torch::stack(values);
  }
  void update_importance() {
    const auto score = scores();
    sensitivity_ = sensitivity_.to(kind()).mul(options.beta1()).add(score, 1 - options.beta1());
    uncertainty_ =
        uncertainty_.to(kind()).mul(options.beta2()).add((score - sensitivity_).abs(), 1 - options.beta2());
  }
  std::vector<size_t> most_important() const {
    const auto values = importance();
    const auto most = std::min({options.top_h(), target_ - total_, static_cast<int64_t>(values.size())});
    const auto threshold = std::get<0>((sensitivity_ * uncertainty_).topk(most))[most - 1].item<double>();
    std::vector<size_t> chosen;
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] >= threshold) chosen.push_back(i);
    }
    return chosen;
  }
  void follow_ranks() {
    total_ = 0;
    for (const auto& piece : pieces_) total_ += piece->rank();
    for (const auto& piece : pieces_) piece->scored = total_ < target_;
  }
  void finish(int64_t t) const {
    if (total_ == target_) {
      for (const auto& piece : pieces_) {
        for (auto e = piece->lora_E.end() - delta_; e != piece->lora_E.end(); ++e) e->zero_();
      }
    } else if (total_ > target_) {
      note("IncreLoRA has overshot: step " + std::to_string(t) + " took the ranks of " +
           std::to_string(pieces_.size()) + " layers to " + std::to_string(total_) + " instead of " +
           std::to_string(target_) +
           ". Growth ends here and the reserves stay as they are, as in the author's code " +
           "(hint: incre_rank_num(1) overshoots on ties only)");
    }
  }

  int64_t delta_ = 0, target_ = 0, total_ = 0, step_ = 0;
  std::vector<std::vector<size_t>> growths_;  ///< the pieces that grew, for every growth
  std::vector<int64_t> grown_;                ///< how often each piece has grown
  Tensor sensitivity_, uncertainty_;          ///< Ī and U, a value for each piece
};

inline std::shared_ptr<Controller> make_controller(const IncreLoraOptions& options,
                                                   const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
  return std::make_shared<RankGrower>(options, RankGrower::own(pieces));
}

}  // namespace peft
