"""Prints the reference values of tests/io/test_loralib.cpp from Microsoft's loralib.

python3 loralib_values.py needs torch and loralib.
"""

import loralib
import torch
from lora_values import fill


def filled(layer, k):
    """Every tensor filled, the first with k, the next with k + 1, …; the base first."""
    with torch.no_grad():
        for index, name in enumerate(("weight", "bias", "lora_A", "lora_B")):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).copy_(fill(getattr(layer, name).shape, k + index).float())
    return layer


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = filled(loralib.Embedding(10, 8, r=3, lora_alpha=3), 1)
        self.q = filled(loralib.Linear(8, 6, r=2, lora_alpha=3), 11)
        self.qkv = filled(loralib.MergedLinear(8, 12, r=2, lora_alpha=3, enable_lora=[True, False, True]), 21)


net = Net()
print("keys", {name: list(t.shape) for name, t in loralib.lora_state_dict(net, bias="lora_only").items()})
x = fill([1, 8], 9).float()
for name, y in (("emb", net.emb(torch.tensor([1, 4]))), ("q", net.q(x)), ("qkv", net.qkv(x))):
    print(f"{name}: " + ", ".join(f"{v:.7g}" for v in y.detach().flatten().tolist()))
