// NewBiasFormat: biases for layers that have none, in files of this library's own.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/peft_format.h"
#include "peft/methods/new_bias.h"

namespace peft::internal {

class NewBiasFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "NEW_BIAS"; }
  std::string title() const override { return "new bias"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({"modules_to_save": null, "target_modules": null})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const NewBiasImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    return {{"new_bias", static_cast<const NewBiasImpl&>(piece).bias}};
  }
  void write(const Entries&, nlohmann::json&, std::vector<std::string>&, Problems&) const override {}
  std::function<Part(Target)> read(ConfigFields&) const override {
    return [](Target target) { return on(NewBiasOptions(), std::move(target)); };
  }
  std::string unreadable(const Entries&) const override {
    return "Python has no biases for layers without one";
  }
};

}  // namespace peft::internal
