// The header of a safetensors file: its dtypes and a parser that takes nothing else.
#pragma once

#include "peft/core/compat.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace peft::internal {

struct SafetensorsDtype {
  std::string_view name;
  int64_t bits;
  torch::ScalarType type;  ///< Undefined where LibTorch has no such type, or only its newer versions
};

/// Every dtype of the format. The order is the Python writer's, whose files list the last ones first.
inline constexpr std::array<SafetensorsDtype, 22> safetensors_dtypes{{
    {"BOOL", 8, torch::kBool},
    {"F4", 4, torch::ScalarType::Undefined},
    {"F6_E2M3", 6, torch::ScalarType::Undefined},
    {"F6_E3M2", 6, torch::ScalarType::Undefined},
    {"U8", 8, torch::kUInt8},
    {"I8", 8, torch::kInt8},
    {"F8_E5M2", 8, torch::ScalarType::Undefined},
    {"F8_E4M3", 8, torch::ScalarType::Undefined},
    {"F8_E5M2FNUZ", 8, torch::ScalarType::Undefined},
    {"F8_E4M3FNUZ", 8, torch::ScalarType::Undefined},
    {"F8_E8M0", 8, torch::ScalarType::Undefined},
    {"I16", 16, torch::kInt16},
    {"U16", 16, torch::ScalarType::Undefined},
    {"F16", 16, torch::kFloat16},
    {"BF16", 16, torch::kBFloat16},
    {"I32", 32, torch::kInt32},
    {"U32", 32, torch::ScalarType::Undefined},
    {"F32", 32, torch::kFloat32},
    {"C64", 64, torch::ScalarType::Undefined},
    {"F64", 64, torch::kFloat64},
    {"I64", 64, torch::kInt64},
    {"U64", 64, torch::ScalarType::Undefined},
}};

/// What the header says of one tensor, before it is checked against the data.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::vector<uint64_t> offsets;
};

/// Reads the header's JSON. It accepts only what the format has at each place, so that nothing nests deeper
/// than an entry's arrays, and sees names that are given twice, which a JSON object would hide.
class SafetensorsHeaderParser : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  std::string problem;  ///< the first one; set whenever a callback has returned false

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    return unexpected("the negative number " + std::to_string(value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return unexpected("the number " + text);
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::shape) {
      entries.back().shape.push_back(value);
    } else if (place_ == Place::offsets) {
      entries.back().offsets.push_back(value);
    } else {
      return unexpected("the number " + std::to_string(value));
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      metadata[key_] = value;
    } else if (place_ == Place::entry && key_ == "dtype") {
      entries.back().dtype = value;
    } else {
      return unexpected("the string '" + value + "'");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::before) {
      place_ = Place::top;
    } else if (place_ == Place::top && key_ == "__metadata__") {
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      entries.push_back({key_, {}, {}, {}});
      seen_ = {};
      place_ = Place::entry;
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::entry) {
      for (const char* needed : {"dtype", "shape", "data_offsets"}) {
        if (!seen_.count(needed)) return fail("'" + entries.back().name + "' must have '" + needed + "'");
      }
      if (entries.back().offsets.size() != 2) {
        return fail("'" + entries.back().name + "': data_offsets must be two numbers, but got " +
                    std::to_string(entries.back().offsets.size()));
      }
    }
    place_ = Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::entry || key_ == "dtype") return unexpected("an array");
    place_ = key_ == "shape" ? Place::shape : Place::offsets;
    return true;
  }

  bool end_array() override {
    place_ = Place::entry;
    return true;
  }

  bool key(string_t& value) override {
    key_ = value;
    if (place_ == Place::top) {
      return names_.insert(key_).second || fail("the name '" + key_ + "' is given twice");
    }
    if (place_ == Place::metadata) {
      return metadata.emplace(key_, "").second || fail("the metadata '" + key_ + "' is given twice");
    }
    const std::string where = "'" + entries.back().name + "': ";
    if (key_ != "dtype" && key_ != "shape" && key_ != "data_offsets") {
      return fail(where + "expected dtype, shape and data_offsets, but got '" + key_ + "'");
    }
    return seen_.insert(key_).second || fail(where + "'" + key_ + "' is given twice");
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) override {
    return fail(std::string("invalid JSON: ") + error.what());
  }

 private:
  enum class Place { before, top, metadata, entry, shape, offsets };

  bool fail(std::string text) {
    if (problem.empty()) problem = std::move(text);
    return false;
  }

  bool unexpected(const std::string& what) {
    switch (place_) {
      case Place::before:
        return fail("the header must be an object, but it is " + what);
      case Place::top:
        return fail("'" + key_ + "' must be an object, but it is " + what);
      case Place::metadata:
        return fail("the metadata '" + key_ + "' must be a string, but it is " + what);
      case Place::entry:
        return fail("'" + entries.back().name + "': " + key_ + " must be " +
                    (key_ == "dtype" ? "a string" : "an array") + ", but it is " + what);
      default:
        return fail("'" + entries.back().name + "': " + key_ +
                    " must hold non-negative integers of at most 64 bits, but it has " + what);
    }
  }

  Place place_ = Place::before;
  std::string key_;
  std::set<std::string> names_, seen_;
};

/// The product of sizes, or nothing when it does not fit.
inline std::optional<int64_t> checked_product(const std::vector<int64_t>& sizes) {
  int64_t product = 1, nonzero = 1;
  for (const int64_t size : sizes) {
    // Zeros are left out of the overflow check's product: strides are made of the other sizes all the same.
    if (size > 0 && nonzero > std::numeric_limits<int64_t>::max() / size) return std::nullopt;
    nonzero *= std::max<int64_t>(size, 1);
    product = size == 0 ? 0 : product * size;
  }
  return product;
}

}  // namespace peft::internal
