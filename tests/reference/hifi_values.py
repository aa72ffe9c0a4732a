"""Prints the reference values of tests/methods/test_hifi.cpp: HiFi's measures of attention heads in numpy, written from
the paper's definitions, and training of the rows it keeps with masked gradients in torch.

python3 hifi_values.py needs torch and numpy.
"""

import numpy as np
import torch

from lora_values import fill

LAYERS, HEADS, WIDTH = 2, 4, 3
SIZE = HEADS * WIDTH
LENGTHS = [7, 5]


class Block(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.query, self.key, self.value, self.out = (torch.nn.Linear(SIZE, SIZE).double() for _ in range(4))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(fill(p.shape, 10 * k + i) * (4 if i < 4 else 1))  # sharp attention


def blocks():
    return torch.nn.ModuleList(Block(k) for k in range(LAYERS))


def forward(model, x, seen=None):
    """x (time, size); what the heads give is appended to `seen`."""
    for block in model:
        q, k, v = (f(x).view(-1, HEADS, WIDTH).transpose(0, 1) for f in (block.query, block.key, block.value))
        o = torch.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, -1) @ v
        if seen is not None:
            seen.extend(o.detach().numpy())
        x = x + block.out(o.transpose(0, 1).reshape(-1, SIZE))
    return x


def texts():
    x = fill([2, 7, SIZE], 3)
    return [x[i, :n] for i, n in enumerate(LENGTHS)]


def measure(energy, whole):
    model = blocks()
    information, correlation = [], []
    for x in texts():
        seen = []
        forward(model, x, seen)
        found = []
        for o in seen:
            squares = np.linalg.svd(o, compute_uv=False) ** 2
            found.append(next(t for t in range(1, len(squares) + 1) if squares[:t].sum() >= energy * squares.sum()))
        information.append(found)
        correlation.append(np.abs(np.corrcoef([o.flatten() if whole else o.mean(1) for o in seen])))
    return np.mean(information, 0), np.mean(correlation, 0)


def page_rank(information, correlation, damping, by_information):
    n = len(information)
    m = correlation / correlation.sum(1, keepdims=True)
    start = information / information.sum()
    p, moved = start, 1
    while moved >= 1e-6:
        following = damping * m.T @ p + (1 - damping) * (start if by_information else 1 / n)
        p, moved = following, np.abs(following - p).sum()
    return p


def show(name, values):
    print(f"{name}: " + ", ".join(f"{v:.10g}" for v in values))


def main():
    information, correlation = measure(0.9, False)
    show("INFORMATION", information)
    show("CORRELATION", correlation[1])
    p = page_rank(information, correlation, 0.85, False)
    show("IMPORTANCE", p)
    kept = [sorted(np.argsort(-p[HEADS * i : HEADS * (i + 1)], kind="stable")[:2]) for i in range(LAYERS)]
    for i in range(LAYERS):
        show(f"KEPT{i}", kept[i])
    show("OVERALL", sorted(np.argsort(-p, kind="stable")[:2]))
    other = measure(0.6, True)
    show("LOW", other[0])
    show("WHOLE", page_rank(*other, 0.5, True))

    model = blocks()
    trained = [(i, getattr(b, name)) for i, b in enumerate(model) for name in ("query", "key", "value")]
    optimizer = torch.optim.AdamW([p for _, f in trained for p in f.parameters()], lr=0.05, weight_decay=0)
    target = fill([2, 7, SIZE], 6)
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum((forward(model, x) - target[i, : len(x)]).square().sum() for i, x in enumerate(texts()))
        loss.backward()
        for i, f in trained:
            mask = torch.zeros(SIZE, dtype=torch.bool)
            for head in kept[i]:
                mask[head * WIDTH : (head + 1) * WIDTH] = True
            for p in f.parameters():
                p.grad[~mask] = 0
        optimizer.step()
    show("LOSS", [loss.item()])
    show("VALUE", model[1].value.weight[:, 0].tolist())
    show("KEYBIAS", model[0].query.bias.tolist())


if __name__ == "__main__":
    main()
