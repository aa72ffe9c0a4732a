"""Makes tests/io/pickle_values.h: small files of torch.save, in base64, that tests/io/test_pickle.cpp reads.

    python tests/reference/pickle_values.py > tests/io/pickle_values.h

Needs torch and peft. The values are multiples of 1/8, so that every floating type holds them.
"""

import base64
import collections
import io
import os
import tempfile
import textwrap

import peft
import torch


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


def fill(tensors):
    for tensor in tensors:
        tensor.data.copy_((torch.arange(tensor.numel()) / 8).reshape(tensor.shape))


def adapter():
    """`adapter_model.bin` as PEFT writes it, of a LoRA of rank 2 on a linear layer."""
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["fc"]))
    fill(p for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=False)
        with open(os.path.join(folder, "adapter_model.bin"), "rb") as file:
            return file.read()


class Call:
    """Pickles as a call of a function that no file of tensors has a use for."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def files():
    net = Net()
    fill(list(net.parameters()))
    grid = torch.arange(12).reshape(3, 4) / 8
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    big = collections.OrderedDict((f"layer.{i}", torch.tensor([i])) for i in range(2))
    yield "adapter", adapter()
    yield "state_dict", saved(net.state_dict())
    yield "parameters", saved(dict(net.named_parameters()))
    yield "types", saved({name: (grid * 8).to(getattr(torch, name)) for name in dtypes})
    yield "views", saved({"whole": grid, "turned": grid.t(), "part": grid[1:, 1:3], "one": grid[2, 3],
                          "spread": grid[0, :1].expand(5), "empty": torch.zeros(0, 3)})
    yield "single", saved({"prompt_embeddings": grid})
    yield "protocol_4", saved(big, pickle_protocol=4)
    yield "nothing", saved({})
    yield "legacy", saved({"a": grid}, _use_new_zipfile_serialization=False)
    yield "a_list", saved([grid])
    yield "a_model", saved(torch.nn.Linear(1, 1))
    yield "odd_entries", saved({"good": grid, "number": 3, "half": 0.5, "nothing": None,
                                "nested": {"a": grid},
                                "complex": torch.complex(grid, grid), "sparse": grid.to_sparse(),
                                "small": grid.to(torch.float8_e4m3fn), 7: grid})
    yield "a_call", saved({"a": Call()})


print("// Made by tests/reference/pickle_values.py: files of torch.save, in base64.")
print("#pragma once\n\nnamespace pickle_values {\n")
print("// clang-format off")
for name, contents in files():
    print(f"inline constexpr const char* {name} =")
    lines = textwrap.wrap(base64.b64encode(contents).decode(), 100)
    print("\n".join(f'    "{line}"' for line in lines) + ";\n")
print("// clang-format on\n\n}  // namespace pickle_values")
