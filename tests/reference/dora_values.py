"""Prints the reference values of tests/methods/test_dora.cpp from Hugging Face PEFT.

python3 dora_values.py needs torch and peft.
"""

import peft
import torch
from lora_values import One, fill


def adapter(model, name, k):
    """Fills one DoRA: A and B from k on, the magnitude times 1.1, 0.9, 1.2, 1.1, …"""
    layer = model.base_model.model.layer
    embedding = hasattr(layer, "lora_embedding_A") and name in layer.lora_embedding_A
    A = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
    B = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
    m = layer.lora_magnitude_vector[name].weight
    with torch.no_grad():
        A.copy_(fill(A.shape, k))
        B.copy_(fill(B.shape, k + 1))
        factors = torch.tensor([[1.1, 0.9, 1.2][i % 3] for i in range(m.numel())], dtype=torch.float64)
        m.mul_(factors.view(m.shape))
    return A, B, m


def adapted(layer, **settings):
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight.shape, 1))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(fill(layer.bias.shape, 2))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True, **settings)
    return peft.get_peft_model(One(layer), config, autocast_adapter_dtype=False)


def show(name, tensor):
    print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))


def one(name, layer, x, k_output):
    model = adapted(layer)
    A, B, m = adapter(model, "default", 3)
    show(f"{name} magnitude", m)
    y = model(x)
    show(f"{name} output", y)
    (y * fill(y.shape, k_output)).sum().backward()
    for what, tensor in (("magnitude", m), ("A", A), ("B", B)):
        show(f"{name} gradient of {what}", tensor.grad)
    if x.requires_grad:
        show(f"{name} gradient of x", x.grad)
    model.merge_adapter()
    show(f"{name} merged weight", model.base_model.model.layer.base_layer.weight)


def two():
    """A second DoRA on the first: forward and both merged."""
    model = adapted(torch.nn.Linear(4, 3))
    adapter(model, "default", 3)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], use_dora=True))
    model.double()
    model.base_model.set_adapter(["default", "second"])
    adapter(model, "second", 7)
    show("two, output", model(fill([2, 4], 5)))
    model.merge_adapter(["default", "second"])
    show("two, merged weight", model.base_model.model.layer.base_layer.weight)


def trained(steps, dropout):
    torch.manual_seed(4)
    model = adapted(torch.nn.Linear(4, 3), lora_dropout=dropout)
    A, B, m = adapter(model, "default", 3)
    optimizer = torch.optim.AdamW([A, B, m], lr=0.05, weight_decay=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = (model(fill([2, 4], 5)) - fill([2, 3], 6)).square().mean()
        loss.backward()
        optimizer.step()
    title = f"after {steps} steps at dropout {dropout}"
    show(f"{title}, last loss", loss)
    for what, tensor in (("A", A), ("B", B), ("magnitude", m)):
        show(f"{title}, {what}", tensor)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one("linear", torch.nn.Linear(4, 3), fill([2, 4], 5).requires_grad_(True), 6)
    one("embedding", torch.nn.Embedding(5, 3), torch.tensor([0, 2, 4]), 6)
    one("convolution", torch.nn.Conv1d(2, 3, 3, padding=1), fill([1, 2, 2], 5), 6)
    two()
    trained(12, 0.0)
    trained(12, 0.25)
