"""Prints the reference values of tests/model/test_reparametrized.cpp: LoRA on torch.nn.MultiheadAttention.

python3 attention_values.py needs torch and peft. PEFT 0.21.2 adds the product of out_proj's factors twice, with the
gradient of once (huggingface/peft, pull request 3774): here the second time is taken out, but for "as loaded".
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
    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.MultiheadAttention(4, 2)

    def forward(self, query, source, **masks):
        return self.self_attn(query, source, source, **masks)


def filled(once=True):
    model = Net().double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(fill(parameter.shape, i + 1))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["self_attn"], lora_dropout=0.5)
    model = peft.get_peft_model(model, config).double()
    layer = model.base_model.model.self_attn
    out = layer.base_layer.out_proj
    if once:
        out.merge = out.unmerge = lambda *_, **__: None  # MultiheadAttention.merge has added the product already
    factors = [part[name]["default"].weight for part, name in
               ((layer.__dict__["_modules"], "lora_A"), (layer.__dict__["_modules"], "lora_B"),
                (out.__dict__["_modules"], "lora_A"), (out.__dict__["_modules"], "lora_B"))]
    for i, factor in enumerate(factors):
        factor.data.copy_(fill(factor.shape, i + 5))
    return model, layer, factors


query, source = fill([3, 2, 4], 9), fill([5, 2, 4], 10)
padding = torch.zeros(2, 5, dtype=torch.bool)
padding[1, 3:] = True
masks = {"key_padding_mask": padding, "attn_mask": fill([3, 5], 11)}

model, layer, factors = filled()
model.train()
output, weights = model(query, source, **masks)
show("output", output)
show("weights", weights)
(output * fill([3, 2, 4], 12)).sum().backward()
for name, factor in zip(("in A", "in B", "out A", "out B"), factors):
    show(f"gradient of {name}", factor.grad)
layer.merge()
show("merged in_proj_weight, rows 0 and 11", layer.base_layer.in_proj_weight[[0, 11]])
show("merged out_proj.weight", layer.base_layer.out_proj.base_layer.weight)

show("output as loaded", filled(once=False)[0].eval()(query, source, **masks)[0])

model, layer, factors = filled()
optimizer = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.01)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    loss = model(query, source, **masks)[0].square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
show("losses", torch.tensor(losses, dtype=torch.float64))
show("in A after 12 steps", factors[0])
show("out B after 12 steps", factors[3])

net = Net()
torch.manual_seed(5)
layer = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["self_attn"])).base_model.model.self_attn
show("in A of seed 5", layer.lora_A["default"].weight)
show("out A of seed 5", layer.base_layer.out_proj.lora_A["default"].weight)
show("next of seed 5", torch.rand(1))
