"""Prints the reference values of tests/methods/test_masked.cpp: FISH's mask and training with masked gradients as
T-Few's code does it, BitFit's random mask as its author's code draws it.

python3 mask_values.py needs torch and numpy.
"""

import numpy
import torch

from lora_values import fill


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.hidden = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 3)
        self.double()
        with torch.no_grad():
            for k, (name, parameter) in enumerate(self.named_parameters(), 1):
                parameter.copy_(fill(parameter.shape, k) + (1 if name == "norm.weight" else 0))

    def loss(self, i):
        ids = torch.tensor([i % 5, (i * 2 + 1) % 5, i * i % 5])
        logits = self.head(self.norm(torch.tanh(self.hidden(self.embed(ids))))).mean(0)
        return torch.nn.functional.cross_entropy(logits[None], torch.tensor([i % 3]))


def show(name, values):
    print(f"{name}: " + ", ".join(f"{v:.10g}" for v in values))


def fish():
    net = Net()
    parameters = list(net.parameters())
    fisher = [torch.zeros_like(p) for p in parameters]
    for i in range(7):
        net.zero_grad()
        net.loss(i).backward()
        for sum_, p in zip(fisher, parameters):
            sum_ += p.grad.square() / 7
    scores = torch.cat([f.flatten() for f in fisher])
    kept = torch.topk(scores, int(len(scores) * 0.15))[1]
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[kept] = True
    show("FISH", mask.nonzero().flatten().tolist())
    masks = [m.view(p.shape) for m, p in zip(mask.split([p.numel() for p in parameters]), parameters)]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)
    for step in range(12):
        net.zero_grad()
        loss = net.loss(step)
        loss.backward()
        for p, m in zip(parameters, masks):
            p.grad *= m
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    show("FISH_LOSS", [loss.item()])
    show("FISH_HIDDEN", net.hidden.bias.tolist())
    show("FISH_HEAD", net.head.weight.flatten().tolist())


def uniform():
    numpy.random.seed(5)
    first, kept = 0, []
    sizes = [p.numel() for p in Net().parameters()]
    for n in sizes:
        kept += sorted({first + i for i in numpy.random.randint(0, n, int(n * 40 / sum(sizes)))})
        first += n
    show("UNIFORM", kept)


if __name__ == "__main__":
    fish()
    uniform()
