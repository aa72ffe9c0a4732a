// ProductOrder: in which order a low-rank layer's products are computed, by what they cost, printed on
// request.
#pragma once

#include <cstdint>
#include <ostream>
#include <set>
#include <tuple>

#include "peft/core/compat.h"

namespace peft {

namespace internal {

/// A low-rank layer at work: y = x Wᵀ + s (x Aᵀ) Bᵀ.
struct LowRankShape {
  int64_t tokens = 0, in = 0, out = 0, rank = 0;
  bool learns = true;     ///< A and B have gradients
  bool mergeable = true;  ///< W + s B A may stand for W: no dropout, and a type that holds small changes of W

  bool operator<(const LowRankShape& other) const {
    const auto key = [](const LowRankShape& s) {
      return std::tuple(s.tokens, s.in, s.out, s.rank, s.learns, s.mergeable);
    };
    return key(*this) < key(other);
  }
};

/// The choices. The products with W and the ranks' with x and g remain in all of them:
/// - forward: y += s h Bᵀ, T·out·rank multiply-adds and a pass over y; or merged, y = x (W + s B A)ᵀ, as much
///   with `in` in place of T. Whether anything learns does not count: training and evaluation give one
///   result;
/// - dx += z A, T·in·rank and a pass over dx; or merged, dx = g (W + s B A), with `out` in place of T;
/// - dA = zᵀ x and dB = s gᵀ h, T·(in + out)·rank; or out of G = gᵀ x, T·in·out + 2·in·out·rank.
/// A sum is only merged where that saves at least half: the copy of W must be paid for too. Rates of the
/// machine cancel out: each choice is between products of one kind.
struct ProductOrder {
  bool merged_forward = false, merged_backward = false, through_weight = false;

  static ProductOrder cheapest(const LowRankShape& s) {
    ProductOrder order;
    order.merged_forward = s.mergeable && 2 * s.in <= s.tokens;
    order.merged_backward = s.mergeable && 2 * s.out <= s.tokens;
    const auto factors = s.tokens * s.rank * (s.in + s.out);
    order.through_weight = s.learns && s.in * s.out * (s.tokens + 2 * s.rank) < factors;
    return order;
  }
};

}  // namespace internal

/// While one lives, the fast paths of low-rank methods on this thread print in which order they compute their
/// products, a line for every new shape.
///
/// Example:
/// ```
/// peft::ProductOrderReport report(std::cerr);
/// model->forward(inputs);
/// // 1024 tokens, 768 -> 768, rank 8, training: y += h B', dx += z A; dA = z' x, dB = g' h
/// ```
class ProductOrderReport {
 public:
  explicit ProductOrderReport(std::ostream& out) : out_(out), outer_(current_) { current_ = this; }
  ~ProductOrderReport() { current_ = outer_; }
  ProductOrderReport(const ProductOrderReport&) = delete;
  ProductOrderReport& operator=(const ProductOrderReport&) = delete;

  /// Prints the order for a shape, if a report lives and has not yet.
  static void note(const internal::LowRankShape& s, const internal::ProductOrder& order) {
    if (!current_ || !current_->seen_.insert(s).second) return;
    auto& out = current_->out_;
    out << s.tokens << " tokens, " << s.in << " -> " << s.out << ", rank " << s.rank
        << (s.learns ? ", training: " : ", evaluation: ")
        << (order.merged_forward ? "y = x (W + s B A)'" : "y += h B'");
    if (s.learns) {
      out << (order.merged_backward ? ", dx = g (W + s B A)" : ", dx += z A")
          << (order.through_weight ? "; dA and dB out of G = g' x" : "; dA = z' x, dB = g' h");
    }
    out << '\n';
  }

 private:
  static inline thread_local ProductOrderReport* current_ = nullptr;
  std::ostream& out_;
  ProductOrderReport* outer_;
  std::set<internal::LowRankShape> seen_;
};

}  // namespace peft
