#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "text/bpe_trainer.h"
#include "text/bpe_values.h"
#include "text/tokenizer.h"

namespace {

using nlohmann::json;
using peft_test::TemporaryFolder;
using text::Tokenizer;

const json& small() {
  static const json tokenizer = json::parse(bpe_values::tokenizer_json);
  return tokenizer;
}

Tokenizer load(const json& tokenizer) {
  const TemporaryFolder folder;
  peft_test::write_bytes(folder / "tokenizer.json", tokenizer.dump());
  return Tokenizer::from_file(folder / "tokenizer.json");
}

/// The tokenizer of a named variant.
Tokenizer variant(const std::string& name) {
  static const json patches = json::parse(bpe_values::variants_json);
  json tokenizer = small();
  tokenizer.merge_patch(patches.at(name));
  if (name == "nothing after") tokenizer["post_processor"] = nullptr;  // what a patch cannot say
  return load(tokenizer);
}

/// What reading the file says after a change at a JSON pointer; empty if it is read. `remove` takes the key
/// away.
std::string error_after(const char* pointer, const json& value, bool remove = false) {
  json tokenizer = small();
  const json::json_pointer place(pointer);
  if (remove) {
    tokenizer[place.parent_pointer()].erase(place.back());
  } else {
    tokenizer[place] = value;
  }
  try {
    load(tokenizer);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

std::vector<std::string> words(const std::string& given) {
  const std::u32string code_points = text::decode_utf8(given);
  std::vector<std::string> result;
  for (const auto word : text::split_gpt2_words(code_points)) result.push_back(text::encode_utf8(word));
  return result;
}

using Words = std::vector<std::string>;

}  // namespace

TEST_CASE("Byte-level BPE gives the ids and type ids of Hugging Face's tokenizers", "[bpe]") {
  std::map<std::string, int> compared;
  const json cases = json::parse(bpe_values::encodings_json);
  const json variants = json::parse(bpe_values::variants_json);
  for (const auto& [name, patch] : variants.items()) {
    const Tokenizer tokenizer = variant(name);
    for (const json& c : cases) {
      if (c.at("variant") != name) continue;
      ++compared[name];
      CAPTURE(c.dump());
      const auto a = c.at("a").get<std::string>();
      const auto length = c.value("max_length", Tokenizer::no_limit);
      const auto encoding = c.contains("b") ? tokenizer.encode(a, c["b"].get<std::string>(), length)
                                            : tokenizer.encode(a, length);
      CHECK(encoding.ids == c.at("ids").get<std::vector<std::int64_t>>());
      CHECK(encoding.type_ids == c.at("type_ids").get<std::vector<std::int64_t>>());
    }
    CHECK(compared[name] >= 7);
  }
  CHECK(compared.size() == 10);
  CHECK(compared["roberta"] > 30);
}

TEST_CASE("Byte-level BPE makes Hugging Face's texts of ids", "[bpe]") {
  const std::map<std::string, Tokenizer> tokenizers{{"as it is", variant("as it is")},
                                                    {"roberta", variant("roberta")}};
  const json cases = json::parse(bpe_values::decodings_json);
  CHECK(cases.size() > 70);
  for (const json& c : cases) {
    CAPTURE(c.dump());
    const auto& tokenizer = tokenizers.at(c.at("variant").get<std::string>());
    CHECK(tokenizer.decode(c.at("ids").get<std::vector<std::int64_t>>(), c.at("skip").get<bool>()) ==
          c.at("text").get<std::string>());
  }
}

TEST_CASE("Byte-level BPE gives every text back", "[bpe]") {
  const Tokenizer tokenizer = load(small());
  std::u32string all;
  for (char32_t c = 0; c < 0x30000; c += 7) {
    if (c < 0xD800 || c > 0xDFFF) all += c;
  }
  const std::string given = text::encode_utf8(all);
  CHECK(tokenizer.decode(tokenizer.encode(given).ids) == given);
  CHECK(tokenizer.decode({}).empty());
  CHECK(tokenizer.decode({0}).empty());
  CHECK(tokenizer.decode({0}, /*skip_special_tokens=*/false) == "<|endoftext|>");
  CHECK_THROWS_WITH(tokenizer.decode({300}), Contains("no token has the id 300"));
}

TEST_CASE("GPT-2's words are cut as its expression says", "[bpe]") {
  CHECK(words("").empty());
  CHECK(words("it's we'll I'd'x") == Words{"it", "'s", " we", "'ll", " I", "'d", "'", "x"});
  CHECK(words("'S ''s") == Words{"'", "S", " ''", "s"});
  CHECK(words("a1,2 b") == Words{"a", "1", ",", "2", " b"});
  CHECK(words("  a   b ") == Words{" ", " a", "  ", " b", " "});
  CHECK(words("a\n\nb\t c") == Words{"a", "\n", "\n", "b", "\t", " c"});
  CHECK(words(" \n ") == Words{" \n "});
  CHECK(words(" \u00a0x") == Words{" ", "\u00a0", "x"});
}

TEST_CASE("The byte alphabet has 256 different visible characters", "[bpe]") {
  auto characters = text::byte_alphabet();
  CHECK(characters['A'] == U'A');
  CHECK(characters[' '] == U'\u0120');
  CHECK(characters[0xAD] == U'\u0143');
  std::sort(characters.begin(), characters.end());
  CHECK(std::unique(characters.begin(), characters.end()) == characters.end());
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(static_cast<char>(byte));
  CHECK(text::from_byte_alphabet(text::to_byte_alphabet(bytes)) == bytes);
  CHECK(text::from_byte_alphabet("a b") == "a b");  // a blank is no character of the alphabet
}

TEST_CASE("A BPE file that is not supported or wrong is an error with file and key", "[bpe]") {
  const auto check = [](const std::string& error, const std::string& what) {
    CHECK_THAT(error, Contains("tokenizer.json") && Contains(what));
  };
  CHECK(error_after("/model/dropout", 0.0).empty());
  CHECK(error_after("/model/end_of_word_suffix", "").empty());
  CHECK(error_after("/model/unk_token", "<pad>").empty());
  CHECK(error_after("/pre_tokenizer/use_regex", nullptr, /*remove=*/true).empty());
  check(error_after("/model/dropout", 0.1), "key 'model.dropout' must be null or 0.0");
  check(error_after("/model/continuing_subword_prefix", "##"),
        "key 'model.continuing_subword_prefix' must be null or \"\" with byte-level BPE, but got \"##\"");
  check(error_after("/model/end_of_word_suffix", "</w>"), "key 'model.end_of_word_suffix' must be null");
  check(error_after("/model/ignore_merges", 1), "key 'model.ignore_merges' must be true or false");
  check(error_after("/model/merges", nullptr, true), "key 'model.merges' is missing");
  check(error_after("/model/merges/2", "a"), "key 'model.merges[2]' must be two tokens");
  check(error_after("/model/merges/2", "a b c"), "key 'model.merges[2]' must be two tokens");
  check(error_after("/model/merges/2", json::array({"a", 1})), "key 'model.merges[2]' must be two tokens");
  check(error_after("/model/merges/2", "q gone"),
        "must join tokens of model.vocab to one, but 'gone' is not");
  check(error_after("/model/merges/2", "q z"), "'qz' is not in it");
  check(error_after("/model/vocab/q", nullptr, true),
        "key 'model.vocab' must hold a token for every byte, but lacks 1 of 256, such as 'q'");
  check(error_after("/normalizer", {{"type", "NFC"}}), "key 'normalizer' must be null with BPE");
  check(error_after("/pre_tokenizer/type", "Metaspace"), "key 'pre_tokenizer.type' must be ByteLevel");
  check(error_after("/pre_tokenizer", nullptr), "key 'pre_tokenizer' must be an object");
  check(error_after("/pre_tokenizer/add_prefix_space", nullptr, true), "add_prefix_space' is missing");
  check(error_after("/decoder/type", "WordPiece"), "key 'decoder.type' must be ByteLevel");
  check(error_after("/post_processor/type", "Sequence"), "key 'post_processor.type' must be");
  check(error_after("/post_processor/type", "RobertaProcessing"), "key 'post_processor.sep' is missing");
}

TEST_CASE("Byte-level BPE knows its padding token by its usual names", "[bpe]") {
  CHECK(load(small()).pad_id() == 1);
  json tokenizer = small();
  tokenizer["padding"] = {{"pad_id", 7}};
  CHECK(load(tokenizer).pad_id() == 7);
  CHECK(load(small()).vocabulary_size() == 300);
}

TEST_CASE("A trained BPE is the one of Hugging Face's trainer", "[bpe]") {
  const json training = json::parse(bpe_values::training_json);
  const auto texts = training.at("texts").get<std::vector<std::string>>();
  text::BpeTraining options;
  options.vocabulary_size = training.at("settings").at("vocabulary_size").get<std::size_t>();
  options.min_frequency = training.at("settings").at("min_frequency").get<std::int64_t>();
  options.special_tokens = training.at("settings").at("special_tokens").get<std::vector<std::string>>();
  const json trained = text::train_bpe(texts, options);
  CHECK(trained["model"]["merges"] == small()["model"]["merges"]);
  CHECK(trained["model"]["vocab"] == small()["model"]["vocab"]);
  CHECK(trained == small());

  SECTION("each merge is of the most frequent pair, the one with the smaller ids of equals") {
    options = {.vocabulary_size = 259};
    const json tiny = text::train_bpe({"bcbc ab", "ab xy", "xy"}, options);
    CHECK(tiny["model"]["merges"] == json::parse(R"([["a", "b"], ["b", "c"], ["x", "y"]])"));
  }
  SECTION("it ends where no pair is as frequent as asked") {
    options = {.vocabulary_size = 1000, .min_frequency = 2};
    CHECK(text::train_bpe({"ab ab", "cd"}, options)["model"]["merges"].size() == 1);
  }
  SECTION("a vocabulary too small is refused") {
    options.vocabulary_size = 257;
    CHECK_THROWS_WITH(text::train_bpe(texts, options),
                      Contains("vocabulary_size must be at least 258 for the bytes") && Contains("got 257"));
    CHECK_THROWS_WITH(text::train_bpe({"a\xFF"}, {}), Contains("must be valid UTF-8"));
  }
}
