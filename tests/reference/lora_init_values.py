"""Prints the reference values of tests/methods/test_lora_init.cpp from Hugging Face PEFT.

python3 lora_init_values.py needs torch and peft; LoftQ also bitsandbytes. Signs of singular vectors are free,
so only products are printed: the update and the whole effective weight, each applied to a probe.
"""

import sys

import peft
import torch
from lora_values import One, fill
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga


def f32(shape, k):
    return fill(shape, k).float()


def show(name, tensor):
    print(f"{name}: " + ", ".join(f"{v:.7g}" for v in tensor.detach().double().flatten().tolist()))


def update(layer, probe):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (probe @ A.T @ B.T)


def linear(spread=False):
    """`spread`: with smallest singular values that lie apart, for what starts from their vectors."""
    layer = torch.nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight.copy_(f32([6, 8], 1))
        if spread:
            layer.weight.diagonal().add_(torch.arange(1, 7) / 4)
        layer.bias.copy_(f32([6], 2))
    return One(layer)


def trained(name, model, layer):
    """The update before and the output after 12 steps."""
    show(f"{name}, update at the start", update(layer, f32([1, 8], 9)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        (model(f32([5, 8], 5)) - f32([5, 6], 6)).square().mean().backward()
        optimizer.step()
    show(f"{name}, output after 12 steps", model(f32([1, 8], 9)))


def simple(name, **settings):
    model = linear(spread=name == "mica")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights=name, **settings)
    model = peft.get_peft_model(model, config)
    trained(name, model, model.base_model.model.layer)


def embedding_mica():
    layer = torch.nn.Embedding(5, 3)
    with torch.no_grad():
        layer.weight.copy_(f32([5, 3], 1))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights="mica")
    layer = peft.get_peft_model(One(layer), config).base_model.model.layer
    B = layer.lora_embedding_B["default"]
    show("mica of an embedding, B Bᵀ", B @ B.T)


def corda():
    for method in ("ipm", "kpm"):
        model = linear(spread=method == "kpm")
        settings = peft.tuners.lora.config.CordaConfig(corda_method=method)
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights="corda", corda_config=settings
        )
        preprocess_corda(model, config, run_model=lambda: [model(f32([7, 8], k)) for k in (3, 40)])
        model = peft.get_peft_model(model, config)
        trained(f"corda {method}", model, model.base_model.model.layer)


def lora_ga():
    kinds = [(d, "stable") for d in ("ArB2r", "A2rBr", "ArBr")]
    kinds += [("ArB2r", s) for s in ("weight_svd", "gd_scale", "unit")]
    for direction, scale in kinds:
        model = linear()
        settings = peft.tuners.lora.config.LoraGAConfig(direction=direction, scale=scale)
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights="lora_ga", lora_ga_config=settings
        )

        def run():
            for k in (5, 30):
                (model(f32([5, 8], k)) - f32([5, 6], 6)).square().mean().backward()

        preprocess_loraga(model, config, run)
        model = peft.get_peft_model(model, config)
        trained(f"lora_ga {direction} {scale}", model, model.base_model.model.layer)


class Net(torch.nn.Module):
    """q and k share their input."""

    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(8, 6)
        self.k = torch.nn.Linear(8, 6)
        self.o = torch.nn.Linear(6, 5)
        with torch.no_grad():
            for index, layer in enumerate((self.q, self.k, self.o)):
                layer.weight.copy_(f32(layer.weight.shape, 1 + 20 * index))
                layer.bias.copy_(f32(layer.bias.shape, 2 + index))

    def forward(self, x):
        return self.o(torch.tanh(self.q(x) + self.k(x)))


def eva():
    batches = []
    for seed in range(5):
        torch.manual_seed(seed)
        batches.append(torch.randn([24, 8]) * torch.tensor([20, 17, 1, 1, 1, 1, 1, 1]))
    for rank, rho, whiten, adjust in ((3, 2.0, False, True), (1, 2.0, False, True), (3, 1.5, True, False)):
        settings = peft.EvaConfig(rho=rho, whiten=whiten, adjust_scaling_factors=adjust)
        config = peft.LoraConfig(
            r=rank, lora_alpha=6, target_modules=["q", "k", "o"], init_lora_weights="eva", eva_config=settings
        )
        model = peft.get_peft_model(Net(), config)
        count = [0]

        def run(model, x):
            count[0] += 1
            return model(x)

        peft.initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=run,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        title = f"eva rank {rank} rho {rho}{' whiten' if whiten else ''}"
        saved = model.peft_config["default"]
        print(f"{title}: {count[0]} forwards, ranks {dict(saved.rank_pattern)}, alphas {dict(saved.alpha_pattern)}")
        for name in ("q", "k", "o"):
            layer = model.base_model.model.get_submodule(name)
            if hasattr(layer, "lora_A"):
                A = layer.lora_A["default"].weight
                show(f"{title}, {name}, the {A.shape[0]} rows of A times a probe", A @ f32([A.shape[1]], 9))


def loftq():
    import peft.utils.loftq_utils as utils

    # The function runs on a GPU only; the kernels run anywhere.
    to = torch.Tensor.to
    here = lambda x: "cpu" if str(x).startswith("cuda") else x
    torch.Tensor.to = lambda self, *a, **k: to(self, *map(here, a), **{n: here(x) for n, x in k.items()})
    utils.clear_device_cache = lambda: None
    W = f32([16, 24], 1)
    for bits, rounds in ((4, 1), (4, 3), (8, 1), (8, 2)):
        Q, A, B = utils.loftq_init(W, bits, 4, rounds)
        show(f"loftq {bits} bits, {rounds} rounds, Q probe", Q @ f32([24], 9))
        show(f"loftq {bits} bits, {rounds} rounds, BA probe", B @ A @ f32([24], 9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["loftq"]:
        loftq()
        sys.exit()
    for name in ("pissa", "pissa_niter_1", "olora", "orthogonal", "mica"):
        simple(name)
    embedding_mica()
    corda()
    lora_ga()
    eva()
