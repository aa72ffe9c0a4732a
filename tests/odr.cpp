// Linked into every test program: a second translation unit with the whole library finds a missing `inline`.
#include <peft/peft.h>

#include <string_view>

#include "adapter_files.h"

std::string_view version_seen_by_another_file() { return peft::version; }

std::vector<std::string> suite::save_adapter(const peft::Adapter& adapter,
                                             const std::filesystem::path& directory) {
  return peft::save_adapter(adapter, directory);
}

peft::Adapter suite::load_adapter(torch::nn::Module& model, const std::filesystem::path& directory) {
  return peft::load_adapter(model, directory);
}
