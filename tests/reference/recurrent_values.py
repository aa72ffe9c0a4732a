"""Prints the reference values of tests/model/test_reparametrized.cpp: LoRA on torch.nn.LSTM and GRU.

python3 recurrent_values.py needs torch and peft, which adapts the weights as `target_parameters`.
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


class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer

    def forward(self, x):
        return self.rnn(x)[0]


def filled(layer):
    """The model and the factors of each weight, in the order of the layer's tensors."""
    model = Net(layer).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(fill(parameter.shape, i + 1))
    names = [f"rnn.{name}" for name, _ in layer.named_parameters() if name.startswith("weight")]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names)
    model = peft.get_peft_model(model, config).double()
    factors = [p for _, p in sorted((n for n in model.named_parameters() if "lora" in n[0]),
                                    key=lambda n: (-n[0].count("base_layer"), n[0]))]
    for i, factor in enumerate(factors):
        factor.data.copy_(fill(factor.shape, i + 31))
    return model, factors


x = fill([3, 2, 3], 9)
for name, make in (("LSTM", lambda: torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)),
                   ("GRU", lambda: torch.nn.GRU(3, 4))):
    model, factors = filled(make())
    output = model(x)
    show(f"{name} output", output)
    (output * fill(output.shape, 12)).sum().backward()
    show(f"{name} gradient sums", torch.stack([(f.grad * fill(f.shape, 7)).sum() for f in factors]))
    model, factors = filled(make())
    optimizer = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    show(f"{name} losses", torch.tensor(losses, dtype=torch.float64))
    show(f"{name} last factor after 12 steps", factors[-1])
