// PTuningFormat: P-tuned prompts in Hugging Face PEFT's files (peft_type P_TUNING): the vectors alone.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/prompt_settings.h"
#include "peft/methods/p_tuning.h"

namespace peft::internal {

class PTuningFormat final : public PromptFormat {
 public:
  std::string peft_type() const override { return "P_TUNING"; }
  std::string title() const override { return "P-tuned prompt"; }
  nlohmann::json defaults() const override {
    auto json = prompt_defaults();
    json.update(nlohmann::json::parse(R"({
      "encoder_dropout": 0.0, "encoder_hidden_size": null, "encoder_num_layers": 2,
      "encoder_reparameterization_type": "MLP"})"));
    return json;
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const PTuningImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    torch::NoGradGuard no_grad;
    return {{"prompt_embeddings", piece_of(entries).vectors()}};
  }
  std::string untrainable(const Entries&) const override {
    return "the file has the vectors of a P-tuned prompt without the network that made them, so it cannot "
           "train "
           "on (hint: the checkpoint of a run keeps the network)";
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_prompt(entries, json, problems);
    const auto& options = piece_of(entries).options;
    json["encoder_dropout"] = options.dropout();
    json["encoder_hidden_size"] =
        options.hidden_size() ? options.hidden_size() : piece_of(entries).site().width;
    json["encoder_num_layers"] = options.layers();
    json["encoder_reparameterization_type"] = options.encoder() == PromptEncoderKind::lstm ? "LSTM" : "MLP";
    if (!options.table()) {
      notes.emplace_back("the network that makes the prompt is not written: loaded, it is for inference");
    }
  }
  std::function<Part(Target)> read(ConfigFields& fields) const override {
    PTuningOptions options(read_prompt(fields));
    options.table(true);
    const auto kind = fields.string("encoder_reparameterization_type");
    if (kind == "LSTM") {
      options.encoder(PromptEncoderKind::lstm);
    } else if (fields.has("encoder_reparameterization_type") && kind != "MLP") {
      fields.complain("encoder_reparameterization_type", "must be MLP or LSTM", /*decides_shapes=*/false);
    }
    if (fields.has("encoder_hidden_size")) options.hidden_size(fields.integer("encoder_hidden_size", 0, 1));
    options.layers(fields.integer("encoder_num_layers", 2, 1));
    options.dropout(fields.rate("encoder_dropout"));
    return [options](Target target) { return on(options, std::move(target)); };
  }

 private:
  static const PTuningImpl& piece_of(const Entries& entries) {
    return static_cast<const PTuningImpl&>(*entries.front().piece);
  }
};

}  // namespace peft::internal
