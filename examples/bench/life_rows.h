// LifeRows: set C5, what is done with adapters between trainings: inject, switch, merge, save, load.
#pragma once

#include <fmt/format.h>
#include <peft/models/bert.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/session.h"
#include "bench/step_rows.h"

namespace bench {

/// A deed on an encoder with adapters, and how it is undone.
struct Deed {
  std::string name;
  int64_t rank = 8;
  int64_t loaded = 1;    ///< adapters on the model while it is timed
  bool has_peer = true;  ///< else Python would take minutes to get there
  bool merges = false;
};

namespace internal {

inline peft::Adapter inject(nn::Module& model, int64_t rank, const std::string& name) {
  return peft::add_adapter(model, peft::LoraOptions(rank).alpha(16), block_layers(), name);
}

/// Bytes of the files in a folder.
inline double folder_bytes(const std::filesystem::path& folder) {
  double total = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    total += static_cast<double>(entry.file_size());
  return total;
}

}  // namespace internal

/// One deed; ratios are to ours.
inline void measure_deed(Session& session, Row& row, const EncoderCase& shape, const Deed& deed) {
  torch::manual_seed(4);
  const auto model = internal::Encoder(shape.config()).ptr();
  model->to(session.device.device());
  std::vector<peft::Adapter> adapters;
  for (int64_t i = 0; i < deed.loaded; ++i) {
    adapters.push_back(internal::inject(*model, deed.rank, "loaded" + std::to_string(i)));
  }
  if (deed.merges) stir(adapters.front(), 1e-3);
  peft::set_active(*model, std::vector<std::string>{"loaded0"});
  const auto folder = session.scratch.path() / "ours";
  std::filesystem::remove_all(folder);
  row.base = "ours";
  row.facts["layers"] = static_cast<double>(adapters.front().entries().size());
  row.facts["loaded"] = static_cast<double>(deed.loaded);

  Variant ours{"ours", {}, {}};
  if (deed.name == "inject") {
    ours.step = [=] { internal::inject(*model, deed.rank, "more"); };
    ours.undo = [=] { peft::remove_adapter(*model, "more"); };
  } else if (deed.name == "switch") {
    const auto turn = std::make_shared<int64_t>(0);
    ours.step = [=] {
      *turn = (*turn + 1) % deed.loaded;
      peft::set_active(*model, std::vector<std::string>{"loaded" + std::to_string(*turn)});
    };
  } else if (deed.name == "merge") {
    ours.step = [=] { peft::merge(*model); };
    ours.undo = [=] { peft::unmerge(*model); };
  } else if (deed.name == "unmerge") {
    peft::merge(*model);
    ours.step = [=] { peft::unmerge(*model); };
    ours.undo = [=] { peft::merge(*model); };
  } else if (deed.name == "save") {
    ours.step = [=] { peft::save_adapter(adapters.front(), folder); };
  } else {
    peft::save_adapter(adapters.front(), folder);
    ours.step = [=] { peft::load_adapter(*model, folder, "more"); };
    ours.undo = [=] { peft::remove_adapter(*model, "more"); };
  }
  std::vector<Variant> variants{ours};
  if (session.peer && deed.has_peer) {
    const auto reply = session.prepare({{"kind", "life"},
                                        {"deed", deed.name},
                                        {"rank", deed.rank},
                                        {"loaded", deed.loaded},
                                        {"config", shape.python_config()}});
    TORCH_CHECK(reply.at("trainable").get<int64_t>() == adapters.front().count(),
                "Python's adapter must have as many weights as ours, ", adapters.front().count(),
                ", but has ", reply.at("trainable").get<int64_t>());
    variants.push_back({"PEFT", {}});
  }
  interleave(variants, session.budget, session.device, session.peer.get(), row);
  if (std::filesystem::exists(folder)) row.facts["bytes of the files"] = internal::folder_bytes(folder);
}

/// Set C5.
inline void add_life_rows(Plans& plans, bool tiny) {
  auto shape = bert_base(1, 8);
  if (tiny) shape.hidden = shape.intermediate = 32, shape.layers = shape.heads = 2;
  const auto add = [&](const std::string& name, const Deed& deed, bool quick = true) {
    plans.push_back({"C5", name + ", BERT-base", quick,
                     [=](Session& session, Row& row) { measure_deed(session, row, shape, deed); }});
  };
  add("inject", {"inject"});
  add("inject the twelfth", {"inject", 8, 11}, false);
  add("switch, 1 loaded", {"switch"}, false);
  add("switch, 12 loaded", {"switch", 8, 12});
  // Of rank 1: 0.7 GB of adapters.
  add("switch, 1000 loaded", {"switch", 1, tiny ? 20 : 1000, false}, false);
  add("merge", {"merge", 8, 1, true, true});
  add("unmerge", {"unmerge", 8, 1, true, true});
  add("save", {"save"});
  add("load", {"load"});
}

}  // namespace bench
