// PickleReader: runs the pickle of a file that Python's torch.save wrote, and calls nothing it names.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"

#include <caffe2/serialize/inline_container.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace peft::internal {

/// One object of a pickle. The reader owns them all, so references between them may form any graph.
struct PickleValue {
  enum class Kind { none, boolean, integer, string, tuple, list, dict, global, storage, tensor, foreign };

  Kind kind = Kind::none;
  int64_t integer = 0;              ///< also 0 or 1 for a boolean
  std::string text;                 ///< a string; "module.name" of a global; what a foreign object is
  std::vector<PickleValue*> items;  ///< of a dict: key, value, key, value …
  Tensor tensor;                    ///< of a storage: all of it, in one dimension
};

/// Runs the pickle of a torch archive. It knows dicts, lists, numbers and the calls that rebuild a tensor;
/// any other call is never made, its result becomes a `foreign` value that carries the name.
///
/// LibTorch's own unpickler does not do: `torch::pickle_load` returns None for a `state_dict()` (an
/// OrderedDict with an attribute), and 1.13's knows neither dicts of one entry nor parameters.
class PickleReader {
 public:
  using Kind = PickleValue::Kind;

  explicit PickleReader(caffe2::serialize::PyTorchStreamReader& archive) : archive_(archive) {}

  /// The object the pickle describes; it lives as long as the reader. Throws c10::Error without the file's
  /// name.
  const PickleValue& read(std::string_view bytes) {
    bytes_ = bytes;
    while (!step(next<uint8_t>())) {
    }
    return *pop();
  }

 private:
  template <class Number>
  Number next() {
    Number value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  std::string_view take(uint64_t count) {
    TORCH_CHECK(count <= bytes_.size(), "the pickle ends in the middle");
    const auto taken = bytes_.substr(0, static_cast<size_t>(count));
    bytes_.remove_prefix(static_cast<size_t>(count));
    return taken;
  }

  std::string line() {
    const size_t end = bytes_.find('\n');
    TORCH_CHECK(end != std::string_view::npos, "the pickle ends in the middle");
    std::string text(bytes_.substr(0, end));
    bytes_.remove_prefix(end + 1);
    return text;
  }

  PickleValue* make(Kind kind, std::string text = {}, int64_t integer = 0) {
    auto& value = values_.emplace_back();
    value.kind = kind;
    value.text = std::move(text);
    value.integer = integer;
    return &value;
  }

  void push(PickleValue* value) { stack_.push_back(value); }

  PickleValue* pop() {
    TORCH_CHECK(stack_.size() > (marks_.empty() ? 0 : marks_.back()), "the pickle takes from an empty stack");
    PickleValue* value = stack_.back();
    stack_.pop_back();
    return value;
  }

  /// The newest `count` values, oldest first.
  std::vector<PickleValue*> pop(size_t count) {
    std::vector<PickleValue*> values(count);
    for (size_t i = count; i-- > 0;) values[i] = pop();
    return values;
  }

  std::vector<PickleValue*> pop_to_mark() {
    TORCH_CHECK(!marks_.empty(), "the pickle lacks a mark");
    auto values = pop(stack_.size() - marks_.back());
    marks_.pop_back();
    return values;
  }

  PickleValue* top() {
    TORCH_CHECK(!stack_.empty(), "the pickle takes from an empty stack");
    return stack_.back();
  }

  void push_tuple(std::vector<PickleValue*> items) {
    push(make(Kind::tuple));
    top()->items = std::move(items);
  }

  void append(Kind kind, const std::vector<PickleValue*>& items) {
    PickleValue* target = top();
    TORCH_CHECK(target->kind == kind || target->kind == Kind::foreign,
                "the pickle puts items into no container");
    TORCH_CHECK(kind == Kind::list || items.size() % 2 == 0, "the pickle has a key without a value");
    target->items.insert(target->items.end(), items.begin(), items.end());
  }

  void recall(uint64_t slot) {
    const auto found = memo_.find(slot);
    TORCH_CHECK(found != memo_.end(), "the pickle refers to an object it has not made");
    push(found->second);
  }

  /// Carries out one instruction. Returns true at the last one.
  bool step(uint8_t code) {
    switch (code) {
      case 0x80:  // PROTO
        TORCH_CHECK(next<uint8_t>() <= 5, "the pickle has an unknown protocol");
        break;
      case 0x95:  // FRAME
        take(8);
        break;
      case '.':
        return true;
      case '(':
        marks_.push_back(stack_.size());
        break;
      case '0':
        pop();
        break;
      case 'N':
        push(make(Kind::none));
        break;
      case 0x88:  // NEWTRUE
        push(make(Kind::boolean, {}, 1));
        break;
      case 0x89:  // NEWFALSE
        push(make(Kind::boolean));
        break;
      case 'J':
        push(make(Kind::integer, {}, next<int32_t>()));
        break;
      case 'K':
        push(make(Kind::integer, {}, next<uint8_t>()));
        break;
      case 'M':
        push(make(Kind::integer, {}, next<uint16_t>()));
        break;
      case 0x8a:  // LONG1
        push_long(take(next<uint8_t>()));
        break;
      case 'G':
        take(8);
        push(make(Kind::foreign, "a number"));
        break;
      case 'X':
        push(make(Kind::string, std::string(take(next<uint32_t>()))));
        break;
      case 0x8c:  // SHORT_BINUNICODE
        push(make(Kind::string, std::string(take(next<uint8_t>()))));
        break;
      case 'B':
        take(next<uint32_t>());
        push(make(Kind::foreign, "bytes"));
        break;
      case 'C':
        take(next<uint8_t>());
        push(make(Kind::foreign, "bytes"));
        break;
      case ')':
        push_tuple({});
        break;
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        push_tuple(pop(static_cast<size_t>(code - 0x84)));
        break;
      case 't':
        push_tuple(pop_to_mark());
        break;
      case ']':
        push(make(Kind::list));
        break;
      case '}':
        push(make(Kind::dict));
        break;
      case 0x8f:  // EMPTY_SET
        push(make(Kind::foreign, "a set"));
        break;
      case 'a':
        append(Kind::list, pop(1));
        break;
      case 'e':
      case 0x90:  // ADDITEMS
        append(Kind::list, pop_to_mark());
        break;
      case 's':
        append(Kind::dict, pop(2));
        break;
      case 'u':
        append(Kind::dict, pop_to_mark());
        break;
      case 'q':
        memo_[next<uint8_t>()] = top();
        break;
      case 'r':
        memo_[next<uint32_t>()] = top();
        break;
      case 0x94:  // MEMOIZE
        memo_[memo_.size()] = top();
        break;
      case 'h':
        recall(next<uint8_t>());
        break;
      case 'j':
        recall(next<uint32_t>());
        break;
      case 'c': {
        const std::string module = line();
        push(make(Kind::global, module + "." + line()));
        break;
      }
      case 0x93: {  // STACK_GLOBAL
        const auto parts = pop(2);
        push(make(Kind::global, parts[0]->text + "." + parts[1]->text));
        break;
      }
      case 'R':
      case 0x81: {  // REDUCE, NEWOBJ
        const auto parts = pop(2);
        push(call(*parts[0], *parts[1]));
        break;
      }
      case 'b':
        // BUILD: the attributes of an object, such as the `_metadata` of a state dict.
        pop();
        break;
      case 'Q':
        push(storage(*pop()));
        break;
      default:
        TORCH_CHECK(false, "the pickle has the instruction ", static_cast<int>(code),
                    ", which files of tensors do not use");
    }
    return false;
  }

  void push_long(std::string_view digits) {
    if (digits.size() > 8) return push(make(Kind::foreign, "a number"));
    // Little-endian two's complement of as many bytes as needed.
    uint64_t value = !digits.empty() && (static_cast<uint8_t>(digits.back()) & 0x80) ? ~uint64_t{0} : 0;
    std::memcpy(&value, digits.data(), digits.size());
    push(make(Kind::integer, {}, static_cast<int64_t>(value)));
  }

  /// The result of calling `function`, if it is one of the few that make up a file of tensors.
  PickleValue* call(const PickleValue& function, const PickleValue& arguments) {
    const std::string& name = function.text;
    const auto& given = arguments.items;
    if (function.kind == Kind::global && arguments.kind == Kind::tuple) {
      if (name == "collections.OrderedDict" && given.empty()) return make(Kind::dict);
      if (name == "torch._utils._rebuild_tensor_v2" && given.size() >= 6) return tensor(given);
      if (name.starts_with("torch._utils._rebuild_tensor"))
        return make(Kind::foreign, "a tensor made by " + name);
      if (name == "torch._utils._rebuild_parameter" && !given.empty()) return given[0];
    }
    return make(Kind::foreign, function.kind == Kind::global ? "a " + name : "an unknown object");
  }

  std::optional<std::vector<int64_t>> integers(const PickleValue& value) const {
    if (value.kind != Kind::tuple && value.kind != Kind::list) return std::nullopt;
    std::vector<int64_t> result;
    for (const auto* item : value.items) {
      if (item->kind != Kind::integer || item->integer < 0) return std::nullopt;
      result.push_back(item->integer);
    }
    return result;
  }

  /// _rebuild_tensor_v2(storage, offset, size, stride, …): a view of its storage, after checking that it is
  /// one.
  PickleValue* tensor(const std::vector<PickleValue*>& given) {
    const PickleValue& base = *given[0];
    if (base.kind == Kind::foreign) return given[0];
    if (given.size() > 6 && !given[6]->items.empty())
      return make(Kind::foreign, "a tensor with a pending conj or neg");
    const auto sizes = integers(*given[2]), strides = integers(*given[3]);
    TORCH_CHECK(base.kind == Kind::storage && given[1]->kind == Kind::integer && given[1]->integer >= 0 &&
                    sizes && strides && sizes->size() == strides->size(),
                "a tensor must be rebuilt from a storage, an offset, sizes and strides");
    // What is left of the storage behind the last element the tensor reaches.
    int64_t left = base.tensor.numel() - given[1]->integer - 1;
    bool empty = false;
    for (size_t i = 0; i < sizes->size(); ++i) {
      if ((*sizes)[i] == 0) empty = true;
      if ((*sizes)[i] < 2 || left < 0) continue;
      const int64_t steps = (*sizes)[i] - 1, stride = (*strides)[i];
      left = stride > left / steps ? -1 : left - steps * stride;
    }
    TORCH_CHECK(empty || left >= 0, "a tensor of shape ", shape_text(*sizes), " and strides ",
                shape_text(*strides), " must lie inside its storage of ", base.tensor.numel(), " elements");
    PickleValue* result = make(Kind::tensor);
    result->tensor = empty ? torch::empty(*sizes, base.tensor.options())
                           : base.tensor.as_strided(*sizes, *strides, given[1]->integer);
    return result;
  }

  /// The persistent id ("storage", type, record, device, elements), whatever the device.
  PickleValue* storage(const PickleValue& id) {
    static const std::map<std::string, torch::ScalarType> types = {
        {"torch.DoubleStorage", torch::kFloat64}, {"torch.FloatStorage", torch::kFloat32},
        {"torch.HalfStorage", torch::kFloat16},   {"torch.BFloat16Storage", torch::kBFloat16},
        {"torch.LongStorage", torch::kInt64},     {"torch.IntStorage", torch::kInt32},
        {"torch.ShortStorage", torch::kInt16},    {"torch.CharStorage", torch::kInt8},
        {"torch.ByteStorage", torch::kUInt8},     {"torch.BoolStorage", torch::kBool}};
    const auto& given = id.items;
    TORCH_CHECK(id.kind == Kind::tuple && given.size() >= 5 && given[0]->text == "storage" &&
                    given[1]->kind == Kind::global && given[2]->kind == Kind::string &&
                    given[4]->kind == Kind::integer,
                "a storage must be named by its type, record and size");
    const auto type = types.find(given[1]->text);
    if (type == types.end()) return make(Kind::foreign, "a tensor of a " + given[1]->text);
    const std::string record = "data/" + given[2]->text;
    auto& known = storages_[record];
    if (known == nullptr) {
      auto [data, bytes] = archive_.getRecord(record);
      const auto width = c10::elementSize(type->second);
      TORCH_CHECK(bytes % width == 0 && static_cast<int64_t>(bytes / width) == given[4]->integer,
                  "the record '", record, "' must hold ", given[4]->integer, " elements of ", width,
                  " bytes, but has ", bytes, " bytes");
      const auto options = torch::TensorOptions().dtype(type->second);
      known = make(Kind::storage);
      if (bytes == 0) {
        known->tensor = torch::empty({0}, options);
      } else {
        auto owner = std::make_shared<at::DataPtr>(std::move(data));
        known->tensor = torch::from_blob(
            owner->get(), {given[4]->integer}, [owner](void*) {}, options);
      }
    }
    TORCH_CHECK(known->tensor.scalar_type() == type->second, "the record '", record,
                "' must have one type, but is used as two");
    return known;
  }

  caffe2::serialize::PyTorchStreamReader& archive_;
  std::string_view bytes_;
  std::deque<PickleValue> values_;
  std::vector<PickleValue*> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint64_t, PickleValue*> memo_;
  std::unordered_map<std::string, PickleValue*> storages_;
};

/// "a list", for an error message.
inline std::string pickle_kind(const PickleValue& value) {
  using Kind = PickleValue::Kind;
  switch (value.kind) {
    case Kind::none:
      return "None";
    case Kind::boolean:
      return "a bool";
    case Kind::integer:
      return "a number";
    case Kind::string:
      return "a string";
    case Kind::tuple:
      return "a tuple";
    case Kind::list:
      return "a list";
    case Kind::dict:
      return "a dict";
    case Kind::global:
      return value.text;
    case Kind::storage:
      return "a bare storage";
    case Kind::tensor:
      return "a tensor";
    case Kind::foreign:
      return value.text;
  }
  return "nothing";
}

}  // namespace peft::internal
