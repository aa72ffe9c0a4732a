#include "catch.h"
#include "io/temporary_folder.h"
#include "peft/io/safetensors.h"

#include <torch/torch.h>

#include <string>

using peft::load_safetensors;
using peft::SafetensorsFile;
using peft::save_safetensors;
using peft_test::read_bytes;
using peft_test::TemporaryFolder;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

/// A file of this header and this many zero bytes of data.
std::string file_of(const std::string& header, size_t data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(data, '\0');
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

/// What opening a file of these bytes says, mapped or not; empty when it opens.
std::string refusal(const std::string& bytes) {
  const TemporaryFolder folder;
  write_bytes(folder / "x.safetensors", bytes);
  std::string text[2];
  for (const bool map : {false, true}) {
    try {
      const SafetensorsFile file(folder / "x.safetensors", map);
    } catch (const c10::Error& error) {
      text[map] = error.what_without_backtrace();
      CHECK_THAT(text[map], Contains("SafetensorsFile: '") && Contains("x.safetensors'"));
    }
  }
  CHECK(text[0] == text[1]);
  return text[0];
}

const std::string one = entry("F32", "[2]", "[0,8]");

}  // namespace

TEST_CASE("Tensors come back as they were saved", "[safetensors]") {
  const TemporaryFolder folder;
  const auto dtype =
      GENERATE(torch::kFloat64, torch::kFloat32, torch::kFloat16, torch::kBFloat16, torch::kInt64,
               torch::kInt32, torch::kInt16, torch::kInt8, torch::kUInt8, torch::kBool);
  const Tensor values = (torch::arange(24) % 5).reshape({2, 3, 4}).to(dtype);
  save_safetensors(folder / "x.safetensors",
                   {{"plain", values},
                    {"turned", values.transpose(0, 2)},
                    {"part", values.select(1, 1)},
                    {"scalar", values[1][2][3]},
                    {"empty", values.slice(0, 0, 0)},
                    {"learned", dtype == torch::kFloat32 ? values.clone().requires_grad_() : values}});
  const bool map = GENERATE(true, false);
  const SafetensorsFile file(folder / "x.safetensors", map);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  CHECK(file.names().size() == 6);
  CHECK(file.entry("plain").dtype == dtype);
  CHECK(file.entry("plain").shape == std::vector<int64_t>{2, 3, 4});
  CHECK(file.entry("plain").end - file.entry("plain").begin == values.nbytes());
  for (const auto& [name, expected] : std::map<std::string, Tensor>{{"plain", values},
                                                                    {"turned", values.transpose(0, 2)},
                                                                    {"part", values.select(1, 1)},
                                                                    {"scalar", values[1][2][3]},
                                                                    {"empty", values.slice(0, 0, 0)},
                                                                    {"learned", values}}) {
    INFO(name);
    REQUIRE(file.contains(name));
    const Tensor read = file.tensor(name);
    CHECK(read.scalar_type() == dtype);
    CHECK(read.is_contiguous());
    CHECK_FALSE(read.requires_grad());
    CHECK(torch::equal(read, expected));
  }
  // Written again, the same bytes.
  save_safetensors(folder / "y.safetensors", load_safetensors(folder / "x.safetensors"));
  CHECK(read_bytes(folder / "y.safetensors") == read_bytes(folder / "x.safetensors"));
}

TEST_CASE("A file's bytes are those of the Python writer", "[safetensors]") {
  // safetensors.torch.save_file({"b": float32 [1, 2], "a": int64 [3], "c": bool [True]}, …, {"format": "pt"})
  const TemporaryFolder folder;
  save_safetensors(
      folder / "x.safetensors",
      {{"b", torch::tensor({1.0f, 2.0f})}, {"a", torch::tensor({int64_t{3}})}, {"c", torch::tensor({true})}});
  std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},)"
      R"("c":{"dtype":"BOOL","shape":[1],"data_offsets":[16,17]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string data("\x03\0\0\0\0\0\0\0\0\0\x80\x3f\0\0\0\x40\x01", 17);
  CHECK(read_bytes(folder / "x.safetensors") == file_of(header, 0) + data);
}

TEST_CASE("Tensors outlive the file object, and the file its name", "[safetensors]") {
  const TemporaryFolder folder;
  const Tensor values = torch::arange(1000, torch::kFloat32);
  save_safetensors(folder / "x.safetensors", {{"a", values}});
  Tensor read;
  {
    const SafetensorsFile file(folder / "x.safetensors");
    read = file.tensor("a");
    // A view: the same memory each time.
    CHECK(read.data_ptr() == file.tensor("a").data_ptr());
  }
  save_safetensors(folder / "x.safetensors", {{"a", values + 1}});
  CHECK(torch::equal(read, values));
  std::filesystem::remove(folder / "x.safetensors");
  CHECK(torch::equal(read, values));
}

TEST_CASE("A file read into memory may be written to", "[safetensors]") {
  const TemporaryFolder folder;
  save_safetensors(folder / "x.safetensors", {{"a", torch::zeros({3})}});
  const SafetensorsFile file(folder / "x.safetensors", /*map=*/false);
  file.tensor("a").add_(1);
  CHECK(torch::equal(file.tensor("a"), torch::ones({3})));
  CHECK(torch::equal(load_safetensors(folder / "x.safetensors").at("a"), torch::zeros({3})));
}

TEST_CASE("Data at odd addresses is copied", "[safetensors]") {
  const TemporaryFolder folder;
  // A header of odd length, and a wide tensor behind a narrow one.
  std::string bytes =
      file_of("{\"a\":" + entry("U8", "[1]", "[0,1]") + ",\"b\":" + entry("F64", "[]", "[1,9]") + "}", 1);
  const double value = 2.5;
  bytes.append(reinterpret_cast<const char*>(&value), 8);
  for (int padding = 0; padding < 8; ++padding) {
    write_bytes(folder / "x.safetensors", bytes);
    const SafetensorsFile file(folder / "x.safetensors");
    CHECK(file.names() == std::vector<std::string>{"a", "b"});
    const Tensor b = file.tensor("b");
    CHECK(b.dim() == 0);
    CHECK(b.item<double>() == 2.5);
    CHECK(reinterpret_cast<std::uintptr_t>(b.data_ptr()) % 8 == 0);
    const auto length = static_cast<char>(bytes[0] + 1);
    bytes.insert(8 + static_cast<size_t>(static_cast<unsigned char>(bytes[0])), 1, ' ');
    bytes[0] = length;
  }
}

TEST_CASE("Names follow the data, not the header, and metadata is kept", "[safetensors]") {
  const TemporaryFolder folder;
  write_bytes(folder / "x.safetensors",
              file_of("{\"b\":" + entry("F32", "[2]", "[4,12]") +
                          ",\"__metadata__\":{\"k\":\"v\",\"\":\"ü\"},\"a\":" + entry("F32", "[]", "[0,4]") +
                          ",\"none\":" + entry("I8", "[3,0]", "[4,4]") + "}   ",
                      12));
  const SafetensorsFile file(folder / "x.safetensors");
  CHECK(file.names() == std::vector<std::string>{"a", "none", "b"});
  CHECK(file.metadata() == std::map<std::string, std::string>{{"k", "v"}, {"", "ü"}});
  CHECK(file.tensor("none").sizes() == torch::IntArrayRef({3, 0}));
  CHECK_THROWS_WITH(file.tensor("c"), Contains("has no tensor 'c'; closest: 'a'"));

  write_bytes(folder / "empty.safetensors", file_of("{}", 0));
  CHECK(SafetensorsFile(folder / "empty.safetensors").names().empty());
}

TEST_CASE("Types LibTorch lacks are listed and refused by name when asked for", "[safetensors]") {
  const TemporaryFolder folder;
  const auto dtype = GENERATE(as<std::string>(), "U16", "U32", "U64", "F8_E4M3", "F8_E5M2");
  const std::string size = dtype[0] == 'F' ? "1" : dtype == "U16" ? "2" : dtype == "U32" ? "4" : "8";
  write_bytes(folder / "x.safetensors",
              file_of("{\"odd\":" + entry(dtype, "[1]", "[0," + size + "]") + "}", std::stoul(size)));
  const SafetensorsFile file(folder / "x.safetensors");
  CHECK(file.names() == std::vector<std::string>{"odd"});
  CHECK(file.entry("odd").dtype_name == dtype);
  CHECK_THROWS_WITH(file.tensor("odd"), Contains("dtype " + dtype + " of tensor 'odd' is not supported"));
}

TEST_CASE("Files that are no safetensors files are refused", "[safetensors]") {
  CHECK_THAT(refusal(""), Contains("it has 0 bytes, but needs at least 8"));
  CHECK_THAT(refusal("1234567"), Contains("it has 7 bytes"));
  CHECK_THAT(refusal(std::string("\x10\0\0\0\0\0\0\0{}", 10)), Contains("has 16 bytes, but only 2 follow"));
  CHECK_THAT(refusal(std::string("\0\0\0\x06\0\0\0\0{}", 10)),
             Contains("at most 100000000 bytes, but has 100663296"));
  CHECK_THAT(refusal(std::string(8, '\xff') + "{}"), Contains("at most 100000000 bytes"));
  CHECK_THAT(refusal(file_of(" {}", 0)), Contains("must start with '{'"));
  CHECK_THAT(refusal(file_of("", 0)), Contains("must start with '{'"));
  CHECK_THAT(refusal(file_of("{", 0)), Contains("must end with '}'"));
  CHECK_THAT(refusal(file_of("{} x", 0)), Contains("must end with '}'"));
  CHECK_THAT(refusal(file_of("{}{}", 0)), Contains("invalid JSON"));
  CHECK_THAT(refusal(file_of(std::string("{}\0}", 4), 0)), Contains("NUL byte"));
  CHECK_THAT(refusal(file_of("{\"a\":" + one + ",}", 8)), Contains("invalid JSON"));
  CHECK_THAT(refusal(file_of("{\"\xff\":" + one + "}", 8)), Contains("invalid JSON") && Contains("UTF-8"));
  CHECK_THAT(refusal(file_of("{\"\\ud800\":" + one + "}", 8)), Contains("invalid JSON"));
}

TEST_CASE("Headers that nest deeply are refused at the first level too many", "[safetensors]") {
  std::string bomb = "{\"a\":";
  for (int i = 0; i < 1000000; ++i) bomb += "{\"a\":";
  CHECK_THAT(refusal(file_of(bomb + "}", 0)),
             Contains("'a': expected dtype, shape and data_offsets, but got 'a'"));
  CHECK_THAT(refusal(file_of("{\"a\":" + std::string(1000000, '[') + "}", 0)),
             Contains("'a' must be an object"));
  CHECK_THAT(refusal(file_of("{\"a\":{\"shape\":" + std::string(1000000, '[') + "}", 0)),
             Contains("it has an array"));
  CHECK_THAT(refusal(file_of("{\"__metadata__\":{\"k\":{}}}", 0)), Contains("metadata 'k' must be a string"));
}

TEST_CASE("Headers with wrong values are refused", "[safetensors]") {
  CHECK_THAT(refusal(file_of("{\"a\":" + one + ",\"a\":" + one + "}", 8)),
             Contains("the name 'a' is given twice"));
  CHECK_THAT(refusal(file_of("{\"__metadata__\":{},\"__metadata__\":{}}", 0)),
             Contains("'__metadata__' is given twice"));
  CHECK_THAT(refusal(file_of("{\"__metadata__\":{\"k\":\"\",\"k\":\"\"}}", 0)),
             Contains("'k' is given twice"));
  CHECK_THAT(refusal(file_of("{\"__metadata__\":{\"k\":1}}", 0)),
             Contains("'k' must be a string, but it is the number 1"));
  CHECK_THAT(refusal(file_of("{\"__metadata__\":null}", 0)), Contains("must be an object, but it is null"));
  CHECK_THAT(refusal(file_of("{\"a\":3}", 0)), Contains("'a' must be an object, but it is the number 3"));
  CHECK_THAT(refusal(file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8)),
             Contains("'a' must have 'data_offsets'"));
  CHECK_THAT(refusal(file_of("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 8)),
             Contains("'dtype' is given twice"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[2]", "[0,8,8]") + "}", 8)),
             Contains("must be two numbers, but got 3"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F31", "[2]", "[0,8]") + "}", 8)),
             Contains("but it is 'F31'"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[-2]", "[0,8]") + "}", 8)),
             Contains("non-negative integers") && Contains("number -2"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[2.0]", "[0,8]") + "}", 8)),
             Contains("the number 2.0"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[1e0]", "[0,8]") + "}", 8)),
             Contains("the number 1e0"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[\"2\"]", "[0,8]") + "}", 8)),
             Contains("the string '2'"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[2]", "[0,18446744073709551616]") + "}", 8)),
             Contains("at most 64 bits"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[18446744073709551615]", "[0,8]") + "}", 8)),
             Contains("is too large"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[4294967296,4294967296]", "[0,0]") + "}", 0)),
             Contains("is too large"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[0,4294967296,4294967296]", "[0,0]") + "}", 0)),
             Contains("is too large"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F4", "[1]", "[0,1]") + "}", 1)),
             Contains("needs 1 bytes, but has 1"));
}

TEST_CASE("Headers that do not describe the data exactly are refused", "[safetensors]") {
  CHECK(refusal(file_of("{\"a\":" + one + "}", 8)).empty());
  CHECK_THAT(refusal(file_of("{\"a\":" + one + "}", 7)),
             Contains("bytes 0 to 8 lie outside the 7 bytes of data"));
  CHECK_THAT(refusal(file_of("{\"a\":" + one + "}", 9)), Contains("cover 8 bytes of data, but it has 9"));
  CHECK_THAT(refusal(file_of("{}", 1)), Contains("cover 0 bytes of data, but it has 1"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[3]", "[0,8]") + "}", 8)),
             Contains("F32 (3) needs 12 bytes, but has 8"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[2]", "[8,0]") + "}", 8)),
             Contains("bytes 8 to 0 lie outside"));
  CHECK_THAT(refusal(file_of("{\"a\":" + entry("F32", "[2]", "[4,12]") + "}", 12)),
             Contains("bytes 4 to 12 follow a hole"));
  CHECK_THAT(refusal(file_of("{\"a\":" + one + ",\"b\":" + entry("F32", "[2]", "[4,12]") + "}", 12)),
             Contains("'b': bytes 4 to 12 overlap another tensor's"));
  CHECK_THAT(refusal(file_of("{\"a\":" + one + ",\"b\":" + one + "}", 8)),
             Contains("'b': bytes 0 to 8 overlap"));
}

TEST_CASE("All wrong entries are listed at once", "[safetensors]") {
  const auto text = refusal(file_of("{\"a\":" + entry("F31", "[2]", "[0,8]") +
                                        ",\"b\":" + entry("F32", "[3]", "[8,16]") + ",\"c\":" + one + "}",
                                    16));
  CHECK_THAT(text, Contains("3 problems: 'a': its dtype") && Contains("\n  'b': F32 (3) needs 12") &&
                       Contains("\n  'c': bytes 0 to 8 overlap"));
}

TEST_CASE("Paths that hold no file are refused", "[safetensors]") {
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(SafetensorsFile(folder / "none"), Contains("none': No such file or directory"));
  CHECK_THROWS_WITH(SafetensorsFile(folder.path()), Contains("it is not a file"));
}

TEST_CASE("What cannot be saved is listed and nothing is written", "[safetensors]") {
  const TemporaryFolder folder;
  const Tensor good = torch::zeros({2});
  CHECK_THROWS_WITH(save_safetensors(folder / "x.safetensors", {{"a", good},
                                                                {"a", good},
                                                                {"__metadata__", good},
                                                                {"none", Tensor()},
                                                                {"sparse", good.to_sparse()},
                                                                {"complex", good.to(torch::kComplexFloat)}}),
                    Contains("x.safetensors' was not written: 5 problems") &&
                        Contains("'a' is given twice") && Contains("'__metadata__' must not be") &&
                        Contains("'none' must be defined") && Contains("'sparse' must be dense") &&
                        Contains("'complex' has dtype ComplexFloat"));
  CHECK_THROWS_WITH(save_safetensors(folder / "x.safetensors", {{"\xff", good}}), Contains("must be UTF-8"));
  CHECK_THROWS_WITH(save_safetensors(folder / "x.safetensors", {{"a", good}}, {{"k", "\xff"}}),
                    Contains("must be UTF-8"));
  CHECK(folder.count() == 0);
}

TEST_CASE("Names and metadata of any text survive", "[safetensors]") {
  const TemporaryFolder folder;
  const std::string odd = "a\"\\/\b\f\n\r\t\x01\x7f ü 😀" + std::string(1, '\0') + "z";
  save_safetensors(folder / "x.safetensors", {{odd, torch::ones({1})}, {"", torch::zeros({1})}},
                   {{odd, odd}, {"format", "np"}});
  const SafetensorsFile file(folder / "x.safetensors");
  CHECK(file.tensor(odd).item<float>() == 1);
  CHECK(file.tensor("").item<float>() == 0);
  CHECK(file.metadata() == std::map<std::string, std::string>{{odd, odd}, {"format", "np"}});
}

TEST_CASE("Tensors on a GPU are saved from there", "[safetensors]") {
  if (!torch::cuda::is_available()) return;
  const TemporaryFolder folder;
  const Tensor values = torch::arange(6, torch::kFloat32).reshape({2, 3});
  save_safetensors(folder / "x.safetensors", {{"a", values.to(torch::kCUDA).t()}});
  CHECK(torch::equal(load_safetensors(folder / "x.safetensors").at("a"), values.t()));
}

TEST_CASE("Writing to a tensor of a mapped file leaves the file as it is", "[safetensors]") {
  const TemporaryFolder folder;
  save_safetensors(folder / "x.safetensors", {{"w", torch::ones({4})}});
  const auto before = read_bytes(folder / "x.safetensors");
  auto w = load_safetensors(folder / "x.safetensors").at("w");
  w.mul_(3);
  CHECK(torch::equal(w, torch::full({4}, 3.0)));
  CHECK(read_bytes(folder / "x.safetensors") == before);
}
