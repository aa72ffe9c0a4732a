// Reads texts from standard input and prints their ids, for comparisons with other tokenizers.
//
// usage: tokenize_lines TOKENIZER_JSON|FOLDER < REQUESTS
//        tokenize_lines --folder FOLDER > TOKENIZER_JSON
//        tokenize_lines --train SETTINGS < TEXTS > TOKENIZER_JSON
// A request is one line of JSON: a string; {"a": text, "b": text or nothing, "max_length": number or
// nothing}; or {"ids": ids, "skip_special_tokens": bool}. The answer is one line: ids, a tab, type ids, each
// separated by blanks; or the text as JSON. --folder prints what a folder without a tokenizer.json stands
// for. SETTINGS is JSON with the members of text::BpeTraining, TEXTS are JSON strings.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "text/bpe_trainer.h"
#include "text/tokenizer.h"

namespace {

using nlohmann::json;

text::Encoding encode(const text::Tokenizer& tokenizer, const json& request) {
  if (request.is_string()) return tokenizer.encode(request.get<std::string>());
  const auto max_length = request.value("max_length", text::Tokenizer::no_limit);
  const auto a = request.at("a").get<std::string>();
  if (!request.contains("b")) return tokenizer.encode(a, max_length);
  return tokenizer.encode(a, request.at("b").get<std::string>(), max_length);
}

std::string answer(const text::Tokenizer& tokenizer, const json& request) {
  if (request.contains("ids")) {
    const auto ids = request.at("ids").get<std::vector<std::int64_t>>();
    return json(tokenizer.decode(ids, request.at("skip_special_tokens").get<bool>())).dump();
  }
  const text::Encoding encoding = encode(tokenizer, request);
  return fmt::format("{}\t{}", fmt::join(encoding.ids, " "), fmt::join(encoding.type_ids, " "));
}

void train(const json& settings) {
  text::BpeTraining options;
  options.vocabulary_size = settings.at("vocabulary_size").get<std::size_t>();
  options.min_frequency = settings.at("min_frequency").get<std::int64_t>();
  options.special_tokens = settings.at("special_tokens").get<std::vector<std::string>>();
  options.add_prefix_space = settings.at("add_prefix_space").get<bool>();
  std::vector<std::string> texts;
  for (std::string line; std::getline(std::cin, line);) texts.push_back(json::parse(line).get<std::string>());
  std::cout << text::train_bpe(texts, options).dump() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const bool trains = words.size() == 2 && words[0] == "--train";
  const bool reads_folder = words.size() == 2 && words[0] == "--folder";
  if (words.size() != 1 && !trains && !reads_folder) {
    std::cerr << "usage: tokenize_lines TOKENIZER_JSON|FOLDER < REQUESTS\n"
                 "       tokenize_lines --folder FOLDER > TOKENIZER_JSON\n"
                 "       tokenize_lines --train SETTINGS < TEXTS > TOKENIZER_JSON\n";
    return 2;
  }
  try {
    if (trains) {
      train(json::parse(words[1]));
      return 0;
    }
    if (reads_folder) {
      std::cout << text::tokenizer_json_of_folder(words[1]).dump() << "\n";
      return 0;
    }
    const bool folder = std::filesystem::is_directory(words[0]);
    const auto tokenizer =
        folder ? text::Tokenizer::from_folder(words[0]) : text::Tokenizer::from_file(words[0]);
    for (std::string line; std::getline(std::cin, line);) {
      std::cout << answer(tokenizer, json::parse(line)) << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << "tokenize_lines: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
