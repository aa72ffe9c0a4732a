// Recipes of GLUE's tasks: every one is a method of the program.
#include <string>
#include <vector>

#include "catch.h"
#include "finetune/method.h"
#include "glue/recipe.h"
#include "glue/tasks.h"

using Catch::Matchers::Contains;

TEST_CASE("every recipe, default or published, is a method with options in their ranges", "[glue]") {
  constexpr int64_t steps = 300000;  // more than any published schedule needs
  const auto check = [&](const std::string& name, const std::string& task, const glue::Recipe& recipe) {
    INFO(task << " " << name << ": " << recipe.method);
    finetune::Method method;
    REQUIRE_NOTHROW(method = finetune::parse_method(recipe.method, {}, "classifier", steps));
    CHECK(method.head_only() == (name == "head"));
    CHECK(recipe.rate > 0);
    CHECK(recipe.epochs >= 3);
  };
  for (const auto& name : glue::recipe_names(false)) check(name, "", glue::default_recipe(name));
  std::vector<std::string> absent;
  for (const auto& task : glue::glue_tasks()) {
    for (const auto& name : glue::recipe_names(true)) {
      if (const auto recipe = glue::published_recipe(name, task.name)) {
        check(name, task.name, *recipe);
      } else {
        absent.push_back(task.name + " " + name);
      }
    }
  }
  CHECK(absent ==
        std::vector<std::string>{"WNLI lora", "WNLI adalora", "WNLI increlora", "WNLI increlora-8"});
}

TEST_CASE("a published recipe is asked for by name, and refused where there is none", "[glue]") {
  CHECK_THAT(
      glue::published_recipe("adalora", "RTE")->method,
      Contains("init_rank=2,target_rank=1,tinit=600,tfinal=1800,delta_t=1,alpha=32,orth_reg_weight=0.3"));
  CHECK_THAT(glue::published_recipe("increlora-8", "QNLI")->method,
             Contains("target_rank=8,rank=1,incre_rank_num=4,top_h=22,init_warmup=500"));
  CHECK_THAT(glue::published_recipe("increlora", "RTE")->method, Contains("adapt_positions=false"));
  CHECK(glue::published_recipe("bitfit", "RTE")->to_json()["eps"] == 1e-6);
  CHECK(glue::published_recipe("lora", "RTE")->to_json()["optimizer"] == "adamw_hf");
  CHECK_FALSE(glue::default_recipe("lora").to_json().contains("optimizer"));
  CHECK(glue::published_recipe("lora", "CoLA")->epochs == 80);
  CHECK_THROWS_WITH(glue::published_recipe("ia3", "RTE"), Contains("no published recipe of ia3; nearest"));
}

TEST_CASE("a method with keys of its own is trained as its kind is by default", "[glue]") {
  const auto own = glue::default_recipe("ia3:lr=1e-3");
  CHECK(own.method == "ia3:lr=1e-3");
  CHECK(own.rate == glue::default_recipe("ia3").rate);
  CHECK(glue::default_recipe("vera").rate == glue::default_recipe("lora").rate);
}
