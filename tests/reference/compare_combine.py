"""Compares `peft-finetune combine` with Python PEFT's add_weighted_adapter, live, on adapters Python wrote.

    python tests/reference/compare_combine.py [--program build/examples/peft-finetune] [--seed N] [--only TEXT]

--program is by default the environment's PEFT_FINETUNE, --seed random. The model has linear, embedding and
convolution layers, in the order of their names, which is the program's order of random draws. For each case:

  factors  the tensors of our file against those Python writes; of truncated types, whose signs are the LAPACK's, their
           products
  outputs  of our file, loaded in Python, against what its own combined adapter computes (where 0.21.2 scales it right)
           or what the weighted sum of the changes does (cat, exact)

Largest differences relative to the largest value. Exit status 0 only when those of factors are within 1e-6 and those of
outputs, computed in double precision, within 1e-5; 77 where Python's libraries are missing.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings

from compare_peft import difference  # first: leaves with 77 without Python's libraries

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

TOLERANCES = {"factors": 1e-6, "outputs": 1e-5}
SVD = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
PLAIN = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
EVERY = ["conv", "emb", "fc", "point", "value"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.value(self.fc(x).tanh())


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.emb = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(11))
        self.point = nn.Conv2d(8, 8, 1)

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.point(self.conv(x.unsqueeze(1)).tanh())


def cases():
    """(name, configs, weights, types, combine's further arguments)."""
    same = [LoraConfig(target_modules=EVERY, r=4, lora_alpha=8), LoraConfig(target_modules=EVERY, r=4, lora_alpha=3)]
    other = [LoraConfig(target_modules=EVERY, r=4, lora_alpha=8), LoraConfig(target_modules=EVERY, r=2, use_rslora=True)]
    patterns = dict(target_modules=EVERY, r=4, rank_pattern={"fc": 2, "layers.10.value": 6, "conv": 3})
    patterned = [LoraConfig(**patterns, alpha_pattern={"fc": 5}), LoraConfig(**patterns, lora_alpha=2, use_rslora=True)]
    apart = [LoraConfig(target_modules=["fc", "emb"], r=3), LoraConfig(target_modules=["value", "fc"], r=3, lora_alpha=1)]
    for kind in PLAIN + SVD + ["cat"]:
        yield kind, same, [0.7, -0.2], {}
        yield f"{kind}, patterns", patterned, [0.5, 0.9], {}
        yield f"{kind}, other layers", apart, [1.0, 0.5], {}
    for kind in SVD + ["cat"]:
        yield f"{kind}, other ranks, rsLoRA", other, [0.6, 0.4], {}
    yield "svd, rank 3", same, [0.7, -0.2], {"svd_rank": 3}
    for kind in ["ties", "dare_ties", "ties_svd"]:
        yield f"{kind}, by frequency, three", same + same[:1], [0.7, -0.2, 0.4], {"majority_sign_method": "frequency"}
    yield "linear, one", same[:1], [-0.4], {}
    yield "ties, one", same[:1], [0.4], {}
    yield "exact", other, [0.7, -0.2], {}
    ia3 = [IA3Config(target_modules=["fc", "value", "conv"], feedforward_modules=["value"])] * 2
    yield "linear, (IA)³", ia3, [0.7, 0.3], {}


def products(tensors):
    """B A of every layer."""
    found = {}
    for key, A in tensors.items():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if f".{a}" in key:
                found[key] = tensors[key.replace(a, b)].flatten(1).double() @ A.flatten(1).double()
    return found


class Comparison:
    def __init__(self, program, seed, folder):
        self.program, self.folder, self.seed = program, folder, seed
        torch.manual_seed(seed)
        self.base = Toy().eval()
        self.ids = torch.randint(12, (3, 6))

    def output(self, model):
        with torch.no_grad():
            return copy.deepcopy(model).double()(self.ids)

    def make(self, configs):
        """A model with adapters that do something, each written to a folder of its own."""
        model = get_peft_model(copy.deepcopy(self.base), copy.deepcopy(configs[0]), "n0")
        for i, config in enumerate(configs[1:], 1):
            model.add_adapter(f"n{i}", copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    def run(self, name, configs, weights, settings):
        kind = name.split(",")[0]
        model = self.make(configs)
        folder = os.path.join(self.folder, name.replace(" ", "_"))
        model.save_pretrained(folder)
        sources = [f"{folder}/n{i}:{weight}" for i, weight in enumerate(weights)]
        arguments = [self.program, "combine", "--type", kind, "--out", f"{folder}/ours", "--seed", str(self.seed)]
        for source in sources:
            arguments += ["--adapter", source]
        density = 0.4 if kind.startswith(("ties", "dare", "magnitude")) else None
        if density:
            arguments += ["--density", str(density)]
        if "svd_rank" in settings:
            arguments += ["--rank", str(settings["svd_rank"])]
        if "majority_sign_method" in settings:
            arguments += ["--sign", settings["majority_sign_method"]]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr}")
        ours = load_file(f"{folder}/ours/adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(copy.deepcopy(self.base), f"{folder}/ours").eval()
        names = [f"n{i}" for i in range(len(weights))]
        row = {"name": name}
        if kind in ("exact", "cat"):
            row["outputs"] = difference(self.output(loaded), self.exact(model, names, weights))
        if kind == "exact":
            return row
        torch.manual_seed(self.seed)
        if "(IA)" in name:
            model.add_weighted_adapter(names, weights, "new")
        else:
            model.add_weighted_adapter(names, weights, "new", kind, density=density, **settings)
        model.save_pretrained(f"{folder}/python", selected_adapters=["new"])
        theirs = load_file(f"{folder}/python/new/adapter_model.safetensors")
        theirs = {key: value for key, value in theirs.items() if not key.endswith("base_layer.weight")}
        if set(ours) != set(theirs):
            raise ValueError(f"other keys: {sorted(set(ours) ^ set(theirs))}")
        a, b = (products(ours), products(theirs)) if kind in SVD else (ours, theirs)
        shapes = [key for key in ours if ours[key].shape != theirs[key].shape]
        if shapes:
            raise ValueError(f"other shapes: {[(key, ours[key].shape, theirs[key].shape) for key in shapes]}")
        row["factors"] = max(difference(a[key], b[key]) for key in b)
        if "rsLoRA" not in name and "patterns" not in name and "outputs" not in row:
            model.set_adapter("new")
            row["outputs"] = difference(self.output(loaded), self.output(model))
        self.check_config(f"{folder}/ours/adapter_config.json", kind)
        return row

    def check_config(self, path, kind):
        with open(path) as file:
            config = json.load(file)
        if config["peft_type"] == "LORA" and (config["lora_alpha"] != config["r"] or config["use_rslora"]):
            raise ValueError(f"alpha {config['lora_alpha']}, r {config['r']}, use_rslora {config['use_rslora']}")

    def exact(self, model, names, weights):
        """The outputs with Σ w ΔW in the weights, in double precision."""
        base = copy.deepcopy(self.base).double()
        with torch.no_grad():
            for path, layer in copy.deepcopy(model).double().base_model.model.named_modules():
                if not hasattr(layer, "lora_A"):
                    continue
                for name, weight in zip(names, weights):
                    if name in layer.lora_A or name in layer.lora_embedding_A:
                        base.get_submodule(path).weight.add_(weight * layer.get_delta_weight(name))
        return self.output(base)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=os.environ.get("PEFT_FINETUNE"))
    parser.add_argument("--seed", type=int, default=random.randrange(10000))
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if not arguments.program:
        print("skipped: neither --program nor PEFT_FINETUNE names the program")
        return 77
    warnings.simplefilter("ignore")
    print(f"seed {arguments.seed}")
    failures, rows = [], 0
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(arguments.program, arguments.seed, folder)
        for case in cases():
            if arguments.only not in case[0]:
                continue
            rows += 1
            try:
                row = comparison.run(*case)
            except Exception as error:  # noqa: BLE001: a case that fails must not hide the others
                failures.append(f"{case[0]}: {error}")
                continue
            texts = [f"{row[column]:10.1e}" if column in row else " " * 10 for column in TOLERANCES]
            print(f"{row['name']:40} factors {texts[0]}  outputs {texts[1]}", flush=True)
            failures += [f"{row['name']}: {column} {row[column]:.3g}" for column, tolerance in TOLERANCES.items()
                         if not row.get(column, 0) <= tolerance]
    for failure in failures:
        print(f"DIFFERS {failure}")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
