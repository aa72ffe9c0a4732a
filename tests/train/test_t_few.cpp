#include <peft/train/t_few.h>

#include <cmath>

#include "methods/reference_values.h"

using namespace suite;
using peft::TFewOptions;

namespace {

const int64_t padding = 0;

Tensor choices() {
  return torch::tensor({3, 1, 0, 0, 2, 4, 1, 0, 1, 1, 4, 2, 4, 2, 2, 0, 1, 0, 0, 0, 3, 3, 1, 2})
      .view({2, 3, 4});
}
Tensor labels() { return torch::tensor({1, 0}); }
Tensor logits() { return fill({2, 3, 4, 5}, 1) * 3; }

}  // namespace

// Reference: tests/reference/t_few_values.py.
TEST_CASE("The T-Few losses equal the authors' formulas", "[t_few]") {
  const auto x = logits().requires_grad_(true);
  const auto losses =
      peft::t_few_losses(x, choices(), labels(), TFewOptions().choice_weight(0.5).unlikelihood_weight(2));
  check_values(torch::stack({losses.language_model, losses.choice, losses.unlikelihood}),
               {1.054144166, 0.4305761043, 0.1074996119});
  losses.total.backward();
  check_values(x.grad()[0][1][2],
               {0.02059693282, -0.141926714, 0.009162711703, 0.02780295117, 0.08436411828});
  check_values(x.grad()[1][2][0],
               {-0.001249178666, -0.003790455773, -0.01150160129, 0.02165781584, -0.00511658011});
  check_values(peft::choice_scores(x, choices()),
               {1.906457477, 1.341365001, 2.687716323, 0.7669233303, 3.063975169, 2.410216323});
  check_values(peft::choice_scores(x, choices(), TFewOptions().length_norm(0.5)),
               {2.69613802, 2.323312333, 5.375432646, 1.328350174, 3.063975169, 4.820432646});
  check_values(peft::t_few_losses(x, choices(), labels(), TFewOptions().length_norm(0)).choice,
               {0.5939667695});
}

TEST_CASE("The T-Few losses of undecided logits are what the formulas say by hand", "[t_few]") {
  // Every token has p = 1/5; 6 tokens belong to correct choices, 11 to wrong ones, 7 of 24 places are
  // padding.
  const auto losses = peft::t_few_losses(torch::zeros({2, 3, 4, 5}, torch::kFloat64), choices(), labels());
  check_values(losses.language_model, {std::log(5.0)});
  check_values(losses.choice, {std::log(3.0)});
  check_values(losses.unlikelihood, {-(11 * std::log(1 - 0.2 + 0.01) + 13 * std::log(1.01)) / 11});
  check_values(losses.total, {(losses.language_model + losses.choice + losses.unlikelihood).item<double>()});
}

TEST_CASE("The T-Few losses have the gradients of their values", "[t_few]") {
  auto x = logits().requires_grad_(true);
  const auto loss = [&] { return peft::t_few_losses(x, choices(), labels()).total; };
  loss().backward();
  const auto gradient = x.grad().view(-1);
  torch::NoGradGuard no_grad;
  auto flat = x.view(-1);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const double value = flat[i].item<double>(), h = 1e-5;
    flat[i] = value + h;
    const auto up = loss().item<double>();
    flat[i] = value - h;
    const auto down = loss().item<double>();
    flat[i] = value;
    REQUIRE_THAT(gradient[i].item<double>(), WithinAbs((up - down) / (2 * h), 1e-9));
  }
}

TEST_CASE("Padding never counts as a target, whatever its token", "[t_few]") {
  const auto other =
      choices().masked_fill(choices() == padding, 4) + (choices() == 4) * -4;  // 0 and 4 swapped
  const auto swapped = logits().index_select(3, torch::tensor({4, 1, 2, 3, 0}));
  const auto a = peft::t_few_losses(logits(), choices(), labels());
  const auto b = peft::t_few_losses(swapped, other, labels(), TFewOptions().padding(4));
  CHECK(torch::allclose(a.total, b.total, 0, 1e-12));
  auto disturbed = logits();
  disturbed[0][0].narrow(0, 2, 2).add_(5);
  disturbed[0][0][3][1] = 40;
  CHECK(torch::equal(peft::t_few_losses(disturbed, choices(), labels()).total, a.total));
}

TEST_CASE("The T-Few losses name what does not go together", "[t_few]") {
  const auto losses = [](const Tensor& x, const Tensor& c, const Tensor& y, const TFewOptions& options = {}) {
    peft::t_few_losses(x, c, y, options);
  };
  CHECK_THROWS_WITH(losses(logits()[0], choices(), labels()),
                    Contains("logits must be (batch, choices, time, vocabulary) with choices (2, 3, 4)") &&
                        Contains("(3, 4, 5)"));
  CHECK_THROWS_WITH(losses(logits(), choices()[0], labels()), Contains("choices must be token ids"));
  CHECK_THROWS_WITH(losses(logits(), choices().to(torch::kFloat), labels()), Contains("Float"));
  CHECK_THROWS_WITH(losses(logits(), choices(), torch::tensor({0, 3})),
                    Contains("labels must be from 0 to 2, but got 3"));
  CHECK_THROWS_WITH(losses(logits(), choices(), torch::tensor({0, -1})), Contains("but got -1"));
  CHECK_THROWS_WITH(losses(logits(), choices(), torch::tensor({0})), Contains("2 numbers of choices"));
  CHECK_THROWS_WITH(losses(logits().narrow(1, 0, 1), choices().narrow(1, 0, 1), torch::tensor({0, 0})),
                    Contains("at least two choices, but got 1"));
  CHECK_THROWS_WITH(losses(logits(), choices().masked_fill(choices() == 1, 0), labels()),
                    Contains("a choice must have a token, but got one of padding (0) alone"));
  CHECK_THROWS_WITH(losses(logits(), choices(), labels(), TFewOptions().length_norm(-1)),
                    Contains("length_norm must be at least 0, but got -1"));
}
