// A program around the safetensors reader and writer, driven by tests/reference/compare_safetensors.py.
//
//   safetensors_tool dump FILE…          a line a file: {"metadata", "names", "tensors"} or {"error"}
//   safetensors_tool dump --no-map FILE… the same, read into memory, where a sanitizer sees every byte's
//   bounds safetensors_tool copy IN OUT …       reads IN and writes OUT with the same metadata
#include "peft/io/safetensors.h"

#include <iostream>
#include <string>
#include <vector>

namespace {

std::string hexadecimal(const torch::Tensor& tensor) {
  constexpr std::string_view digits = "0123456789abcdef";
  const auto* bytes = static_cast<const unsigned char*>(tensor.data_ptr());
  std::string text;
  for (size_t i = 0; i < tensor.nbytes(); ++i) text += {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
  return text;
}

nlohmann::json dump(const std::string& path, bool map) {
  nlohmann::json line;
  try {
    const peft::SafetensorsFile file(path, map);
    line["metadata"] = file.metadata();
    line["names"] = file.names();
    line["tensors"] = nlohmann::json::object();
    for (const auto& name : file.names()) {
      line["tensors"][name] = {{"dtype", file.entry(name).dtype_name},
                               {"shape", file.tensor(name).sizes().vec()},
                               {"data", hexadecimal(file.tensor(name))}};
    }
  } catch (const c10::Error& error) {
    line = {{"error", error.what_without_backtrace()}};
  }
  return line;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() >= 2 && arguments[0] == "dump") {
    const bool map = arguments[1] != "--no-map";
    for (size_t i = map ? 1 : 2; i < arguments.size(); ++i) {
      std::cout << dump(arguments[i], map).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)
                << '\n';
    }
    return 0;
  }
  if (arguments.size() >= 3 && arguments[0] == "copy") {
    for (size_t i = 1; i + 1 < arguments.size(); i += 2) {
      peft::save_safetensors(arguments[i + 1], peft::load_safetensors(arguments[i]),
                             peft::SafetensorsFile(arguments[i]).metadata());
    }
    return 0;
  }
  std::cerr << "usage: safetensors_tool dump [--no-map] FILE… | copy IN OUT …\n";
  return 2;
}
