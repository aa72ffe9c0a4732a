// Described: what a model says of itself to the files.
#pragma once

#include <string>

namespace peft {

/// What the files say of the model an adapter belongs to.
struct ModelDescription {
  std::string task_type;     ///< Hugging Face PEFT's: "SEQ_CLS", "FEATURE_EXTRACTION", …; empty: none
  std::string name_or_path;  ///< where the base came from; empty: unknown
  std::string model_type;    ///< Hugging Face's: "bert", …; empty: unknown
};

/// A model that can say what it is. Our own models are; yours may be.
class Described {
 public:
  virtual ~Described() = default;
  virtual ModelDescription describe() const = 0;
};

}  // namespace peft
