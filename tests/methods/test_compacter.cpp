#include "methods/bottleneck_values.h"
#include "models/tiny_bert.h"
#include "peft/methods/compacter.h"
#include "property_suite.h"

using namespace suite;
using peft::PhmOptions;

namespace {

Promise compacter(const PhmOptions& phm) {
  const auto options = peft::BottleneckOptions().reduction_factor(1.5).non_linearity("gelu").phm(phm);
  return {{peft::on(options, peft::all())},
          [phm](const peft::SiteInfo&) {
            const int64_t d = 6, m = 4, n = phm.dim(), k = phm.rank();
            const auto one = phm.factorized_weights() ? n * k * (d / n + m / n) : d * m / n;
            const auto rule = phm.factorized_rule() ? 2 * n * n : n * n * n;
            const auto rules = !phm.learn_rule() ? 0 : phm.shared_rule() ? rule : 2 * rule;
            return 2 * one + rules + (phm.bias() ? d + m : 0);
          },
          /*no_op_at_start=*/false,
          /*whole_gradient=*/true,
          suite::never};
}

const peft::BottleneckImpl& block(const peft::Adapter& adapter, size_t index) {
  return *adapter.layers<peft::BottleneckImpl>().at(index);
}

}  // namespace

TEST_CASE("Compacter keeps the promises of a method", "[compacter]") {
  torch::manual_seed(4);
  const auto join = layer<peft::Residual>("Residual", torch::randn({2, 3, 6}), nn::LayerNormOptions({6}));
  const auto linear = layer<peft::Linear>("Linear", torch::randn({2, 3, 6}), 6, 6);
  for (const auto& layer_case : {join, linear}) {
    check_properties(layer_case, compacter(PhmOptions().dim(2).init_range(0.3)));
    check_properties(layer_case,
                     compacter(PhmOptions().dim(2).rank(2).factorized_rule(true).shared_rule(false)));
    check_properties(
        layer_case, compacter(PhmOptions().dim(2).factorized_weights(false).learn_rule(false).init_range(1)));
    check_properties(layer_case,
                     compacter(PhmOptions().dim(1).shared_weights(true).bias(false).init_range(1)));
  }
}

// Reference: AdapterHub's adapters, tests/reference/bottleneck_values.py.
TEST_CASE("Compacter equals AdapterHub's numbers", "[compacter]") {
  check_join("compacter", residual(), peft::compacter().reduction_factor(2).phm(peft::PhmOptions().dim(2)),
             {{0.6558721662,
               0.1427508742,
               -0.5010986328,
               0.03770781308,
               0.08897809684,
               -1.368259192,
               0,
               0,
               0.3374950886,
               0.9774317741,
               0.8255726099,
               -1.171818972,
               0.4262519777,
               1.010754704,
               0,
               0,
               0,
               0,
               -8.646355855e-05,
               2.989608402e-05,
               4.19218668e-05,
               -7.985431694e-06,
               9.264107939e-05,
               8.156774857e-05,
               4.951890151e-05,
               -1.643169708e-05},
              {-1.425240636, 2.030659914, -0.1752685606, -0.684714973, 0.3300686777, -0.3942002058,
               -1.441986561, 1.251554132},
              {-1.3867437586433, 1.3417457399944, 0.29318615484043, -0.89314386827791, 0.36908502853659,
               -1.3002943435466, -1.0453188709417, 1.3257034785364}});
  check_join(
      "compacter++, all its own", residual(),
      peft::compacter_plus_plus().reduction_factor(2).phm(peft::PhmOptions()
                                                              .dim(2)
                                                              .shared_rule(false)
                                                              .factorized_rule(true)
                                                              .factorized_weights(false)
                                                              .rule_init(peft::PhmRuleInit::uniform)
                                                              .bias(false)),
      {{0.6558721662,     0.1427508742,   0.07265031338,   -0.5010986328,   0.001888424158,  0.007757132873,
        -0.0009793734644, 0.005989812315, -0.00700318208,  -0.00197062362,  -0.008916460909, -0.0008118951228,
        -1.171818972,     0.7980697155,   0.4262519777,    1.010754704,     -0.006382455584, -0.006245696452,
        -0.004145105835,  0.001993973274, -0.007574894466, -0.007704083808, -0.004782407079, 0.00610343786},
       {-1.425240636, 2.030659914, -0.1752685606, -0.684714973, 0.3300686777, -0.3942002058, -1.441986561,
        1.251554132},
       {-1.4263642764715, 2.0290615957308, -0.17420122661419, -0.68383056883555, 0.33081313539368,
        -0.39336754650732, -1.4424077779024, 1.2507118933644}});
  check_join("compacter, all shared", residual(),
             peft::compacter().reduction_factor(2).init_weights_seed(5).phm(
                 peft::PhmOptions().dim(2).shared_weights(true).rank(2).factorized_rule(true)),
             {{0,
               0,
               0,
               0,
               0,
               0,
               -0.3442059755,
               -0.4269663393,
               -0.394633621,
               0.4720109701,
               -0.9911530018,
               -0.5392093062,
               0.4463352859,
               -0.6357845664,
               -0.1611887515,
               1.586276054,
               -0.4554364383,
               0.5639695525,
               0.1816366762,
               -0.5439706445,
               0.04661595821,
               -0.9711202979,
               0.4841151536,
               0.4058804214,
               -0.4121603072,
               0.5430166721,
               -0.4001410306,
               -0.5887750983,
               0.6374204755,
               0.1496033818,
               4.479278505e-05,
               -6.088235386e-05,
               2.389461952e-05,
               4.698884368e-05,
               -0.0001954004838,
               -5.587330816e-05,
               4.295158215e-05,
               -0.0002264317009},
              {-1.425240636, 2.030659914, -0.1752685606, -0.684714973, 0.3300686777, -0.3942002058,
               -1.441986561, 1.251554132},
              {-1.3939429675081, 1.4294708249818, 0.24982829638149, -0.88897602147146, 0.33828311159613,
               -1.2092908949541, -1.0895548833988, 1.3546318261335}});
}

TEST_CASE("A PHM projection is a sum of Kronecker products", "[compacter]") {
  torch::manual_seed(4);
  peft::Linear site(6, 6);
  const auto adapter = peft::add_adapter(
      *site, peft::BottleneckOptions(4).phm(PhmOptions().dim(2).rank(2).shared_rule(false)), peft::all());
  shake(adapter);
  const auto& down = dynamic_cast<const peft::internal::PhmProjection&>(*block(adapter, 0).adapter_down);
  const auto R = down.rule.value(), W = at::bmm(down.W.left, down.W.right);
  const auto H =
      at::kron(R[0].contiguous(), W[0].contiguous()) + at::kron(R[1].contiguous(), W[1].contiguous());
  const auto x = torch::randn({5, 6});
  CHECK(largest(down.forward(x, nullptr).detach(), (at::matmul(x, H) + down.b).detach()) < 1e-6);
}

TEST_CASE("The rule is one tensor that all layers share", "[compacter]") {
  torch::manual_seed(4);
  peft::models::BertModel model(peft_test::tiny());
  model->eval();
  const auto options = peft::compacter().reduction_factor(2).phm(PhmOptions().dim(4).init_range(0.5));
  const auto one = peft::add_adapter(*model, options, "one");
  const auto rule = [](const peft::Adapter& adapter, size_t index) {
    return static_cast<const peft::PhmShared&>(*block(adapter, index).shared()).rule.whole;
  };
  CHECK(rule(one, 0).is_same(rule(one, 3)));
  CHECK(one.named_parameters().front().first ==
        "encoder.layer.0.attention.output.LayerNorm.shared.bottleneck.phm_rule");
  // 2 n k (width / n + size / n) + size + width a block, and n³ once.
  CHECK(one.count() == 4 * (2 * 4 * (8 / 4 + 4 / 4) + 4 + 8) + 64);
  shake(one);
  const auto out = model->forward(peft_test::batch()).last_hidden_state.detach();
  const auto copy = peft::clone(*model);
  const auto twin = peft::adapter(*copy, "one");
  CHECK(rule(twin, 0).is_same(rule(twin, 3)));
  CHECK_FALSE(rule(twin, 0).is_same(rule(one, 0)));
  CHECK(torch::equal(copy->forward(peft_test::batch()).last_hidden_state, out));
  const auto untied = std::dynamic_pointer_cast<peft::models::BertModelImpl>(model->clone());
  CHECK_THROWS_WITH(untied->forward(peft_test::batch()), Contains("copy models with peft::clone"));

  const auto frozen = peft::add_adapter(
      *model, peft::compacter_plus_plus().reduction_factor(2).phm(PhmOptions().learn_rule(false)), "two");
  CHECK(frozen.sites().size() == 2);
  for (const auto& [name, tensor] : frozen.named_parameters())
    CHECK(name.find("phm_rule") == std::string::npos);
  model->to(torch::kFloat64);
  CHECK(rule(one, 3).scalar_type() == torch::kFloat64);
}

TEST_CASE("Compacter refuses widths its products do not divide, at every layer", "[compacter]") {
  peft::models::BertModel model(peft_test::tiny());
  const auto complaint = [&](const peft::BottleneckOptions& options) {
    return peft_test::complaint([&] { peft::add_adapter(*model, options, "one"); });
  };
  CHECK_THAT(complaint(peft::compacter()),
             Contains("4 problems") &&
                 Contains("PHM projections need a width and a bottleneck that 4 divides, but got 8 and 1") &&
                 Contains("encoder.layer.1.output.LayerNorm"));
  CHECK_THAT(complaint(peft::compacter().size(6).phm(PhmOptions().dim(3))),
             Contains("that 3 divides, but got 8 and 6"));
  CHECK_THAT(complaint(peft::compacter().phm(PhmOptions().dim(0))),
             Contains("PhmOptions: dim must be positive"));
  CHECK_THAT(complaint(peft::compacter().phm(PhmOptions().rank(0))),
             Contains("rank must be positive, but got 0"));
  CHECK_THAT(complaint(peft::compacter().phm(PhmOptions().init_range(-1))),
             Contains("init_range must be at least 0"));
  CHECK_THAT(complaint(peft::compacter().init_weights(peft::BottleneckInit::houlsby)),
             Contains("init_weights must be bert"));
  CHECK_THAT(
      complaint(peft::compacter().reduction_factor(2).layer_factors({{1, 1}}).phm(
          PhmOptions().shared_weights(true))),
      Contains("shared PHM weights need one shape at all sites, but got 8 -> 4") && Contains("8 -> 8"));
  CHECK(peft::internal::adapter_names(*model).empty());
}
