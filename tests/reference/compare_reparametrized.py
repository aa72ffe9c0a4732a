"""Compares adapters on models nobody may edit (model/reparametrized.h) with Python PEFT's on the same models, live.

    python tests/reference/compare_reparametrized.py [--tool build/tests/reparametrized-tool] [--seed N]

--tool is by default the environment's PEFT_REPARAMETRIZED_TOOL, --seed random. Bases are torch.nn.TransformerEncoder of
random sizes and a class with plain layers. For each case:

  read     an adapter of random values that Python wrote gives the same outputs with us
  merged   and so do its merged weights
  again    written by us, it has the same keys and values
  train    8 steps of SGD from it give the same losses (not with self_attn, see below)
  back     what those left, written by us, gives the same outputs in Python

PEFT 0.21.2 adds the product of out_proj's factors twice, with the gradient of once (huggingface/peft, pull request 3774):
files hold half of it, so that outputs agree; training cannot. Exit status 0 only when nothing differs by more than 1e-5
of the largest value; 77 where Python's libraries are missing.
"""

import argparse
import copy
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

try:
    import peft
    import torch
    from safetensors.torch import load_file, save_file
    from torch import nn
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

TOLERANCE, STEPS = 1e-5, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)
        self.conv, self.lstm = nn.Conv1d(6, 4, 3, padding=1), nn.LSTM(4, 5, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.gate = nn.Parameter(torch.zeros(5, 5))

    def forward(self, ids):
        x = self.norm(self.words(ids))
        x = x + self.fc2(self.fc1(x).tanh())
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.mlp(self.lstm(x)[0] @ self.gate)


def cases():
    lora = lambda **options: peft.LoraConfig(r=3, lora_alpha=5, **options)
    yield "linear1, linear2", "encoder", lora(target_modules=["linear1", "linear2"])
    yield "one layer's", "encoder", lora(target_modules=["layers.0.linear2"], use_rslora=True)
    yield "self_attn", "encoder", lora(target_modules=["self_attn"])
    yield "self_attn, linear1", "encoder", lora(target_modules=["self_attn", "linear1"])
    yield "norms saved", "encoder", lora(target_modules=["linear1"], modules_to_save=["norm1", "norm2"])
    yield "bias lora_only", "encoder", lora(target_modules=["linear1"], bias="lora_only")
    yield "DoRA", "encoder", lora(target_modules=["linear1", "linear2"], use_dora=True)
    yield "(IA)³", "encoder", peft.IA3Config(target_modules=["linear1", "linear2"], feedforward_modules=["linear2"])
    yield "LoHa", "encoder", peft.LoHaConfig(target_modules=["linear1", "linear2"], r=2)
    yield "linear layers", "net", lora(target_modules=["fc1", "fc2", "mlp.0", "mlp.2"])
    yield "every layer", "net", lora(target_modules=["words", "fc1", "conv", "mlp.2"])
    yield "recurrent", "net", lora(target_modules=["fc1"], target_parameters=["lstm.weight_ih_l0", "lstm.weight_hh_l0"])
    yield "LayerNorm tuning", "net", peft.LNTuningConfig(target_modules=["norm"])


def difference(ours, theirs):
    """Relative to theirs' largest value; infinity for other shapes and for NaN, which max() may drop."""
    if ours.shape != theirs.shape or ours.isnan().any() or theirs.isnan().any():
        return float("inf")
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)).item()


def make(folder, kind, config):
    """A base in the folder and an adapter of random values on it: one that is fresh, and Python's outputs."""
    if kind == "encoder":
        heads = random.choice([1, 2, 3])
        sizes = dict(width=heads * random.choice([4, 6]), heads=heads, hidden=random.randint(3, 12), layers=random.randint(1, 3))
        layer = nn.TransformerEncoderLayer(sizes["width"], heads, sizes["hidden"], dropout=0.0)
        base = nn.TransformerEncoder(layer, sizes["layers"], enable_nested_tensor=False)
        x = torch.randn(random.randint(1, 6), random.randint(1, 4), sizes["width"])
    else:
        sizes, base, x = {}, Net(), torch.randint(11, (3, 5))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_file(base.state_dict(), folder / "base.safetensors")
    plain = copy.deepcopy(base)
    model = peft.get_peft_model(base, copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder / "adapter")
    trains = "self_attn" not in (config.target_modules or [])
    target = torch.randn_like(model(x))
    save_file({"x": x, "target": target}, folder / "inputs.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(sizes, kind=kind, steps=STEPS if trains else 0)))
    expected = {"adapted": model(x).detach()}
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(STEPS if trains else 0):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return peft.get_peft_model(plain, copy.deepcopy(config)), x, expected, losses


def compare(folder, fresh, x, expected, losses):
    ours = load_file(folder / "outputs.safetensors")
    first, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    row = {"read": difference(ours["adapted"], expected["adapted"]),
           "merged": difference(ours["merged"], expected["adapted"]),
           "again": max(difference(again[key], first[key]) for key in first) if again.keys() == first.keys() else float("inf")}
    if losses:
        row["train"] = difference(ours["losses"], torch.tensor(losses))
    trained = load_file(folder / "trained" / "adapter_model.safetensors")
    unexpected = peft.set_peft_model_state_dict(fresh, trained).unexpected_keys
    whole = trained.keys() == first.keys() and not unexpected
    row["back"] = difference(fresh(x).detach(), ours["trained"]) if whole else float("inf")
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_REPARAMETRIZED_TOOL", "build/tests/reparametrized-tool"))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        made = []
        for number, (name, kind, config) in enumerate(cases()):
            folder = pathlib.Path(root) / str(number)
            folder.mkdir()
            made.append((name, folder, *make(folder, kind, config)))
        run = subprocess.run([arguments.tool, *(folder for _, folder, *_ in made)], capture_output=True, text=True)
        print(run.stdout, end="")
        if run.returncode:
            sys.exit(f"{arguments.tool}: {run.stderr}")
        wrong = 0
        for name, folder, *rest in made:
            row = compare(folder, *rest)
            wrong += any(not value <= TOLERANCE for value in row.values())
            print(f"{name:<30}" + "".join(f"  {column} {value:.1e}" for column, value in row.items()))
    print(f"{wrong} of {len(made)} differ" if wrong else f"all {len(made)} agree")
    sys.exit(wrong > 0)


main()
