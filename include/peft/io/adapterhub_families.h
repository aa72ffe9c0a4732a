// HubFamily: the families of models that AdapterHub adapts, a row each.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace peft::internal {

/// What a place of a model is to AdapterHub.
enum class HubRole : std::uint8_t {
  query,
  key,
  value,
  projections,     ///< query, key and value stacked in one layer
  intermediate,    ///< the first layer of a feed-forward network
  output,          ///< its second layer
  attention_join,  ///< where the attention meets what came in: `mh_adapter`
  output_join,     ///< where the feed-forward network does: `output_adapter`
  attention,       ///< between the projections
  embeddings,      ///< what the first layer reads
  words,           ///< where tokens enter, as wide as their vectors
  convolution,     ///< beside the first layer (DeBERTa)
};

/// One task of a family: transformers' class for it, and what that has as its head.
struct HubTask {
  /// A head of AdapterHub's own making that computes what layers of the class do.
  struct Flexible {
    std::string kind;                ///< its `head_type`
    bool pooled;                     ///< it reads what the base's pooler made
    std::string activation;          ///< between two layers; empty: there is one
    std::vector<std::string> paths;  ///< of the layers, first to last
    std::string note = {};           ///< what the user must know; empty: nothing
  };

  std::string model_class;
  std::vector<std::string> head = {};  ///< paths of its layers, which are its keys too; empty: it has none
  std::vector<Flexible> flexible = {};
};

/// One family of models.
struct HubFamily {
  struct Row {
    HubRole role;
    std::string site;  ///< our path, # for the layer's index
    std::string key;   ///< Python's
  };
  std::string model_type;
  std::string prefix;                    ///< of the base inside a model with a head
  std::map<std::string, HubTask> tasks;  ///< by Hugging Face PEFT's task type
  std::string flexible_class;            ///< the library's own class, which takes any head
  bool has_prompts;                      ///< Python's models take prompts
  std::vector<Row> rows;
  /// What Python's models do otherwise with prompts, for the user; empty: nothing.
  std::string prompts_differ = {};
};

/// The places of an encoder built like BERT. `projection`: what the names of query, key and value end in.
inline std::vector<HubFamily::Row> hub_encoder_rows(const std::string& projection = "") {
  using R = HubRole;
  const std::string layer = "encoder.layer.#.", self = layer + "attention.self.";
  std::vector<HubFamily::Row> rows{
      {R::attention_join, layer + "attention.output.LayerNorm", layer + "attention.output."},
      {R::output_join, layer + "output.LayerNorm", layer + "output."},
      {R::attention, self + "attention", self},
      {R::embeddings, "embeddings.output", ""},
      {R::words, "embeddings.input", ""},
      {R::convolution, "encoder.conv.conv", ""}};
  const std::vector<std::pair<HubRole, std::string>> dense{{R::query, self + "query" + projection},
                                                           {R::key, self + "key" + projection},
                                                           {R::value, self + "value" + projection},
                                                           {R::intermediate, layer + "intermediate.dense"},
                                                           {R::output, layer + "output.dense"}};
  for (const auto& [role, path] : dense) rows.push_back({role, path, path + "."});
  return rows;
}

/// The tasks of an encoder. `name`: what transformers' classes begin with; `head`: the layers of the
/// classifier of texts; `flexible`: AdapterHub's own that are like it.
inline std::map<std::string, HubTask> hub_encoder_tasks(const std::string& name,
                                                        std::vector<std::string> head,
                                                        std::vector<HubTask::Flexible> flexible) {
  return {
      {"SEQ_CLS", {name + "ForSequenceClassification", std::move(head), std::move(flexible)}},
      {"TOKEN_CLS",
       {name + "ForTokenClassification", {"classifier"}, {{"tagging", false, "", {"classifier"}}}}},
      {"QUESTION_ANS",
       {name + "ForQuestionAnswering", {"qa_outputs"}, {{"question_answering", false, "", {"qa_outputs"}}}}},
      {"FEATURE_EXTRACTION", {name + "Model"}}};
}

/// The families whose files are known, a row each; paths and keys without the prefix, those of heads with it.
inline const std::vector<HubFamily>& hub_families() {
  using R = HubRole;
  static const auto families = [] {
    const auto roberta = [](const std::string& model_type, const std::string& name) -> HubFamily {
      const std::vector<std::string> head{"classifier.dense", "classifier.out_proj"};
      return {model_type,
              "roberta.",
              hub_encoder_tasks(name, head, {{"classification", false, "tanh", head}}),
              name + "AdapterModel",
              true,
              hub_encoder_rows()};
    };
    return std::vector<HubFamily>{
        {"bert", "bert.",
         hub_encoder_tasks("Bert", {"classifier"},
                           {{"classification", true, "", {"classifier"}},
                            {"classification", false, "tanh", {"bert.pooler.dense", "classifier"}}}),
         "BertAdapterModel", true, hub_encoder_rows()},
        roberta("roberta", "Roberta"),
        roberta("xlm-roberta", "XLMRoberta"),
        {"deberta-v2", "deberta.",
         hub_encoder_tasks("DebertaV2", {"pooler.dense", "classifier"},
                           {{"classification",
                             false,
                             "gelu",
                             {"pooler.dense", "classifier"},
                             "the head's activation is gelu, as that of every published DeBERTa's pooler: "
                             "'pooler_hidden_act' of the model's config must be it"}}),
         "DebertaV2AdapterModel", true, hub_encoder_rows("_proj"),
         "AdapterHub's DeBERTa lets virtual tokens see padding, so its outputs for padded texts are others"},
        {"gpt2",
         "transformer.",
         {{"CAUSAL_LM", {"GPT2LMHeadModel"}}, {"FEATURE_EXTRACTION", {"GPT2Model"}}},
         "GPT2AdapterModel",
         false,
         {{R::projections, "h.#.attn.c_attn", "h.#.attn.c_attn."},
          {R::intermediate, "h.#.mlp.c_fc", "h.#.mlp.c_fc."},
          {R::output, "h.#.mlp.c_proj", "h.#.mlp.c_proj."},
          {R::attention_join, "h.#.attn_residual", "h.#.attention_adapters."},
          {R::output_join, "h.#.mlp_residual", "h.#.output_adapters."},
          {R::attention, "h.#.attn.attention", "h.#.attn."},
          {R::embeddings, "output", ""}}}};
  }();
  return families;
}

}  // namespace peft::internal
