// Reads texts from standard input and prints their ids, for comparisons with other tokenizers.
//
// usage: tokenize_lines TOKENIZER_JSON < REQUESTS
// A request is one line of JSON: a string, or {"a": text, "b": text or nothing, "max_length": number or
// nothing}. The answer is one line: ids, a tab, type ids, each separated by blanks.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "text/wordpiece.h"

namespace {

text::Encoding answer(const text::WordPiece& tokenizer, const nlohmann::json& request) {
  if (request.is_string()) return tokenizer.encode(request.get<std::string>());
  const auto max_length = request.value("max_length", text::WordPiece::no_limit);
  const auto a = request.at("a").get<std::string>();
  if (!request.contains("b")) return tokenizer.encode(a, max_length);
  return tokenizer.encode(a, request.at("b").get<std::string>(), max_length);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: tokenize_lines TOKENIZER_JSON < REQUESTS\n";
    return 2;
  }
  try {
    const auto tokenizer = text::WordPiece::from_file(argv[1]);
    for (std::string line; std::getline(std::cin, line);) {
      const text::Encoding encoding = answer(tokenizer, nlohmann::json::parse(line));
      std::cout << fmt::format("{}\t{}\n", fmt::join(encoding.ids, " "), fmt::join(encoding.type_ids, " "));
    }
  } catch (const std::exception& error) {
    std::cerr << "tokenize_lines: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
