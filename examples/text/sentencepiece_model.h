// SentencePieceModel: what a SentencePiece file (spm.model) holds.
#pragma once

#include <fmt/format.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unicode.h"

namespace text {

/// The parts of a SentencePiece file from which transformers makes a tokenizer.
///
/// SentencePiece's library would read it too, but does not show which pieces the user defined, nor the table
/// of replacements; and it must not be in one program with LibTorch: both define a global FLAGS_minloglevel,
/// of other sizes, and the one writes over the other's memory.
struct SentencePieceModel {
  /// Pieces and their scores, by id.
  std::vector<std::pair<std::string, double>> pieces;
  /// Ids of control pieces ("<s>"), and of pieces the user defined.
  std::vector<std::int64_t> control, user_defined;
  /// The id of what is no piece.
  std::int64_t unk_id = 0;
  /// The table of replacements; see `Precompiled`. Empty if there is none.
  std::string charsmap;
};

namespace internal {

/// Calls `visit(number, bytes, value)` with each field of a protocol buffer message: `bytes` of a text, a
/// message or a float, else `value`. Throws: std::invalid_argument where the bytes are no message.
template <typename Visit>
void for_each_field(std::string_view message, const Visit& visit) {
  const auto take = [&](std::uint64_t size) {
    if (size > message.size()) throw std::invalid_argument("a field ends behind its message");
    const std::string_view bytes = message.substr(0, size);
    message.remove_prefix(size);
    return bytes;
  };
  const auto varint = [&] {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1).front());
      value |= std::uint64_t{byte & 0x7FU} << shift;
      if (byte < 0x80) return value;
    }
    throw std::invalid_argument("a number does not end");
  };
  while (!message.empty()) {
    const std::uint64_t tag = varint();
    std::uint64_t value = 0;
    std::string_view bytes;
    switch (tag & 7) {
      case 0:
        value = varint();
        break;
      case 1:
        bytes = take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        bytes = take(4);
        break;
      default:
        throw std::invalid_argument(fmt::format("a field has the unknown wire type {}", tag & 7));
    }
    visit(tag >> 3, bytes, value);
  }
}

inline float little_endian_float(std::string_view bytes) {
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < 4 && i < bytes.size(); ++i) {
    bits |= std::uint32_t{static_cast<unsigned char>(bytes[i])} << 8 * i;
  }
  return std::bit_cast<float>(bits);
}

}  // namespace internal

/// Reads a SentencePiece file of a Unigram model.
/// Throws: std::runtime_error naming the file where it is none.
inline SentencePieceModel read_sentencepiece(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(fmt::format("{}: cannot be opened for reading", path.string()));
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  SentencePieceModel result;
  std::uint64_t model_type = 1;
  // As sentencepiece_model.proto numbers them: pieces 1 (piece 1, score 2, type 3: control is 3, user-defined
  // 4), trainer_spec 2 (model_type 3: Unigram is 1, also if it is absent; unk_id 40), normalizer_spec 3
  // (precompiled_charsmap 2).
  const auto read_field = [&](std::uint64_t field, std::string_view message, std::uint64_t) {
    if (field == 1) result.pieces.emplace_back();
    if (field < 1 || field > 3) return;
    internal::for_each_field(message, [&](std::uint64_t part, std::string_view text, std::uint64_t value) {
      const auto id = static_cast<std::int64_t>(result.pieces.size()) - 1;
      if (field == 1 && part == 1) result.pieces.back().first = text;
      if (field == 1 && part == 2) result.pieces.back().second = internal::little_endian_float(text);
      if (field == 1 && part == 3 && value == 3) result.control.push_back(id);
      if (field == 1 && part == 3 && value == 4) result.user_defined.push_back(id);
      if (field == 2 && part == 3) model_type = value;
      if (field == 2 && part == 40) result.unk_id = static_cast<std::int64_t>(value);
      if (field == 3 && part == 2) result.charsmap = text;
    });
  };
  try {
    internal::for_each_field(bytes, read_field);
    if (result.pieces.empty()) throw std::invalid_argument("it has no pieces");
    for (const auto& piece : result.pieces) {
      if (invalid_utf8_at(piece.first)) throw std::invalid_argument("a piece is not UTF-8");
    }
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(
        fmt::format("{}: must be a SentencePiece model, but {}", path.string(), error.what()));
  }
  if (model_type != 1) {
    throw std::runtime_error(fmt::format("{}: must be a Unigram model, but its trainer_spec.model_type is {}",
                                         path.string(), model_type));
  }
  return result;
}

}  // namespace text
