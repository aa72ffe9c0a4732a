// Version: the one place where the library's version number stands; CMake reads it from here.
#pragma once

#include <string_view>

#define PEFT_VERSION_MAJOR 0
#define PEFT_VERSION_MINOR 1
#define PEFT_VERSION_PATCH 0

#define PEFT_INTERNAL_STRING(x) #x
#define PEFT_INTERNAL_JOIN(a, b, c) \
  PEFT_INTERNAL_STRING(a) "." PEFT_INTERNAL_STRING(b) "." PEFT_INTERNAL_STRING(c)
/// The version as a string literal, for example "0.1.0".
#define PEFT_VERSION PEFT_INTERNAL_JOIN(PEFT_VERSION_MAJOR, PEFT_VERSION_MINOR, PEFT_VERSION_PATCH)

namespace peft {

/// The library's version, for example "0.1.0".
inline constexpr std::string_view version = PEFT_VERSION;

}  // namespace peft
