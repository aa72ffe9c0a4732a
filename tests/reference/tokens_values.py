"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_trainable_tokens.cpp
and tests/methods/test_layer_norm_tuning.cpp.

python3 tokens_values.py needs torch and peft. Every list of numbers in the test cases named below must be one
of the lists computed here, and every list computed here must be there. With --print they are printed instead.
"""

import pathlib
import sys

import peft
import torch

from lora_values import One, compare, fill

TESTS = pathlib.Path(__file__).resolve().parent.parent / "methods"


def steps(model, x, target):
    """12 steps of AdamW; the last loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
    return loss.view(1)


def embedding(padding=None, max_norm=None, **settings):
    layer = torch.nn.Embedding(6, 3, padding_idx=padding, max_norm=max_norm).double()
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight.shape, 1))
    torch.manual_seed(0)
    config = peft.TrainableTokensConfig(token_indices=[4, 1], target_modules=["layer"], **settings)
    model = peft.get_peft_model(One(layer), config)
    return model, model.base_model.model.layer


def tokens():
    values = {}
    x = torch.tensor([[0, 4, 1], [4, 4, 5]])
    model, layer = embedding()
    rows = layer.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.copy_(fill(rows.shape, 3))
    y = model(x)
    (y * fill([2, 3, 3], 6)).sum().backward()
    values["output"] = y
    values["gradient"] = rows.grad
    layer.merge()
    values["merged weight"] = layer.base_layer.weight
    model, layer = embedding()
    values["last loss"] = steps(model, x, fill([2, 3, 3], 6))
    values["after 12 steps"] = layer.trainable_tokens_delta["default"]
    model, layer = embedding(padding=4)
    steps(model, x, fill([2, 3, 3], 6))
    values["after 12 steps, one of them padding"] = layer.trainable_tokens_delta["default"]
    model, layer = embedding(max_norm=0.5)
    rows = layer.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.copy_(fill(rows.shape, 3))
    values["rescaled to a norm"] = model(x)
    _, layer = embedding(init_weights=False)
    values["random start"] = layer.trainable_tokens_delta["default"]
    return values


def norms():
    values = {}
    model = None

    def make():
        layer = torch.nn.LayerNorm(4).double()
        with torch.no_grad():
            layer.weight.copy_(fill([4], 1))
            layer.bias.copy_(fill([4], 2))
        model = peft.get_peft_model(One(layer), peft.LNTuningConfig(target_modules=["layer"]))
        return model, model.base_model.model.layer

    model, layer = make()
    own = layer.ln_tuning_layers["default"]
    with torch.no_grad():
        own.weight.copy_(fill([4], 3))
        own.bias.copy_(fill([4], 4))
    x = fill([2, 4], 5).requires_grad_(True)
    y = model(x)
    (y * fill([2, 4], 6)).sum().backward()
    values["output"] = y
    values["gradient of the weight"] = own.weight.grad
    values["gradient of the bias"] = own.bias.grad
    values["gradient of x"] = x.grad
    layer.merge()
    assert torch.equal(layer.base_layer.weight, own.weight) and torch.equal(layer.base_layer.bias, own.bias)
    model, layer = make()
    values["last loss"] = steps(model, fill([2, 4], 5), fill([2, 4], 6))
    values["weight after 12 steps"] = layer.ln_tuning_layers["default"].weight
    values["bias after 12 steps"] = layer.ln_tuning_layers["default"].bias
    return values


def main(arguments):
    torch.set_num_threads(1)
    cases = {
        ("test_trainable_tokens.cpp", "Trainable tokens equal Hugging Face's numbers"): tokens(),
        ("test_layer_norm_tuning.cpp", "LayerNorm tuning equals Hugging Face's numbers"): norms(),
    }
    if arguments == ["--print"]:
        for values in cases.values():
            for name, tensor in values.items():
                print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))
        return 0
    print(f"peft {peft.__version__}, torch {torch.__version__}")
    failures = 0
    for (file, title), values in cases.items():
        failures += compare((TESTS / file).read_text(), title, values, 1e-9)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
