"""Prints the reference values of tests/core/test_parameter_site.cpp: LoRA on bare parameters.

python3 parameter_values.py needs torch and peft.
"""

import peft
import torch


def fill(shape, k):
    """Element i is ((((i + k) * 37) mod 101) - 50) / 100, row-major."""
    count = torch.Size(shape).numel()
    values = [((i + k) * 37 % 101 - 50) / 100 for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def show(name, tensor):
    values = ", ".join(f"{v:.12g}" for v in tensor.detach().double().flatten().tolist())
    print(f"{name}: {{{values}}}")


class Experts(torch.nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = torch.nn.Parameter(torch.empty((3, 4, 5) if is_transposed else (3, 5, 4)))
        self.mix = torch.nn.Parameter(torch.empty(4, 5))

    def forward(self, x):
        h = torch.tanh(torch.matmul(x, self.up if self.is_transposed else self.up.transpose(1, 2)))
        return torch.nn.functional.linear(h, self.mix)


class Net(torch.nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(x)


def adapted(model):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[],
                             target_parameters=["experts.up", "experts.mix"])
    model = peft.get_peft_model(model, config)
    outer = model.base_model.model.experts
    inner = outer.base_layer
    assert (inner.parameter_name, outer.parameter_name) == ("up", "mix")
    return model, outer, inner, [layer[name]["default"].weight for layer in (inner._modules, outer._modules)
                                 for name in ("lora_A", "lora_B")]


def filled(is_transposed):
    model = Net(is_transposed).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(fill(parameter.shape, i + 1))
    model, outer, inner, factors = adapted(model)
    model.double()
    for i, factor in enumerate(factors):
        factor.data.copy_(fill(factor.shape, i + 5))
    return model, outer, inner, factors


x = fill([3, 2, 4], 9)
for is_transposed in (False, True):
    name = "transposed" if is_transposed else "plain"
    model, outer, inner, factors = filled(is_transposed)
    output = model(x)
    show(f"{name} output", output)
    (output * fill(output.shape, 12)).sum().backward()
    for tensor, factor in zip(("up A", "up B", "mix A", "mix B"), factors):
        show(f"{name} gradient of {tensor}", factor.grad)
    inner.merge()
    show(f"{name} merged up[1]", inner.get_param()[1])
    model, outer, inner, factors = filled(is_transposed)
    optimizer = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    show(f"{name} losses", torch.tensor(losses, dtype=torch.float64))
    show(f"{name} up B after 12 steps", factors[1])

net = Net(False)
torch.manual_seed(5)
factors = adapted(net)[3]
show("up A of seed 5, first row", factors[0][0])
show("mix A of seed 5, first row", factors[2][0])
show("next of seed 5", torch.rand(1))
