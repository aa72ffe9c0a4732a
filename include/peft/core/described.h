// Described: what a model says of itself to the files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace peft {

/// A second name that Hugging Face's model has for a tensor.
struct SecondName {
  /// What that model has under the two.
  enum class Kind : std::uint8_t {
    same,    ///< one tensor
    unused,  ///< two, of which it uses that of the tensor's own name
    only,    ///< one, under the second name alone
  };
  std::string second, own;  ///< "cls.predictions.bias", "cls.predictions.decoder.bias"
  Kind kind = Kind::same;
};

/// What the files say of the model an adapter belongs to.
struct ModelDescription {
  std::string task_type;     ///< Hugging Face PEFT's: "SEQ_CLS", "FEATURE_EXTRACTION", …; empty: none
  std::string name_or_path;  ///< where the base came from; empty: unknown
  std::string model_type;    ///< Hugging Face's: "bert", …; empty: unknown
  std::vector<SecondName> second_names = {};
};

/// A model that can say what it is. Our own models are; yours may be.
class Described {
 public:
  virtual ~Described() = default;
  virtual ModelDescription describe() const = 0;
};

}  // namespace peft
