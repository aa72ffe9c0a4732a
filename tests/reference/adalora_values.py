"""Prints the reference values of tests/methods/test_adalora.cpp, from live PEFT.

    python tests/reference/adalora_values.py
"""

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from torch import nn

torch.set_default_dtype(torch.float64)


def fill(shape, k):
    """The tensors of the tests."""
    count = torch.Size(shape).numel()
    return torch.tensor([((i + k) * 37 % 101 - 50) / 100 for i in range(count)]).view(shape)


class Output(dict):
    loss = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.conv, self.b = nn.Linear(4, 6), nn.Conv2d(2, 3, 2), nn.Linear(6, 3)

    def forward(self, x, c):
        y = self.b(self.conv(torch.tanh(self.a(x)).view(-1, 2, 3, 1).expand(-1, -1, -1, 3)).tanh().flatten(1)[:, :6])
        out = Output()
        out.loss = ((y - c) ** 2).mean() * 4
        return out


def trace(clip):
    net = Net()
    for k, parameter in enumerate(net.parameters(), 1):
        parameter.data = fill(parameter.shape, k)
    config = AdaLoraConfig(target_modules=["a", "conv", "b"], init_r=3, target_r=1, tinit=2, tfinal=3, deltaT=2,
                           total_step=12, lora_alpha=6, orth_reg_weight=0.1)
    model = AdaLoraModel(net, {"default": config}, "default")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for n, p in trained:
        index = ["a.", "conv.", "b."].index(next(s for s in ["a.", "conv.", "b."] if f".{s}" in f".{n}"))
        p.data = fill(p.shape, {"A": 3, "B": 6, "E": 8}[n.split("lora_")[1][0]] + index)
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.05, weight_decay=0.01)
    for t in range(12):
        loss = model(x=fill((5, 4), 5), c=fill((5, 3), 6)).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_([p for _, p in trained], clip)
        optimizer.step()
        model.update_and_allocate(t)
        optimizer.zero_grad()
        values = [f"{v:.12g}" for n, p in trained if "lora_E" in n for v in p.detach().view(-1).tolist()]
        print(f"      {{{loss.item():.14g}, {{{', '.join(values)}}}}},")
    print("     ", {k: v for k, v in config.rank_pattern.items()})


if __name__ == "__main__":
    for clip in (0, 0.3):
        print("clip", clip)
        trace(clip)
    torch.set_default_dtype(torch.float32)
    net = nn.ModuleDict({"q": nn.Linear(4, 3), "c": nn.Conv2d(1, 2, 2)})
    torch.manual_seed(0)
    model = AdaLoraModel(net, {"default": AdaLoraConfig(target_modules=["q", "c"], init_r=2, total_step=5)}, "default")
    for n, p in model.named_parameters():
        if "lora_" in n:
            print(n, [f"{v:.9g}" for v in p.detach().view(-1).tolist()])
