"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_lora.cpp.

python3 lora_values.py [test_lora.cpp] needs torch and peft. Every list of numbers in the test's two cases
"LoRA equals Hugging Face's numbers" and "LoRA starts from the reference's random numbers" must be one of the
lists computed here, and every list computed here must be there. With --print they are printed instead.
"""

import pathlib
import re
import sys

import peft
import torch

TEST = pathlib.Path(__file__).resolve().parent.parent / "methods" / "test_lora.cpp"


def fill(shape, k):
    """Element i is ((((i + k) * 37) mod 101) - 50) / 100, row-major."""
    count = 1
    for size in shape:
        count *= size
    values = [((i + k) * 37 % 101 - 50) / 100 for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


class One(torch.nn.Module):
    """A model of one layer, which PEFT adapts as "layer"."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def filled(layer, **settings):
    """The adapted layer: base, A and B filled, in double precision."""
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight.shape, 1))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(fill(layer.bias.shape, 2))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], **settings)
    model = peft.get_peft_model(One(layer), config).double()
    adapted = model.base_model.model.layer
    embedding = isinstance(layer, torch.nn.Embedding)
    A = adapted.lora_embedding_A["default"] if embedding else adapted.lora_A["default"].weight
    B = adapted.lora_embedding_B["default"] if embedding else adapted.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(fill(A.shape, 3))
        B.copy_(fill(B.shape, 4))
    return model, adapted, A, B


def outputs():
    """What the first test case compares, in the order of its lines."""
    values = {}
    model, layer, A, B = filled(torch.nn.Linear(4, 3))
    x = fill([2, 4], 5).requires_grad_(True)
    y = model(x)
    (y * fill([2, 3], 6)).sum().backward()
    values["linear output"] = y
    values["linear gradient of A"] = A.grad
    values["linear gradient of B"] = B.grad
    values["linear gradient of x"] = x.grad
    layer.merge()
    values["linear merged weight"] = layer.base_layer.weight
    model, layer, _, _ = filled(torch.nn.Linear(4, 3), use_rslora=True)
    values["rslora scaling"] = torch.tensor([layer.scaling["default"]], dtype=torch.float64)
    values["rslora output"] = model(fill([2, 4], 5))
    model, _, _, _ = filled(torch.nn.Embedding(5, 3))
    values["embedding output"] = model(torch.tensor([0, 2, 4]))
    model, layer, _, _ = filled(torch.nn.Conv2d(2, 3, 3, padding=1))
    y = model(fill([1, 2, 3, 3], 5))
    values["convolution, first row of channel 0"] = y[0, 0, 0]
    values["convolution, last row of channel 2"] = y[0, 2, 2]
    values["convolution, sum of the change"] = layer.get_delta_weight("default").sum().view(1)
    return values


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(4, 3)
        self.e = torch.nn.Embedding(5, 3)
        self.c = torch.nn.Conv2d(1, 2, 2)


def start(targets, dtype=torch.float32, **settings):
    """The adapted toy model right after it was made."""
    toy = Toy().to(dtype)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **settings)
    return peft.get_peft_model(toy, config).base_model.model


def starts():
    """What the second test case compares, in the order of its lines."""
    values = {}
    toy = start(["q", "e", "c"])
    values["start of q's A"] = toy.q.lora_A["default"].weight
    values["start of e's B"] = toy.e.lora_embedding_B["default"]
    values["start of c's A"] = toy.c.lora_A["default"].weight
    zeros = [toy.q.lora_B["default"].weight, toy.e.lora_embedding_A["default"], toy.c.lora_B["default"].weight]
    assert not any(zero.any() for zero in zeros)
    values["gaussian start"] = start(["q"], init_lora_weights="gaussian").q.lora_A["default"].weight
    rounded = start(["q"], torch.bfloat16).q.lora_A["default"].weight
    assert rounded.dtype == torch.float32
    values["start on a bfloat16 base"] = rounded
    return values


def lists_of(source, title):
    """The number lists in braces, and the lone expected scaling, of one test case."""
    begin = source.index(f'TEST_CASE("{title}"')
    end = source.find("\nTEST_CASE(", begin)
    body = source[begin : end if end > 0 else len(source)]
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    lists = re.findall(rf"\{{\s*({number}(?:\s*,\s*{number})*)\s*\}}", body)
    lists += re.findall(rf"WithinAbs\(({number}), 1e-15\)", body)
    return [[float(value) for value in re.split(r"\s*,\s*", text)] for text in lists]


def compare(source, title, values, tolerance):
    """The number of differences between one test case and what was computed."""
    found = lists_of(source, title)
    failures = 0
    used = set()
    for name, tensor in values.items():
        computed = tensor.detach().double().flatten().tolist()
        matches = set()
        for index, listed in enumerate(found):
            same = len(listed) == len(computed)
            if same and all(abs(a - b) <= tolerance for a, b in zip(listed, computed)):
                matches.add(index)
        print(f"{'ok  ' if matches else 'DIFFERS'} {name}: {len(computed)} values")
        if not matches:
            failures += 1
            print("    computed " + ", ".join(f"{value:.10g}" for value in computed))
        used |= matches
    for index, listed in enumerate(found):
        if index not in used:
            failures += 1
            print(f"DIFFERS a list of the test is not among those computed: {listed}")
    return failures


def main(arguments):
    torch.set_num_threads(1)
    if arguments == ["--print"]:
        for name, tensor in {**outputs(), **starts()}.items():
            print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))
        return 0
    source = pathlib.Path(arguments[0] if arguments else TEST).read_text()
    print(f"peft {peft.__version__}, torch {torch.__version__}")
    failures = compare(source, "LoRA equals Hugging Face's numbers", outputs(), 1e-9)
    failures += compare(source, "LoRA starts from the reference's random numbers", starts(), 1e-7)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
