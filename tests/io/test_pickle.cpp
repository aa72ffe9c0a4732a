#include "catch.h"
#include "io/pickle_values.h"
#include "io/temporary_folder.h"
#include "peft/io/pickle.h"

#include <torch/torch.h>

#include <map>
#include <string>

using peft::load_pickle;
using peft_test::TemporaryFolder;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

std::string from_base64(std::string_view text) {
  const std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (const char letter : text.substr(0, text.find('='))) {
    bits = bits << 6 | static_cast<uint32_t>(digits.find(letter));
    count += 6;
    if (count >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xff);
  }
  return bytes;
}

std::map<std::string, Tensor> load(const std::string& bytes) {
  const TemporaryFolder folder;
  write_bytes(folder / "x.bin", bytes);
  return load_pickle(folder / "x.bin");
}

std::map<std::string, Tensor> load(const char* base64) { return load(from_base64(base64)); }

/// 0, 1/8, 2/8 … as tests/reference/pickle_values.py fills tensors.
Tensor eighths(torch::IntArrayRef shape) {
  return (torch::arange(c10::multiply_integers(shape)) / 8.0).to(torch::kFloat32).reshape(shape);
}

std::string refusal(const std::string& bytes) {
  try {
    load(bytes);
  } catch (const c10::Error& error) {
    CHECK_THAT(error.what_without_backtrace(), Contains("load_pickle: cannot read '") && Contains("x.bin'"));
    return error.what_without_backtrace();
  }
  return "";
}

std::string refusal(const char* base64) { return refusal(from_base64(base64)); }

/// The same archive with other bytes at one place; archives of torch.save are not compressed.
std::string replaced(const char* base64, const std::string& before, const std::string& after) {
  std::string bytes = from_base64(base64);
  const size_t place = bytes.find(before);
  REQUIRE(place != std::string::npos);
  REQUIRE(before.size() == after.size());
  return bytes.replace(place, before.size(), after);
}

}  // namespace

TEST_CASE("A PEFT adapter_model.bin is read", "[pickle]") {
  const auto tensors = load(pickle_values::adapter);
  REQUIRE(tensors.size() == 2);
  CHECK(torch::equal(tensors.at("base_model.model.fc.lora_A.weight"), eighths({2, 3})));
  CHECK(torch::equal(tensors.at("base_model.model.fc.lora_B.weight"), eighths({2, 2})));
}

TEST_CASE("A state dict is read, its version notes and buffers included", "[pickle]") {
  const auto tensors = load(pickle_values::state_dict);
  REQUIRE(tensors.size() == 7);
  CHECK(torch::equal(tensors.at("fc.weight"), eighths({2, 3})));
  CHECK(torch::equal(tensors.at("norm.running_var"), torch::ones({2})));
  CHECK(tensors.at("norm.num_batches_tracked").scalar_type() == torch::kInt64);
  CHECK(tensors.at("norm.num_batches_tracked").dim() == 0);
}

TEST_CASE("Parameters are read as tensors that do not train", "[pickle]") {
  const auto tensors = load(pickle_values::parameters);
  REQUIRE(tensors.size() == 4);
  CHECK(torch::equal(tensors.at("fc.weight"), eighths({2, 3})));
  CHECK_FALSE(tensors.at("fc.weight").requires_grad());
}

TEST_CASE("Every type is read", "[pickle]") {
  const auto tensors = load(pickle_values::types);
  const std::map<std::string, torch::ScalarType> types = {
      {"float64", torch::kFloat64},   {"float32", torch::kFloat32}, {"float16", torch::kFloat16},
      {"bfloat16", torch::kBFloat16}, {"int64", torch::kInt64},     {"int32", torch::kInt32},
      {"int16", torch::kInt16},       {"int8", torch::kInt8},       {"uint8", torch::kUInt8},
      {"bool", torch::kBool}};
  REQUIRE(tensors.size() == types.size());
  for (const auto& [name, type] : types) {
    INFO(name);
    CHECK(tensors.at(name).scalar_type() == type);
    CHECK(torch::equal(tensors.at(name), torch::arange(12).reshape({3, 4}).to(type)));
  }
}

TEST_CASE("Strides and shared memory are kept", "[pickle]") {
  const auto tensors = load(pickle_values::views);
  const Tensor grid = eighths({3, 4});
  CHECK(torch::equal(tensors.at("whole"), grid));
  CHECK(torch::equal(tensors.at("turned"), grid.t()));
  CHECK(tensors.at("turned").strides() == torch::IntArrayRef({1, 4}));
  CHECK(torch::equal(tensors.at("part"), grid.slice(0, 1).slice(1, 1, 3)));
  CHECK(tensors.at("one").item<float>() == 11.0f / 8);
  CHECK(torch::equal(tensors.at("spread"), torch::zeros({5})));
  CHECK(tensors.at("empty").sizes() == torch::IntArrayRef({0, 3}));
  tensors.at("whole").add_(1);
  CHECK(torch::equal(tensors.at("turned"), grid.t() + 1));
}

TEST_CASE("Dicts of one entry, of none, and newer pickles are read", "[pickle]") {
  const auto single = load(pickle_values::single);
  REQUIRE(single.size() == 1);
  CHECK(torch::equal(single.at("prompt_embeddings"), eighths({3, 4})));
  CHECK(load(pickle_values::nothing).empty());
  const auto newer = load(pickle_values::protocol_4);
  REQUIRE(newer.size() == 2);
  CHECK(newer.at("layer.1").item<int64_t>() == 1);
}

TEST_CASE("Files that are no archive of torch.save are refused", "[pickle]") {
  CHECK_THAT(refusal(pickle_values::legacy),
             Contains("format from before PyTorch 1.6 (hint: load and save it again"));
  CHECK_THAT(refusal(std::string("{}")), Contains("must be a zip archive written by torch.save, but is not"));
  CHECK_THAT(refusal(std::string()), Contains("must be a zip archive"));
  const auto good = from_base64(pickle_values::single);
  CHECK_THAT(refusal(good.substr(0, good.size() / 2)), Contains("PytorchStreamReader failed"));
  CHECK_THAT(refusal(replaced(pickle_values::single, "little", "bigger")), Contains("little-endian"));
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(load_pickle(folder / "none.bin"), Contains("none.bin': No such file or directory"));
  CHECK_THROWS_WITH(load_pickle(folder.path()), Contains("it is not a file"));
}

TEST_CASE("What is no flat dict of tensors is refused", "[pickle]") {
  CHECK_THAT(refusal(pickle_values::a_list),
             Contains("must hold a dict of tensors, but holds a list (hint: save"));
  CHECK_THAT(refusal(pickle_values::a_model), Contains("but holds a torch.nn.modules.linear.Linear"));
}

TEST_CASE("Entries that are no tensors are listed at once, and nothing is called", "[pickle]") {
  const auto text = refusal(pickle_values::odd_entries);
  CHECK_THAT(text,
             Contains("8 problems: ") && Contains("'number' must be a tensor, but is a number") &&
                 Contains("'half' must be a tensor, but is a number") &&
                 Contains("'nothing' must be a tensor, but is None") &&
                 Contains("'nested' must be a tensor, but is a dict") &&
                 Contains("'complex' must be a tensor, but is a tensor of a torch.ComplexFloatStorage"));
  CHECK_THAT(
      text,
      Contains("'sparse' must be a tensor, but is a torch._utils._rebuild_sparse_tensor") &&
          Contains("'small' must be a tensor, but is a tensor made by torch._utils._rebuild_tensor_v3") &&
          Contains("every name must be a string, but one is a number"));
  CHECK_THAT(refusal(pickle_values::a_call), Contains("'a' must be a tensor, but is a posix.system"));
}

TEST_CASE("Names that are given twice are refused", "[pickle]") {
  CHECK_THAT(refusal(replaced(pickle_values::types, "float16", "float32")),
             Contains("'float32' is given twice"));
}

TEST_CASE("Tensors that do not lie in their storage are refused", "[pickle]") {
  // The sizes (3, 4), strides (4, 1) and offset 0 of the only tensor, as they stand in the pickle.
  const std::string place("K\0K\x03K\x04\x86", 7);
  CHECK_THAT(refusal(replaced(pickle_values::single, place, std::string("K\x01K\x03K\x04\x86", 7))),
             Contains("must lie inside its storage of 12 elements"));
  CHECK_THAT(refusal(replaced(pickle_values::single, place, std::string("K\0K\x04K\x04\x86", 7))),
             Contains("a tensor of shape (4, 4) and strides (4, 1) must lie inside"));
  CHECK_THAT(refusal(replaced(pickle_values::single, place, std::string("K\0K\x03K\x04\x85", 7))),
             Contains("must be rebuilt from a storage"));
  CHECK_THAT(refusal(replaced(pickle_values::single, place, std::string("K\0K\x03K\x04\xfe", 7))),
             Contains("the instruction 254"));
}
