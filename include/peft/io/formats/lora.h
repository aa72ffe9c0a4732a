// LoraFormat: LoRA in Hugging Face PEFT's files (peft_type LORA).
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/core/random_state.h"
#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/trainable_tokens.h"
#include "peft/io/peft_format.h"
#include "peft/io/peft_places.h"
#include "peft/methods/dora.h"
#include "peft/methods/lora.h"

namespace peft::internal {

/// LoRA and DoRA, and the trainable tokens beside them. A start that is taken out of the base (PiSSA and its
/// like) is written as a plain LoRA of twice the rank on the untouched base.
class LoraFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "LORA"; }
  std::string title() const override { return "LoRA"; }
  nlohmann::json defaults() const override { return lora_defaults(); }
  std::string bias_of_targets() const override { return "lora_only"; }
  bool owns(const PieceImpl& piece) const override { return lora_in(piece) || tokens_in(piece); }
  bool is_targeted(const Adapter::Entry& entry) const override {
    return lora_in(*entry.piece) && !is_parameter(entry);
  }
  bool adapts_whole_modules() const override { return true; }
  std::string unreadable(const Entries& entries) const override {
    for (const auto& entry : entries) {
      if (const auto* lora = lora_in(*entry.piece); lora && lora->options.lora_bias()) {
        const auto init = lora->options.init();
        if (init == LoraInit::mica || init == LoraInit::loftq)
          return std::string("Python has no lora_bias where LoRA starts by ") + to_string(init);
      }
      if (const auto* lora = lora_in(*entry.piece);
          lora && lora->options.init() == LoraInit::loftq && lora->site().fan_in_fan_out) {
        return stored_start(LoraInit::loftq);
      }
      const bool inside = entry.piece->site().files.kind != FileNames::Kind::layer;
      if (inside && is_dora(*entry.piece)) return PeftFormat::unreadable({entry});
      const auto beside = [&](const Adapter::Entry& other) {
        return other.site == entry.site && lora_in(*other.piece);
      };
      if (tokens_in(*entry.piece) && std::any_of(entries.begin(), entries.end(), beside)) {
        return "'" + entry.site->path() + "' trains tokens and carries LoRA, which Python keeps apart";
      }
    }
    return {};
  }

  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    if (const auto* tokens = tokens_in(piece)) return {token_tensor(*tokens)};
    const auto& lora = *lora_in(piece);
    return tensors_with(piece, lora.full_A(), lora.full_B());
  }
  std::vector<DiskTensor> loaded_tensors(const PieceImpl& piece) const override {
    if (const auto* tokens = tokens_in(piece)) return {token_tensor(*tokens)};
    const auto& lora = *lora_in(piece);
    return tensors_with(piece, lora.lora_A, lora.lora_B);
  }
  /// The projections of an attention share one rank and one scale: the smaller factors are padded with zeros,
  /// the other scale is folded into B. PEFT 0.21.2 adds the product of the output's factors twice
  /// (huggingface/peft, pull request 3774), so half of it is written, and doubled when it is read.
  std::vector<DiskTensor> written_tensors(const Adapter::Entry& entry, const Entries& all) const override {
    if (!is_part(entry)) return tensors(*entry.piece);
    const auto& lora = *lora_in(*entry.piece);
    const auto common = written(entry, all);
    const auto missing = common.rank - lora.rank * multiple(lora);
    const auto A = torch::constant_pad_nd(lora.full_A(), {0, 0, 0, missing});
    const auto B = torch::constant_pad_nd(lora.full_B(), {0, missing});
    const auto factor = scale_of(lora) / common.scale(lora.options.rslora()) / (is_output(entry) ? 2 : 1);
    return tensors_with(*entry.piece, A, factor == 1 ? B : B * factor);
  }
  /// Where one projection of an attention is adapted, Python has factors of the other too: here of product 0.
  std::vector<DiskTensor> shared_tensors(const Entries& all) const override {
    std::vector<DiskTensor> absent;
    for (const auto& entry : all) {
      if (!is_part(entry) || projections(entry, all).size() > 1) continue;
      const auto info = entry.site->info();
      const auto A = written_tensors(entry, all).front().tensor.detach();
      const auto rows = info.fan_in.front() * (is_output(entry) ? 3 : 1);
      const auto prefix =
          std::string(model_prefix) + info.target() + (is_output(entry) ? "." : ".base_layer.out_proj.");
      absent.push_back({prefix + "lora_A.weight", A.clone()});
      absent.push_back({prefix + "lora_B.weight", torch::zeros({rows, A.size(0)}, A.options())});
    }
    return absent;
  }
  std::string current_key(const std::string& key) const override {
    const std::string old = ".lora_magnitude_vector.weight";
    return key.ends_with(old) ? key.substr(0, key.size() - std::string(".weight").size()) : key;
  }

  void write(const Entries& all, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    const auto entries = loras_of(all);
    write_tokens(all, json);
    const auto& lead = *lora_in(*entries.front().piece);
    const auto& first = lead.options;
    const auto lead_is_dora = is_dora(*entries.front().piece);
    for (const auto& entry : entries) {
      const auto& other = lora_in(*entry.piece)->options;
      const auto where = "'" + entry.site->path() + "' must ";
      const auto as = " as '" + entries.front().site->path() +
                      "', for one config holds both (hint: make them two adapters)";
      if (is_dora(*entry.piece) != lead_is_dora) {
        problems.add(where + (lead_is_dora ? "carry DoRA" : "carry LoRA without DoRA") + as);
      }
      if (other.gating()) {
        problems.add("'" + entry.site->path() +
                     "' carries LoRA with gating, which PEFT has not (hint: save_adapterhub)");
      }
      if (other.rslora() != first.rslora() || other.lora_bias() != first.lora_bias()) {
        problems.add(where + "have the same rslora and lora_bias" + as);
      }
      if ((other.init() == LoraInit::mica) != (first.init() == LoraInit::mica) ||
          (other.init() == LoraInit::loftq) != (first.init() == LoraInit::loftq)) {
        problems.add(where + "start" + as);
      }
      if (other.init() == LoraInit::loftq &&
          (other.loftq_bits() != first.loftq_bits() || other.loftq_iter() != first.loftq_iter())) {
        problems.add(where + "have the same loftq_bits and loftq_iter" + as);
      }
    }
    write_parameters(entries, json, notes, problems);
    json["use_rslora"] = first.rslora();
    json["use_dora"] = lead_is_dora;
    json["lora_bias"] = first.lora_bias();
    write_lora_init(first, json);
    write_ranks(entries, json);
    add_notes(entries, notes);
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    LoraOptions lora(fields.integer("r", 8, 1));
    const auto finite = [](double value) { return std::isfinite(value); };
    lora.alpha(fields.number("lora_alpha", 8.0, finite, "must be a finite number"));
    lora.dropout(fields.rate("lora_dropout"));
    lora.rslora(fields.boolean("use_rslora")).lora_bias(fields.boolean("lora_bias"));
    fields.boolean("fan_in_fan_out");  // the layer knows
    read_lora_init(fields, lora);
    lora.rank_pattern(fields.ranks("rank_pattern")).alpha_pattern(fields.numbers("alpha_pattern"));
    fields.refuse_features({"use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens",
                            "arrow_config", "kasa_config", "velora_config", "monteclora_config",
                            "megatron_config", "ensure_weight_tying"});
    const bool dora = fields.boolean("use_dora");
    const bool pythons = fields.string("peft_type") == peft_type();
    const bool from_stored = pythons && (lora.init() == LoraInit::olora || lora.init() == LoraInit::loftq);
    return [lora, dora, from_stored](Target target) {
      auto part = dora ? on(DoraOptions(lora), std::move(target)) : on(lora, std::move(target));
      if (!from_stored) return part;
      part.refusal = [before = part.refusal, lora](const SiteInfo& site) {
        return site.fan_in_fan_out ? stored_start(lora.init()) : before(site);
      };
      return part;
    };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_lora_targets(model_type);
  }

  std::vector<Part> further_parts(ConfigFields& fields,
                                  const std::function<Part(Target)>& part) const override {
    std::vector<Part> parts;
    if (const auto names = fields.strings("target_parameters"); !names.empty()) {
      if (fields.boolean("fan_in_fan_out")) {
        fields.complain("fan_in_fan_out", "must be false where 'target_parameters' is given");
      }
      parts.push_back(part(named(names)));
    }
    if (!fields.has(tokens_key)) return parts;
    auto lists = fields.value(tokens_key);
    if (lists.is_array()) lists = {{input_embedding_name(fields.model_type()), lists}};
    if (!lists.is_object())
      fields.complain(tokens_key, "must be a list of tokens, or map names to such lists");
    for (const auto& [name, list] : lists.items()) {
      const auto tokens = read_tokens(fields, tokens_key, list);
      if (tokens.empty()) continue;
      // Python takes every module whose path ends in the name, dot or not.
      parts.push_back(on(TrainableTokensOptions(tokens), matching(".*" + escape_regex(name))));
    }
    return parts;
  }

  /// What the start took out of the base, or put in its place, follows from the base again.
  void complete(const Entries& entries) const override {
    const RandomStateGuard kept;
    for (const auto& entry : loras_of(entries)) {
      auto& lora = *lora_in(*entry.piece);
      if (is_output(entry)) lora.alpha *= 2;
      if (!lora.lora_A_0.defined() && !lora.loftq_weight.defined()) continue;
      entry.piece->to(torch::kCPU, torch::kFloat32);
      entry.piece->initialize(*entry.site->base_view());
      entry.piece->place();
    }
  }

 private:
  /// Of a Conv1D, whose matrix has the inputs first.
  static std::string stored_start(LoraInit init) {
    return std::string("Python takes the start '") + to_string(init) +
           "' of a Conv1D from its matrix as it is stored, inputs first, so its factors are others";
  }
  static bool is_dora(const PieceImpl& piece) { return dynamic_cast<const DoraImpl*>(&piece) != nullptr; }
  /// The LoRA that a piece is or holds, or nullptr.
  static const LoraImpl* lora_in(const PieceImpl& piece) {
    if (const auto* dora = dynamic_cast<const DoraImpl*>(&piece)) return dora->lora.get();
    return dynamic_cast<const LoraImpl*>(&piece);
  }

  static LoraImpl* lora_in(PieceImpl& piece) {
    return const_cast<LoraImpl*>(lora_in(static_cast<const PieceImpl&>(piece)));
  }

  static bool is_parameter(const Adapter::Entry& entry) {
    return entry.site->info().files.kind == FileNames::Kind::parameter;
  }
  static bool is_part(const Adapter::Entry& entry) {
    return lora_in(*entry.piece) && entry.site->info().files.kind == FileNames::Kind::part;
  }
  static bool is_output(const Adapter::Entry& entry) {
    return is_part(entry) && !entry.site->info().files.level.empty();
  }
  /// The adapted projections of an entry's attention.
  static Entries projections(const Adapter::Entry& entry, const Entries& all) {
    Entries found;
    std::copy_if(all.begin(), all.end(), std::back_inserter(found), [&](const Adapter::Entry& other) {
      return is_part(other) && other.site->info().target() == entry.site->info().target();
    });
    return found;
  }
  /// s as trained.
  static double scale_of(const LoraImpl& lora) {
    const auto r = static_cast<double>(lora.rank);
    return lora.alpha / (lora.options.rslora() ? std::sqrt(r) : r);
  }
  /// What the config says of a layer.
  struct Written {
    int64_t rank;
    double alpha;
    double scale(bool rslora) const {
      const auto r = static_cast<double>(rank);
      return alpha / (rslora ? std::sqrt(r) : r);
    }
  };
  static Written written(const Adapter::Entry& entry, const Entries& all) {
    const auto& lora = *lora_in(*entry.piece);
    if (!is_part(entry)) return {lora.rank * multiple(lora), written_alpha(lora, lora.alpha)};
    int64_t rank = 0;
    double scale = 0;
    for (const auto& other : projections(entry, all)) {
      const auto& piece = *lora_in(*other.piece);
      rank = std::max(rank, piece.rank * multiple(piece));
      if (scale == 0) scale = scale_of(piece);
    }
    const auto r = static_cast<double>(rank);
    if (scale == 0) scale = 1;  // no product counts; any scale of B = 0 says so
    return {rank, scale * (lora.options.rslora() ? std::sqrt(r) : r)};
  }

  /// Python's parameters are nested by the order of their registration, whatever the order of the list.
  static void write_parameters(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
                               Problems& problems) {
    const auto dropout = lora_in(*entries.front().piece)->options.dropout();
    json["lora_dropout"] = dropout;
    std::vector<std::string> paths;
    bool drops = false;
    for (const auto& entry : entries) {
      drops = drops || lora_in(*entry.piece)->options.dropout() > 0;
      if (is_parameter(entry)) paths.push_back(entry.site->path());
      if ((is_parameter(entry) || is_part(entry)) && lora_in(*entry.piece)->options.lora_bias()) {
        problems.add("'" + entry.site->path() + "': Python has no lora_bias there");
      }
    }
    if (paths.empty()) return;
    json["target_parameters"] = paths;
    if (json["target_modules"].is_null()) json["target_modules"] = nlohmann::json::array();
    if (!drops) return;
    json["lora_dropout"] = 0.0;
    notes.emplace_back("dropout is written as 0, for Python allows none where parameters are adapted");
  }

  static constexpr const char* tokens_key = "trainable_token_indices";
  static const TrainableTokensImpl* tokens_in(const PieceImpl& piece) {
    return dynamic_cast<const TrainableTokensImpl*>(&piece);
  }
  static DiskTensor token_tensor(const TrainableTokensImpl& tokens) {
    return {"token_adapter.trainable_tokens_delta", tokens.trainable_tokens_delta};
  }
  static Entries loras_of(const Entries& all) {
    Entries loras;
    std::copy_if(all.begin(), all.end(), std::back_inserter(loras),
                 [](const Adapter::Entry& entry) { return lora_in(*entry.piece) != nullptr; });
    return loras;
  }
  static void write_tokens(const Entries& all, nlohmann::json& json) {
    for (const auto& entry : all) {
      const auto* tokens = tokens_in(*entry.piece);
      if (tokens) json[tokens_key][entry.site->path()] = tokens->options.indices();
    }
  }

  static std::vector<DiskTensor> tensors_with(const PieceImpl& piece, const Tensor& A, const Tensor& B) {
    auto tensors = lora_tensors(piece.site(), A, B, lora_in(piece)->lora_B_bias);
    if (const auto* dora = dynamic_cast<const DoraImpl*>(&piece)) {
      tensors.push_back({"lora_magnitude_vector", dora->lora_magnitude_vector});
    }
    return tensors;
  }

  /// Several blocks of rows (`enable`), each with factors of its own, are in Python one LoRA of as many times
  /// the rank with a block-diagonal B; a start taken out of the base is another one beside the trained one.
  /// The scale stays.
  static int64_t multiple(const LoraImpl& lora) {
    if (lora.lora_A_0.defined()) return 2;
    const auto& enable = lora.options.enable();
    return enable.empty() ? 1 : std::count(enable.begin(), enable.end(), true);
  }
  static double written_alpha(const LoraImpl& lora, double alpha) {
    const auto k = static_cast<double>(multiple(lora));
    return alpha * (lora.options.rslora() ? std::sqrt(k) : k);
  }

  static void write_ranks(const Entries& entries, nlohmann::json& json) {
    const auto& lead = *lora_in(*entries.front().piece);
    const auto rank = lead.options.rank() * multiple(lead);
    const auto alpha = written_alpha(lead, lead.options.alpha());
    std::vector<Pattern<int64_t>> rank_pattern;
    std::vector<Pattern<double>> alpha_pattern;
    for (const auto& [pattern, value] : lead.options.rank_pattern())
      rank_pattern.emplace_back(pattern, value * multiple(lead));
    for (const auto& [pattern, value] : lead.options.alpha_pattern())
      alpha_pattern.emplace_back(pattern, written_alpha(lead, value));
    std::vector<std::pair<std::string, int64_t>> ranks;
    std::vector<std::pair<std::string, double>> alphas;
    for (const auto& entry : entries) {
      const auto said = written(entry, entries);
      ranks.emplace_back(entry.site->info().target(), said.rank);
      alphas.emplace_back(entry.site->info().target(), said.alpha);
    }
    json["r"] = rank;
    json["lora_alpha"] = plain_number(alpha);
    json["rank_pattern"] = pattern_json(rank_pattern, rank, ranks);
    json["alpha_pattern"] = pattern_json(alpha_pattern, alpha, alphas);
  }

  static void add_notes(const Entries& entries, std::vector<std::string>& notes) {
    const auto dropout = lora_in(*entries.front().piece)->options.dropout();
    const auto any = [&](const auto& holds) {
      return std::any_of(entries.begin(), entries.end(),
                         [&](const auto& entry) { return holds(*lora_in(*entry.piece)); });
    };
    const bool parameters = std::any_of(entries.begin(), entries.end(), is_parameter);
    if (!parameters && any([&](const LoraImpl& lora) { return lora.options.dropout() != dropout; })) {
      notes.push_back("the layers have several rates of dropout; the first layer's, " +
                      nlohmann::json(dropout).dump() + ", is written");
    }
    if (any([](const LoraImpl& lora) { return lora.scale() != 1.0; })) {
      notes.emplace_back(scale_note);
    }
    if (any([](const LoraImpl& lora) { return !lora.lora_A_0.defined() && multiple(lora) > 1; })) {
      notes.emplace_back(
          "LoRA on blocks of rows (enable) is written as one of a higher rank with a block-diagonal B");
    }
    if (any([](const LoraImpl& lora) { return lora.lora_A_0.defined(); })) {
      notes.emplace_back(
          "the start that was taken out of the base is written with the rest, as a plain LoRA of twice the "
          "rank on the base as it was");
    }
    if (any([](const LoraImpl& lora) { return lora.loftq_weight.defined(); })) {
      notes.emplace_back(
          "the quantised weights are not written: whoever loads the adapter quantises the base anew, Python "
          "with bitsandbytes");
    }
  }
};

}  // namespace peft::internal
