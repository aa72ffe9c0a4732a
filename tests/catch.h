// Catch2, version 2 or 3, beside LibTorch: include this instead of Catch2's own header.
#pragma once

// LibTorch's logging defines CHECK (its own or glog's). Reading that header first and dropping the macro
// leaves the name to Catch2 whether the other LibTorch headers come before or after this one.
#include <c10/util/Logging.h>
#undef CHECK

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>

#include <string>

using Catch::Approx;
/// Version 3 keeps this name for ranges and calls the matcher for text otherwise.
inline auto Contains(const std::string& text) { return Catch::Matchers::ContainsSubstring(text); }
#else
#include <catch2/catch.hpp>

using Catch::Matchers::Contains;
#endif

using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;
