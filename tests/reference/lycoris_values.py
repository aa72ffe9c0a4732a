"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_loha.cpp and
test_lokr.cpp.

python3 lycoris_values.py needs torch and peft. Every list of numbers in the test cases named below must be one
of the lists computed here, and every list computed here must be there. With --print they are printed instead.
"""

import pathlib
import sys

import peft
import torch

from lora_values import One, compare, fill

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "methods"


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def adapted(make, config, dtype):
    """The model and its trainable tensors in the order of their names."""
    layer = make().to(dtype)
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight.shape, 1))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(fill(layer.bias.shape, 2))
    torch.manual_seed(0)
    model = peft.get_peft_model(One(layer), config()).to(dtype)
    return model, [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def layer_case(name, make, config, x):
    """One adapted layer: its start from seed 0; with filled tensors: output, gradients of the trained tensors
    and of the input; losses of 12 AdamW steps and the weight merged after them."""
    values = {f"{name}: start": flat(adapted(make, config, torch.float32)[1])}
    model, parameters = adapted(make, config, torch.float64)
    with torch.no_grad():
        for k, parameter in enumerate(parameters):
            parameter.copy_(fill(parameter.shape, 3 + k))
    tokens = not x.is_floating_point()
    if not tokens:
        x.requires_grad_(True)
    torch.manual_seed(1)
    y = model(x)
    (y * fill(y.shape, 6)).sum().backward()
    values[f"{name}: output"] = y
    values[f"{name}: gradients"] = flat([p.grad for p in parameters] + ([] if tokens else [x.grad]))
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(x.detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    values[f"{name}: losses"] = torch.stack(losses)
    layer = model.base_model.model.layer
    layer.merge()
    values[f"{name}: merged"] = layer.base_layer.weight
    return values


def number(value):
    """As C++ reads it, always with a point."""
    text = f"{value:.10g}"
    mantissa, _, exponent = text.partition("e")
    return (mantissa if "." in mantissa else mantissa + ".0") + ("e" + exponent if exponent else "")


def run(arguments, tests):
    """`tests`: (file, title of the case, values)."""
    torch.set_num_threads(1)
    if arguments == ["--print"]:
        for _, _, values in tests:
            for name, tensor in values.items():
                print(f"// {name}\n{{{', '.join(number(v) for v in tensor.detach().double().flatten().tolist())}}},")
        return 0
    print(f"peft {peft.__version__}, torch {torch.__version__}")
    return 1 if sum(compare((FOLDER / file).read_text(), title, values, 1e-8) for file, title, values in tests) else 0


def plain_cp(t1, w1a, w1b, t2, w2a, w2b, scale):
    """PEFT's effective form without its own backward, which gets two gradients wrong."""
    half = [torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, b, a in [(t1, w1b, w1a), (t2, w2b, w2a)]]
    return half[0] * half[1] * scale


def linear():
    return torch.nn.Linear(4, 3)


def conv2d():
    return torch.nn.Conv2d(4, 2, (2, 3), padding=1, groups=2)


def conv1d():
    return torch.nn.Conv1d(2, 4, 3, stride=2)


IMAGE, SERIES = [1, 4, 2, 3], [1, 2, 5]


def loha():
    from peft.tuners.loha import layer

    layer.make_weight_cp = plain_cp

    def config(**settings):
        return lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["layer"], **settings)

    values = layer_case("linear", linear, config(), fill([2, 4], 5))
    dropped = config(init_weights=False, rank_dropout=0.2)
    values |= layer_case("linear with dropout", linear, dropped, fill([2, 4], 5))
    values |= layer_case("convolution", conv2d, config(), fill(IMAGE, 5))
    values |= layer_case("effective convolution", conv2d, config(use_effective_conv2d=True), fill(IMAGE, 5))
    values |= layer_case("effective series", conv1d, config(use_effective_conv2d=True), fill(SERIES, 5))
    return values


def lokr():
    def config(r=1, **settings):
        return lambda: peft.LoKrConfig(r=r, alpha=3, target_modules=["layer"], **settings)

    def wide():
        return torch.nn.Linear(9, 6)

    values = layer_case("whole factors", wide, config(r=4), fill([2, 9], 5))
    values |= layer_case("split factors", wide, config(decompose_both=True), fill([2, 9], 5))
    lycoris = config(init_weights="lycoris", decompose_factor=2, rank_dropout=0.2, rank_dropout_scale=True)
    values |= layer_case("lycoris start", wide, lycoris, fill([2, 9], 5))
    values |= layer_case("convolution", conv2d, config(decompose_factor=1, init_weights=False), fill(IMAGE, 5))
    effective = config(decompose_factor=1, use_effective_conv2d=True)
    values |= layer_case("effective convolution", lambda: torch.nn.Conv2d(4, 3, 2), effective, fill(IMAGE, 5))
    values |= layer_case("whole series", conv1d, config(r=2, decompose_factor=2), fill(SERIES, 5))
    values |= layer_case("effective series", conv1d, effective, fill(SERIES, 5))
    return values


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[1:],
            [
                ("test_loha.cpp", "LoHa equals Hugging Face's numbers", loha()),
                ("test_lokr.cpp", "LoKr equals Hugging Face's numbers", lokr()),
            ],
        )
    )
