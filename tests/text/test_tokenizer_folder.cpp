#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "text/tokenizer.h"
#include "text/unigram_values.h"
#include "text/wordpiece_values.h"

namespace {

using nlohmann::json;
using peft_test::TemporaryFolder;
using text::Tokenizer;
using Ids = std::vector<std::int64_t>;

void write(const TemporaryFolder& folder, const std::string& name, const json& content) {
  const bool bytes = content.contains("base64");
  peft_test::write_bytes(
      folder / name.c_str(),
      bytes ? text::internal::decode_base64(content["base64"].get<std::string>()).value() : content.dump());
}

/// The folder of that name.
json folder_of(const std::string& name) {
  for (const json& folder : json::parse(unigram_values::folders_json)) {
    if (folder.at("name") == name) return folder;
  }
  throw std::invalid_argument(name);
}

/// What reading a folder says whose files are changed by a merge patch, which can also take them away.
std::string error_after(const std::string& name, const json& patch) {
  json files = folder_of(name).at("files");
  files.merge_patch(patch);
  const TemporaryFolder folder;
  for (const auto& [file, content] : files.items()) write(folder, file, content);
  try {
    Tokenizer::from_folder(folder.path());
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("A folder without a tokenizer.json gives the ids of transformers' AutoTokenizer", "[tokenizer]") {
  const json folders = json::parse(unigram_values::folders_json);
  CHECK(folders.size() == 7);
  for (const json& made : folders) {
    const TemporaryFolder folder;
    for (const auto& [file, content] : made.at("files").items()) write(folder, file, content);
    const Tokenizer tokenizer = Tokenizer::from_folder(folder.path());
    CAPTURE(made.at("name").get<std::string>());
    CHECK(tokenizer.vocabulary_size() == made.at("size").get<std::int64_t>());
    if (made.at("pad_id").is_null()) {
      CHECK_THROWS_WITH(tokenizer.pad_id(), Contains("names no padding token"));
    } else {
      CHECK(tokenizer.pad_id() == made["pad_id"].get<std::int64_t>());
    }
    CHECK(made.at("encodings").size() == 21);
    for (const json& c : made["encodings"]) {
      CAPTURE(c.dump());
      const auto a = c.at("a").get<std::string>();
      const auto encoding =
          c.contains("b") ? tokenizer.encode(a, c["b"].get<std::string>()) : tokenizer.encode(a);
      CHECK(encoding.ids == c.at("ids").get<Ids>());
      CHECK(encoding.type_ids == c.at("type_ids").get<Ids>());
    }
  }
}

TEST_CASE("A tokenizer.json counts before the other files of a folder", "[tokenizer]") {
  const TemporaryFolder folder;
  write(folder, "config.json", {{"model_type", "deberta-v2"}});
  write(folder, "tokenizer.json", json::parse(unigram_values::tokenizer_json));
  CHECK(Tokenizer::from_folder(folder.path()).encode("the").ids ==
        Tokenizer::from_file(folder / "tokenizer.json").encode("the").ids);
}

TEST_CASE("A tokenizer.json that its settings contradict is refused", "[tokenizer]") {
  const TemporaryFolder folder;
  json tokenizer = json::parse(wordpiece_values::tokenizer_json);
  tokenizer["normalizer"] = {{"type", "BertNormalizer"},
                             {"clean_text", true},
                             {"handle_chinese_chars", true},
                             {"strip_accents", nullptr},
                             {"lowercase", true}};
  write(folder, "tokenizer.json", tokenizer);
  const auto refusal = [&](const json& settings) -> std::string {
    write(folder, "tokenizer_config.json", settings);
    try {
      Tokenizer::from_folder(folder.path());
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(refusal({{"do_lower_case", true}, {"strip_accents", nullptr}, {"tokenize_chinese_chars", true}})
            .empty());
  CHECK(refusal({{"strip_accents", true}}).empty());
  CHECK_THAT(
      refusal({{"do_lower_case", false}}),
      Contains("tokenizer_config.json: 'do_lower_case' is false, but the normalizer of tokenizer.json has "
               "'lowercase': true (hint:"));
  CHECK_THAT(refusal({{"strip_accents", false}}), Contains("'strip_accents' is false"));
  CHECK_THAT(refusal({{"tokenize_chinese_chars", false}}), Contains("'handle_chinese_chars': true"));

  tokenizer.erase("normalizer");
  tokenizer["pre_tokenizer"] = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  write(folder, "tokenizer.json", tokenizer);
  CHECK_THAT(refusal({{"tokenizer_class", "RobertaTokenizerFast"}, {"add_prefix_space", true}}),
             Contains("'add_prefix_space' is true, but the pre_tokenizer of tokenizer.json has "
                      "'add_prefix_space': false"));
  CHECK_THAT(refusal({{"tokenizer_class", "RobertaTokenizer"}}), !Contains("add_prefix_space"));
  CHECK_THAT(refusal({{"tokenizer_class", "RobertaTokenizer"}, {"add_prefix_space", false}}),
             !Contains("add_prefix_space"));
  CHECK_THAT(refusal({{"tokenizer_class", "PreTrainedTokenizerFast"}, {"add_prefix_space", true}}),
             !Contains("add_prefix_space"));
}

TEST_CASE("A folder from which no tokenizer can be made is an error that names what is wrong",
          "[tokenizer]") {
  const auto check = [](const std::string& error, const std::string& what) {
    CHECK_THAT(error, Contains(what));
  };
  check(error_after("DeBERTa", {{"spm.model", nullptr}}), "has neither a tokenizer.json nor the spm.model");
  check(error_after("DeBERTa", {{"spm.model", {{"base64", "YWJj"}}}}),
        "spm.model: must be a SentencePiece model, but");
  check(error_after("RoBERTa", {{"merges.txt", nullptr}}), "nor the merges.txt its tokenizer is made of");
  check(error_after("RoBERTa", {{"config.json", nullptr}}), "does not say of what class its tokenizer is");
  check(error_after("RoBERTa", {{"config.json", {{"model_type", "t5"}}}}),
        "its tokenizer is of the class 't5'");
  check(error_after("RoBERTa", {{"tokenizer_config.json", {{"add_prefix_space", 1}}}}),
        "key 'tokenizer_config.json.add_prefix_space' must be true or false, but got 1");
  check(error_after("RoBERTa", {{"tokenizer_config.json", {{"image_token", "<i>"}}}}),
        "key 'tokenizer_config.json.image_token' is a special token of a kind that is not supported");
  check(error_after("BERT", {{"vocab.txt", {{"base64", "W1BBRF0="}}}}),
        "must be a token of model.vocab, but got '[UNK]'");
  check(error_after("RoBERTa", {{"vocab.json", {{"base64", "eyJhIjogMH0="}}}}),
        "must hold a token for every byte");
  CHECK_THROWS_WITH(Tokenizer::from_folder("absent"), Contains("'absent' has no tokenizer.json"));
}
