#include <string>
#include <vector>

#include "io/temporary_folder.h"
#include "models/tiny_bert.h"
#include "peft/io/adapterhub.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using Names = std::vector<std::string>;
using Bert = peft::models::BertForSequenceClassification;

namespace {

Tensor logits(Bert& model) { return model->forward(peft_test::batch()).logits.detach(); }

}  // namespace

TEST_CASE("LoRA, a bottleneck and a prefix are active together, and each is saved on its own", "[together]") {
  auto model = peft_test::filled_classifier();
  const auto plain = logits(model);
  torch::manual_seed(1);
  const auto low = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query", "value"}), "low");
  const auto neck = peft::add_adapter(*model, peft::houlsby().reduction_factor(4), "neck");
  const auto prefix = peft::add_adapter(*model, peft::PrefixOptions(3), "prefix");
  const Names all{"low", "neck", "prefix"};
  CHECK(peft::active_adapters(*model) == all);
  for (const auto& adapter : {low, neck, prefix}) shake(adapter);

  // Each of them counts, and their order on different sites does not.
  const auto together = logits(model);
  for (const auto& name : all) {
    auto others = all;
    std::erase(others, name);
    peft::set_active(*model, others);
    CHECK(largest(logits(model), together) > 1e-4);
    peft::set_active(*model, Names{name});
    CHECK(largest(logits(model), plain) > 1e-4);
  }
  peft::set_active(*model, Names{"prefix", "neck", "low"});
  CHECK(torch::equal(logits(model), together));

  // Tensors of all three get gradients in one step.
  for (const auto& adapter : {low, neck, prefix}) {
    for (auto& tensor : adapter.parameters()) tensor.set_requires_grad(true);
  }
  model->forward(peft_test::batch()).logits.square().sum().backward();
  for (const auto& adapter : {low, neck, prefix}) {
    CHECK(adapter.count() > 0);
    for (const auto& [name, tensor] : adapter.named_parameters()) {
      INFO(name);
      CHECK(tensor.grad().defined());
    }
  }

  const peft_test::TemporaryFolder folder;
  peft::save_adapter(low, folder / "low");
  peft::save_adapterhub(*model, "neck", folder / "neck");
  peft::save_adapter(prefix, folder / "prefix");
  auto fresh = peft_test::filled_classifier();
  peft::load_adapter(*fresh, folder / "low", "low");
  peft::load_adapterhub(*fresh, folder / "neck", "neck");
  peft::load_adapter(*fresh, folder / "prefix", "prefix");
  peft::set_active(*fresh, all);
  CHECK(torch::equal(logits(fresh), together));
  for (const auto& name : all) {
    peft::set_active(*model, Names{name});
    peft::set_active(*fresh, Names{name});
    CHECK(torch::equal(logits(fresh), logits(model)));
  }

  // In one batch, side by side.
  peft::set_active(*model, peft::Parallel("low", "neck", "prefix"));
  const auto rows = logits(model);
  for (int64_t i = 0; i < 3; ++i) {
    peft::set_active(*model, Names{all[static_cast<size_t>(i)]});
    CHECK(largest(rows.narrow(0, 2 * i, 2), logits(model)) < 1e-6);
  }

  for (const auto& name : all) peft::remove_adapter(*model, name);
  CHECK(torch::equal(logits(model), plain));
}
