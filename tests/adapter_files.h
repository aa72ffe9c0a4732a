// Adapters on disk, compiled once for all tests: the headers for them take longer to compile than a test.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "peft/core/adapter.h"

namespace suite {

/// `peft::save_adapter`.
std::vector<std::string> save_adapter(const peft::Adapter& adapter, const std::filesystem::path& directory);
/// `peft::load_adapter`.
peft::Adapter load_adapter(torch::nn::Module& model, const std::filesystem::path& directory);

}  // namespace suite
