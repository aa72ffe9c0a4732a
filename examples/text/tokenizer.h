// Tokenizer: text to ids and back, equal to Hugging Face's tokenizers, from a
// tokenizer.json or a model's folder.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"
#include "decoders.h"
#include "normalizers.h"
#include "pre_tokenizers.h"
#include "tokenizer_folder.h"
#include "tokenizer_json.h"
#include "unicode.h"
#include "unigram.h"
#include "wordpiece.h"

namespace text {

/// Ids of one text or of a pair, with the special tokens of the model.
struct Encoding {
  /// Token ids.
  std::vector<std::int64_t> ids;
  /// As many type ids: with BERT 0 for the first text, 1 for the second.
  std::vector<std::int64_t> type_ids;
};

/// A tokenizer: WordPiece, byte-level BPE or Unigram, as its file says.
/// Settings for truncation and padding in the file do not count: the length is
/// the caller's. Thread-safe once built.
///
/// Example:
///   auto tokenizer = text::Tokenizer::from_file("model/tokenizer.json");
///   text::Encoding one = tokenizer.encode("a text", 128);
///   text::Encoding two = tokenizer.encode("a question", "an answer", 128);
class Tokenizer {
 public:
  /// For texts of any length.
  static constexpr std::int64_t no_limit = std::numeric_limits<std::int64_t>::max();

  /// Reads a tokenizer.json.
  /// Throws: std::runtime_error naming the file and the key where it is not
  /// such a tokenizer.
  static Tokenizer from_file(const std::filesystem::path& path) { return {path, read_tokenizer_json(path)}; }

  /// Reads the tokenizer of a model's folder: its tokenizer.json, or, where it
  /// has none, the files it has in its place, as transformers' AutoTokenizer
  /// does (see `tokenizer_json_of_folder`). Throws: std::runtime_error naming
  /// the file and what is wrong with it or missing.
  static Tokenizer from_folder(const std::filesystem::path& folder) {
    if (std::filesystem::exists(folder / "tokenizer.json")) {
      check_settings_agree(folder);
      return from_file(folder / "tokenizer.json");
    }
    return {folder,
            internal::TokenizerJsonReader(folder).read(tokenizer_json_of_folder(folder), /*exact=*/true)};
  }

  /// Ids of a text, cut on the right to `max_length`, special tokens included.
  /// Throws: std::invalid_argument for invalid UTF-8 (with the offset of the
  /// byte) and for a `max_length` that the special tokens alone exceed.
  Encoding encode(std::string_view text, std::int64_t max_length = no_limit) const {
    return assemble(templates_.single, max_length, text, std::nullopt);
  }

  /// Ids of a pair; where it is too long, the longer of the two is cut first.
  Encoding encode(std::string_view first, std::string_view second, std::int64_t max_length = no_limit) const {
    return assemble(templates_.pair, max_length, first, second);
  }

  /// The text of ids, with or without special tokens. Bytes that are no UTF-8,
  /// as in a text that was cut, become U+FFFD. Throws: std::out_of_range where
  /// no token has an id; std::runtime_error where the file has a decoder other
  /// than ByteLevel, WordPiece, Metaspace and none.
  std::string decode(const std::vector<std::int64_t>& ids, bool skip_special_tokens = true) const {
    std::vector<std::string> tokens;
    for (const std::int64_t id : ids) {
      const auto normalized = normalized_forms_.find(id);
      const std::string& form = normalized == normalized_forms_.end() ? token(id) : normalized->second;
      if (!skip_special_tokens || special_tokens_.count(form) == 0) tokens.push_back(form);
    }
    return std::visit(
        [&](const auto& decoder) -> std::string {
          if constexpr (std::is_same_v<std::decay_t<decltype(decoder)>, std::string>) {
            throw std::runtime_error(
                fmt::format("{}: ids cannot be decoded, because key 'decoder.type' must be "
                            "ByteLevel, WordPiece or Metaspace, "
                            "but got \"{}\"",
                            path_.string(), decoder));
          } else {
            return decoder(tokens);
          }
        },
        decoder_);
  }

  /// One more than the largest id: the rows a word embedding must have at
  /// least.
  std::int64_t vocabulary_size() const { return vocabulary_size_; }

  /// Number of special tokens `encode` puts around one text, or a pair.
  std::int64_t special_tokens(bool pair) const {
    return count_fixed(pair ? templates_.pair : templates_.single);
  }

  /// The token of an id, as the file has it.
  /// Throws: std::out_of_range where no token has it.
  const std::string& token(std::int64_t id) const {
    const auto found = tokens_.find(id);
    if (found == tokens_.end()) throw std::out_of_range(fmt::format("Tokenizer: no token has the id {}", id));
    return found->second;
  }

  /// The id of a token, if it is one.
  std::optional<std::int64_t> id(const std::string& token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }

  /// The id that fills up a batch: the file's padding id, else that of "[PAD]"
  /// or "<pad>". Throws: std::runtime_error where the file has neither.
  std::int64_t pad_id() const {
    if (!pad_id_) throw std::runtime_error(path_.string() + ": names no padding token");
    return *pad_id_;
  }

 private:
  using Model = std::variant<WordPiece, Bpe, Unigram>;

  Tokenizer(const std::filesystem::path& path, TokenizerJson file)
      : path_(path),
        normalizer_(std::move(file.normalizer)),
        pre_tokenizer_(std::move(file.pre_tokenizer)),
        model_(make_model(file, tokens_)),
        decoder_(std::move(file.decoder)),
        templates_(std::move(file.templates)),
        pad_id_(file.pad_id),
        ids_(*file.vocabulary) {
    for (const auto& [token, id] : ids_) tokens_.emplace(id, token);
    for (const AddedToken& token : file.added_tokens) {
      ids_.emplace(token.content, token.id);
      tokens_.emplace(token.id, token.content);
      if (token.special) special_tokens_.insert(token.content);
      std::u32string form = decode_utf8(token.content);
      if (token.normalized) {
        form = normalizer_(std::move(form));
        normalized_forms_.emplace(token.id, encode_utf8(form));
      }
      if (!(token.normalized ? in_normalized_ : in_given_).add(std::move(form), token)) {
        throw std::runtime_error(
            fmt::format("{}: key 'added_tokens' must hold forms that differ, "
                        "but the one of '{}' is empty or taken",
                        path.string(), token.content));
      }
    }
    for (const auto& [id, token] : tokens_) vocabulary_size_ = std::max(vocabulary_size_, id + 1);
  }

  /// The model; and, of Unigram, the tokens of every id, also where several are
  /// the same.
  static Model make_model(TokenizerJson& file, std::unordered_map<std::int64_t, std::string>& tokens) {
    if (auto* bpe = std::get_if<BpeSettings>(&file.model)) return Bpe(std::move(*bpe), file.vocabulary);
    if (auto* unigram = std::get_if<UnigramSettings>(&file.model)) {
      for (const auto& [token, score] : unigram->pieces) {
        tokens.emplace(static_cast<std::int64_t>(tokens.size()), token);
      }
      return Unigram(std::move(*unigram), file.vocabulary);
    }
    return WordPiece(std::get<WordPieceSettings>(std::move(file.model)), file.vocabulary);
  }

  /// Ids of one text without special tokens.
  std::vector<std::int64_t> tokenize(std::string_view text) const {
    std::vector<std::int64_t> ids;
    const std::u32string given = decode_utf8(text);
    for (const auto& outer : in_given_.split(given)) {
      if (outer.id) {
        ids.push_back(*outer.id);
        continue;
      }
      bool from_start = outer.text.data() == given.data();
      const std::u32string normalized = normalizer_(std::u32string(outer.text), from_start);
      for (const auto& inner : in_normalized_.split(normalized)) {
        if (inner.id) {
          ids.push_back(*inner.id);
          continue;
        }
        const Words words = pre_tokenizer_(inner.text, from_start && inner.text.data() == normalized.data());
        for (const auto& word : words.all()) {
          std::visit([&](const auto& model) { model.append(ids, word.text); }, model_);
        }
      }
    }
    return ids;
  }

  static std::int64_t count_fixed(const std::vector<TemplatePiece>& pieces) {
    std::size_t count = 0;
    for (const TemplatePiece& piece : pieces) count += piece.ids.size();
    return static_cast<std::int64_t>(count);
  }

  Encoding assemble(const std::vector<TemplatePiece>& pieces, std::int64_t max_length, std::string_view first,
                    std::optional<std::string_view> second) const {
    const std::int64_t fixed = count_fixed(pieces);
    if (max_length < fixed || max_length < 1) {
      throw std::invalid_argument(
          fmt::format("max_length must be at least {} for the special tokens, but got {}",
                      std::max<std::int64_t>(fixed, 1), max_length));
    }
    std::vector<std::int64_t> a = tokenize(first);
    std::vector<std::int64_t> b;
    if (second) b = tokenize(*second);
    cut(a, b, second.has_value(), static_cast<std::size_t>(max_length - fixed));
    Encoding encoding;
    for (const TemplatePiece& piece : pieces) {
      using Kind = TemplatePiece::Kind;
      const auto& ids = piece.kind == Kind::kFirst ? a : piece.kind == Kind::kSecond ? b : piece.ids;
      encoding.ids.insert(encoding.ids.end(), ids.begin(), ids.end());
      encoding.type_ids.insert(encoding.type_ids.end(), ids.size(), piece.type_id);
    }
    return encoding;
  }

  /// The reference's "longest first": the longer text gives until both are
  /// equal, then both in halves, and an odd place goes to the longer one.
  static void cut(std::vector<std::int64_t>& a, std::vector<std::int64_t>& b, bool pair, std::size_t room) {
    if (a.size() + b.size() <= room) return;
    if (!pair) return a.resize(room);
    const bool swapped = a.size() > b.size();
    auto& shorter = swapped ? b : a;
    auto& longer = swapped ? a : b;
    std::size_t few = shorter.size();
    std::size_t many = few > room ? few : std::max(few, room - few);
    if (few + many > room) {
      few = room / 2;
      many = few + room % 2;
    }
    shorter.resize(std::min(shorter.size(), few));
    longer.resize(std::min(longer.size(), many));
  }

  std::filesystem::path path_;
  std::unordered_map<std::int64_t, std::string> tokens_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Model model_;
  Decoder decoder_;
  Templates templates_;
  std::optional<std::int64_t> pad_id_;
  AddedTokenMatcher in_given_, in_normalized_;
  Vocabulary ids_;
  // What added tokens are in a normalized text, which is also what they become
  // where ids become text.
  std::unordered_map<std::int64_t, std::string> normalized_forms_;
  std::unordered_set<std::string> special_tokens_;
  std::int64_t vocabulary_size_ = 0;
};

}  // namespace text
