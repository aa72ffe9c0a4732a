"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_ia3.cpp.

python3 ia3_values.py [test_ia3.cpp] needs torch and peft. Every list of numbers in the test cases named below
must be one of the lists computed here, and every list computed here must be there. With --print they are
printed instead.
"""

import pathlib
import sys

import peft
import torch

from lora_values import One, compare, fill

TEST = pathlib.Path(__file__).resolve().parent.parent / "methods" / "test_ia3.cpp"


def filled(layer, feedforward):
    """The adapted layer, filled, in double precision."""
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight.shape, 1))
        layer.bias.copy_(fill(layer.bias.shape, 2))
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    model = peft.get_peft_model(One(layer), config).double()
    adapted = model.base_model.model.layer
    with torch.no_grad():
        adapted.ia3_l["default"].copy_(fill(adapted.ia3_l["default"].shape, 3) + 1)
    return model, adapted


def outputs():
    values = {}
    for form in ["output", "feed-forward"]:
        model, layer = filled(torch.nn.Linear(4, 3), form == "feed-forward")
        x = fill([2, 4], 5).requires_grad_(True)
        y = model(x)
        (y * fill([2, 3], 6)).sum().backward()
        values[f"{form}: y"] = y
        values[f"{form}: gradient of l"] = layer.ia3_l["default"].grad
        values[f"{form}: gradient of x"] = x.grad
        layer.merge(safe_merge=True)
        values[f"{form}: merged weight"] = layer.base_layer.weight
        values[f"{form}: merged bias"] = layer.base_layer.bias
        if form == "feed-forward":
            del values[f"{form}: merged bias"]  # the base's own
        model, layer = filled(torch.nn.Conv2d(4, 6, 3, padding=1, groups=2), form == "feed-forward")
        y = model(fill([1, 4, 3, 3], 5))
        (y * fill([1, 6, 3, 3], 6)).sum().backward()
        values[f"{form}: first row of channel 0"] = y[0, 0, 0]
        values[f"{form}: last row of channel 5"] = y[0, 5, 2]
        values[f"{form}: convolution's gradient of l"] = layer.ia3_l["default"].grad
        layer.merge()
        values[f"{form}: convolution's merged weight"] = layer.base_layer.weight[:, :, 1, 1]
    model, layer = filled(torch.nn.Linear(4, 3), False)
    model.add_adapter("other", peft.IA3Config(target_modules=["layer"], feedforward_modules=[]))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        layer.ia3_l["other"].data = fill(layer.ia3_l["other"].shape, 7)
    values["two adapters"] = model(fill([2, 4], 5))
    return values


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.down = torch.nn.Linear(12, 2)

    def forward(self, x):
        return self.down(torch.tanh(self.conv(x)).flatten(1))


def net(**settings):
    """The net with its weights filled, adapted: the convolution's outputs and the linear layer's inputs."""
    base = Net().double()
    with torch.no_grad():
        for index, parameter in enumerate(base.parameters()):
            parameter.copy_(fill(parameter.shape, index))
    torch.manual_seed(0)
    config = peft.IA3Config(target_modules=["conv", "down"], feedforward_modules=["down"], **settings)
    return peft.get_peft_model(base, config)


def training():
    model = net().double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.01)
    x = fill([4, 2, 3, 3], 5)
    target = fill([4, 2], 6)
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
    return {"last loss": loss.view(1), "conv's l": trained[0], "down's l": trained[1]}


def starts():
    assert all((p == 1).all() for n, p in net().named_parameters() if "ia3_l" in n)
    after = torch.randn(2)
    drawn = [p for n, p in net(init_ia3_weights=False).named_parameters() if "ia3_l" in n]
    return {"the next draw": after, "conv's start": drawn[0], "down's start": drawn[1]}


def main(arguments):
    torch.set_num_threads(1)
    cases = {
        "(IA)³ equals Hugging Face's numbers": (outputs(), 1e-9),
        "(IA)³ trains as the reference does over 12 steps of AdamW": (training(), 1e-9),
        "(IA)³ draws the reference's random numbers": (starts(), 1e-7),
    }
    if arguments == ["--print"]:
        for values, _ in cases.values():
            for name, tensor in values.items():
                print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))
        return 0
    source = pathlib.Path(arguments[0] if arguments else TEST).read_text()
    print(f"peft {peft.__version__}, torch {torch.__version__}")
    return 1 if sum(compare(source, title, *case) for title, case in cases.items()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
