// GLUE's metrics beside scikit-learn's and SciPy's.
#include <cstdint>
#include <string>
#include <vector>

#include "catch.h"
#include "glue/metrics.h"

namespace {

using Catch::Matchers::Contains;
using glue::Metric;
using glue::Predictions;

/// As `pseudo_random` of reference/glue_metric_values.py.
std::vector<int> pseudo_random(std::size_t count, std::uint64_t seed) {
  std::vector<int> values;
  for (auto state = seed; values.size() < count;) {
    state = (state * 1103515245 + 12345) % (std::uint64_t{1} << 31);
    values.push_back(static_cast<int>(state / 65536 % 100));
  }
  return values;
}

Predictions classes() {
  const auto right = pseudo_random(200, 1), predicted = pseudo_random(200, 2);
  Predictions rows;
  for (std::size_t i = 0; i < right.size(); ++i) {
    rows.right.push_back(right[i] < 70);
    rows.predicted.push_back(predicted[i] < 75 ? right[i] < 70 : predicted[i] % 2);
  }
  return rows;
}

Predictions scores(bool coarse) {
  const auto right = pseudo_random(200, 1), predicted = pseudo_random(200, 2);
  Predictions rows;
  for (std::size_t i = 0; i < right.size(); ++i) {
    const auto value = 0.03 * right[i] + 0.02 * predicted[i];
    rows.right.push_back(right[i] / 5 / 4.0);
    rows.predicted.push_back(coarse ? static_cast<int>(value) : value);
  }
  return rows;
}

Predictions with_all_predicted(double value) {
  auto rows = classes();
  rows.predicted.assign(rows.predicted.size(), value);
  return rows;
}

}  // namespace

// The numbers are reference/glue_metric_values.py's.
TEST_CASE("accuracy, F1 and Matthews are scikit-learn's", "[glue]") {
  CHECK(glue::accuracy(classes()) == Approx(0.87).epsilon(1e-14));
  CHECK(glue::f1(classes()).value() == Approx(0.9029850746268657).epsilon(1e-14));
  CHECK(glue::matthews(classes()).value() == Approx(0.7137543493135584).epsilon(1e-14));
}

TEST_CASE("a class that is never predicted gives Matthews and F1 of 0, as in scikit-learn", "[glue]") {
  CHECK(glue::matthews(with_all_predicted(1)).value() == 0);
  CHECK(glue::f1(with_all_predicted(0)).value() == 0);
}

TEST_CASE("Pearson and Spearman are SciPy's, ties averaged", "[glue]") {
  CHECK(glue::pearson(scores(false)).value() == Approx(0.811035181110029).epsilon(1e-13));
  CHECK(glue::spearman(scores(false)).value() == Approx(0.8137129970086953).epsilon(1e-13));
  CHECK(glue::spearman(scores(true)).value() == Approx(0.8031345939397015).epsilon(1e-13));
}

TEST_CASE("a correlation is within -1 and 1 however large or small its values are", "[glue]") {
  for (const double factor : {1e-150, 1.0, 1e150}) {
    CHECK(glue::pearson({{factor, 2 * factor, 4 * factor}, {1, 2, 4}}).value() == Approx(1));
    CHECK(glue::pearson({{-factor, -2 * factor, -4 * factor}, {1, 2, 4}}).value() == Approx(-1));
  }
}

TEST_CASE("constant scores have no correlation", "[glue]") {
  CHECK_FALSE(glue::pearson({{2, 2, 2}, {1, 2, 3}}));
  CHECK_FALSE(glue::spearman({{0.1, 0.1, 0.1}, {1, 2, 3}}));
  CHECK_FALSE(glue::pearson({{1, 2, 3}, {2, 2, 2}}));
}

TEST_CASE("data that leaves a metric undefined is refused, with the reason", "[glue]") {
  const auto& cola = glue::glue_task("cola");
  CHECK_NOTHROW(glue::check_defined("dev.tsv", cola, {0, 1}));
  CHECK_THROWS_WITH(glue::check_defined("dev.tsv", cola, {1, 1}),
                    "dev.tsv: Matthews is undefined on this data: it needs rows of both classes, but every "
                    "row is of class 1");
  CHECK_THROWS_WITH(glue::check_defined("dev.tsv", glue::glue_task("MRPC"), {0, 0}),
                    Contains("F1 is undefined") && Contains("needs rows of class 1"));
  CHECK_THROWS_WITH(glue::check_defined("dev.tsv", glue::glue_task("STS-B"), {2.5, 2.5}),
                    Contains("Pearson is undefined") && Contains("every row has 2.5"));
  CHECK_NOTHROW(glue::check_defined("dev.tsv", glue::glue_task("RTE"), {0, 0}));
}
