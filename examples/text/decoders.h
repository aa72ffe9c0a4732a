// Decoder: the text of a row of tokens, as a tokenizer.json says.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "byte_level.h"
#include "unicode.h"

namespace text {

/// No decoder: tokens with blanks between them.
struct JoinDecoder {
  std::string operator()(const std::vector<std::string>& tokens) const {
    std::string text;
    for (std::size_t i = 0; i < tokens.size(); ++i) text += (i > 0 ? " " : "") + tokens[i];
    return text;
  }
};

/// Byte-level BPE's: the bytes that the tokens stand for; those that are no
/// UTF-8 become U+FFFD.
struct ByteLevelDecoder {
  std::string operator()(const std::vector<std::string>& tokens) const {
    std::string bytes;
    for (const auto& token : tokens) bytes += from_byte_alphabet(token);
    return replace_invalid_utf8(bytes);
  }
};

/// WordPiece's: tokens with blanks between them, but where one has the prefix.
struct WordPieceDecoder {
  std::string prefix = "##";
  /// Takes blanks away before punctuation and English contractions.
  bool cleanup = true;

  std::string operator()(const std::vector<std::string>& tokens) const {
    std::string text;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const bool joined = i > 0 && tokens[i].starts_with(prefix);
      const std::string part = joined ? tokens[i].substr(prefix.size()) : (i > 0 ? " " : "") + tokens[i];
      text += cleanup ? cleaned(part) : part;
    }
    return text;
  }

 private:
  static std::string cleaned(std::string part) {
    constexpr std::pair<std::string_view, std::string_view> rules[] = {
        {" .", "."},   {" ?", "?"},           {" !", "!"},   {" ,", ","},     {" ' ", "'"},   {" n't", "n't"},
        {" 'm", "'m"}, {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
    for (const auto& [from, to] : rules) {
      for (auto at = part.find(from); at != std::string::npos; at = part.find(from, at + to.size())) {
        part.replace(at, from.size(), to);
      }
    }
    return part;
  }
};

/// SentencePiece's: blanks where the tokens have its replacement, but at the
/// beginning of the first, unless that is never put there.
struct MetaspaceDecoder {
  std::string replacement = "\u2581";
  bool keep_first = false;

  std::string operator()(const std::vector<std::string>& tokens) const {
    std::string text;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      std::size_t done = 0;
      for (auto at = tokens[i].find(replacement); at != std::string::npos;
           at = tokens[i].find(replacement, done)) {
        text.append(tokens[i], done, at - done).append(i > 0 || keep_first ? " " : "");
        done = at + replacement.size();
      }
      text.append(tokens[i], done);
    }
    return text;
  }
};

/// A decoder, or the name of one that is not supported.
using Decoder = std::variant<JoinDecoder, ByteLevelDecoder, WordPieceDecoder, MetaspaceDecoder, std::string>;

}  // namespace text
