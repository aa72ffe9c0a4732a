// Compacter: bottlenecks of Kronecker products, with a rule that all layers share.
#pragma once

#include "peft/methods/bottleneck.h"

namespace peft {

/// `houlsby` with PHM projections: AdapterHub's `compacter`. Paper: Compacter: Efficient Low-Rank
/// Hypercomplex Adapter Layers, arXiv 2106.04647, §4. Count: of a block 2 n k (width / n + size / n) + size +
/// width, and n³ once.
inline BottleneckOptions compacter() {
  return houlsby().reduction_factor(32).non_linearity("gelu").phm(PhmOptions());
}

/// `pfeiffer` with PHM projections: AdapterHub's `compacter++`.
inline BottleneckOptions compacter_plus_plus() {
  return pfeiffer().reduction_factor(32).non_linearity("gelu").phm(PhmOptions());
}

}  // namespace peft
