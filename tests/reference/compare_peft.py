"""Compares our PEFT directories with Python PEFT's, live: both ways, for every option of LoRA.

    python tests/reference/compare_peft.py [--tool build/tests/peft-tool] [--seed N] [--only TEXT]

--tool is by default the environment's PEFT_PEFT_TOOL, --seed random. Bases are a toy model with every kind of layer
(tests/io/toy_model.h) and a BERT classifier of random sizes. For each case:

  start    from one seed, PEFT's initial adapter and ours are equal bit for bit
  read     an adapter PEFT made and wrote gives the same outputs with us
  merged   and so do its merged weights
  again    written by us, it has PEFT's keys and values, and PEFT's config where nothing was lost
  back     and loads in Python with no missing and no unexpected key, with the same outputs
  ours     an adapter we made loads in Python likewise
  train    50 steps of SGD or AdamW from PEFT's adapter, in float64, give the same losses, within 1e-9

Outputs are compared relative to their largest value. Exit status 0 only when nothing differs; 77 where Python's
libraries are missing, before anything was compared.
"""

import argparse
import collections
import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import warnings

try:
    import peft
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from torch import nn
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-5
STEPS = 50
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.05), "adamw": (torch.optim.AdamW, 2e-3)}
COLUMNS = ["start", "read", "merged", "again", "back", "ours", "train"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return x + self.out(self.fc(x).tanh())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.v, self.ln = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.encoder = Encoder()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1)
        self.head = nn.Linear(10, 3)

    def forward(self, ids):
        x = self.emb(ids)
        x = self.mlp(self.encoder(self.ln(self.q(x).tanh() + self.v(x))))
        h = self.conv1(x.transpose(1, 2)).tanh()
        volume = self.conv3(self.conv(h.view(h.shape[0], 2, 3, h.shape[2])).tanh().unsqueeze(1))
        return self.head(torch.cat([x.mean(1), volume.flatten(2).mean(2)], 1))


# `ours`: the tool's options where they differ; `file` "none": PEFT cannot read what it wrote.
Case = collections.namedtuple("Case", "name base config file task ours", defaults=("safetensors", None, {}))
EVERY = ["emb", "q", "conv1", "conv", "conv3", "fc", "mlp.0"]


def cases():
    toy = [
        ("default", dict(target_modules=["q", "v"])),
        ("rank 3, alpha 5", dict(target_modules=["q", "v", "fc"], r=3, lora_alpha=5)),
        ("every layer kind", dict(target_modules=EVERY, r=4, lora_alpha=16)),
        ("rsLoRA", dict(target_modules=EVERY, r=4, lora_alpha=16, use_rslora=True)),
        ("dropout in eval", dict(target_modules=EVERY, r=2, lora_dropout=0.3)),
        ("lora_bias", dict(target_modules=["q", "conv1", "conv", "conv3", "out"], lora_bias=True)),
        ("gaussian", dict(target_modules=EVERY[1:], r=4, init_lora_weights="gaussian")),
        ("init false", dict(target_modules=EVERY, r=4, init_lora_weights=False)),
        ("rank pattern", dict(target_modules=EVERY, rank_pattern={"q": 2, r"blocks\.[01]\.fc": 5, "^emb": 3})),
        ("alpha pattern", dict(target_modules=EVERY, alpha_pattern={"conv.*": 3, "encoder.blocks.2.fc": 7.5})),
        ("both patterns, rsLoRA", dict(target_modules=EVERY, use_rslora=True, rank_pattern={"conv": 2, "fc": 3},
                                       alpha_pattern={"fc": 5})),
        ("bias all", dict(target_modules=["q", "conv"], bias="all")),
        ("bias all, head saved", dict(target_modules=["q", "conv"], bias="all", modules_to_save=["head"])),
        ("bias lora_only", dict(target_modules=["q", "v", "conv", "fc"], bias="lora_only")),
        ("modules_to_save", dict(target_modules=["q", "emb"], modules_to_save=["head", "ln"])),
        ("container saved", dict(target_modules=["q", "fc"], modules_to_save=["blocks.1", "mlp"])),
        ("exclude a module", dict(target_modules=["q", "fc"], exclude_modules=["blocks.1.fc"])),
        ("layers_to_transform", dict(target_modules=["fc", "out"], layers_to_transform=[0, 2])),
        ("layers_pattern", dict(target_modules=["fc"], layers_to_transform=[1], layers_pattern=["blocks"])),
        ("full paths", dict(target_modules=["encoder.blocks.0.fc", "encoder.blocks.2.out", "mlp.2"])),
        ("regular expression", dict(target_modules=r"encoder\.blocks\.\d+\.(fc|out)|q")),
        ("all-linear", dict(target_modules="all-linear")),
        ("all-linear, head saved", dict(target_modules="all-linear", modules_to_save=["head"])),
    ]
    bert = [
        ("query, value", dict(target_modules=["query", "value"], r=8, lora_alpha=16)),
        ("six linear layers", dict(target_modules=["query", "key", "value", "dense"], r=4, lora_alpha=8)),
        ("rsLoRA, dropout", dict(target_modules=["query"], use_rslora=True, lora_dropout=0.1, lora_alpha=32)),
        ("lora_bias", dict(target_modules=["query", "dense"], lora_bias=True)),
        ("gaussian", dict(target_modules=["query", "key"], init_lora_weights="gaussian")),
        ("patterns", dict(target_modules=["query", "value"], rank_pattern={"layer.0.attention.self.query": 6, "query": 2},
                          alpha_pattern={r"layer\.1\..*": 3})),
        ("bias all", dict(target_modules=["query"], bias="all")),
        ("bias lora_only", dict(target_modules=["query", "dense"], bias="lora_only")),
        ("exclude, layers", dict(target_modules=["query", "key"], layers_to_transform=[1], layers_pattern=["layer"],
                                 exclude_modules=["key"])),
        ("embeddings", dict(target_modules=["word_embeddings", "position_embeddings", "query"])),
        ("pooler saved", dict(target_modules=["dense"], modules_to_save=["pooler"])),
        ("regular expression", dict(target_modules=r"bert\.encoder\.layer\.\d+\.attention\.self\.(query|key)")),
        ("all-linear", dict(target_modules="all-linear")),
    ]
    for name, config in toy:
        yield Case(name, "toy", config, ours={"modules_to_save": ["blocks.1", "mlp.0", "mlp.2"]} if "container" in name else {})
    yield Case("patterns that overlap", "toy",
               dict(target_modules=["fc"], rank_pattern={"fc": 2, "blocks.0.fc": 6}), "none")
    yield Case("bf16 base", "toy_bf16", dict(target_modules=EVERY, r=4))
    yield Case("bf16 base, gaussian, saved", "toy_bf16",
               dict(target_modules=EVERY[1:], init_lora_weights="gaussian", modules_to_save=["head"]))
    for kind in ["bf16", "f16", "f64", "bin"]:
        yield Case(f"{kind} file", "toy", dict(target_modules=EVERY, r=4, modules_to_save=["head"], bias="lora_only"), kind)
    for name, config in bert:
        yield Case(name, "bert", config)
        yield Case(f"SEQ_CLS, {name}", "bert", config, "safetensors", "SEQ_CLS")


def random_bert(rng):
    heads = rng.choice([2, 3])
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=heads * rng.choice([4, 8]), num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=rng.randrange(10, 30), max_position_embeddings=20, num_labels=rng.randrange(2, 5),
        hidden_act=rng.choice(["gelu", "relu"]), initializer_range=0.2)
    return transformers.BertForSequenceClassification(config).eval()


def move(model, amount):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)


def ours_of(case):
    """The tool's options for a case."""
    options = {key: value for key, value in case.config.items() if key != "init_lora_weights" or value is not True}
    if case.task == "SEQ_CLS":
        options["modules_to_save"] = options.get("modules_to_save", []) + ["classifier"]
    if case.base == "bert" and options["target_modules"] == "all-linear":
        options["target_modules"] = ["query", "key", "value", "dense"] + ([] if case.task else ["classifier"])
    return {**options, **case.ours}


def difference(a, b):
    """Relative to b's largest value; infinity for other shapes and for NaN, which max() may drop."""
    if a.shape != b.shape or a.isnan().any() or b.isnan().any():
        return math.inf
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6))


class Comparison:
    def __init__(self, tool, seed, only):
        self.tool, self.rng, self.only = tool, random.Random(seed), only
        self.rows, self.failures = [], []
        self.scratch = tempfile.TemporaryDirectory()

    def path(self, *parts):
        return os.path.join(self.scratch.name, *parts)

    def make_bases(self):
        self.bases, self.inputs, self.labels = {}, {}, {}
        toy = Toy().eval()
        self.bases["toy"], self.bases["toy_bf16"] = toy, copy.deepcopy(toy).to(torch.bfloat16)
        self.bases["bert"] = random_bert(self.rng)
        ids = torch.randint(10, (4, 7))
        self.inputs["toy"] = self.inputs["toy_bf16"] = {"ids": ids}
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[1, 5:] = 0
        self.inputs["bert"] = {"input_ids": torch.randint(50, (4, 9)), "attention_mask": mask}
        for name, base in self.bases.items():
            os.makedirs(self.path(name))
            if name == "bert":
                base.save_pretrained(self.path(name))
            else:
                save_file(base.state_dict(), self.path(name, "toy.safetensors"))
            labels = torch.randint(base.config.num_labels if name == "bert" else 3, (4,))
            save_file({**self.inputs[name], "labels": labels}, self.path(name, "inputs.safetensors"))
            self.labels[name] = labels

    def forward(self, model, base):
        output = model(**self.inputs[base])
        return output.logits if base == "bert" else output

    def output(self, model, base):
        with torch.no_grad():
            return self.forward(model, base)

    def losses(self, folder, base, optimizer):
        """Of training a written adapter on, in evaluation mode, so without dropout."""
        model = PeftModel.from_pretrained(copy.deepcopy(self.bases[base]), folder, is_trainable=True).eval().double()
        make, lr = OPTIMIZERS[optimizer]
        optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
        losses = []
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(self.forward(model, base), self.labels[base])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.tensor(losses, dtype=torch.float64)

    def make_python(self, case, folder):
        """Makes, runs and writes PEFT's adapter; returns its start, its outputs and its config."""
        base = copy.deepcopy(self.bases[case.base])
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(task_type=case.task, **copy.deepcopy(case.config)))
        start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        move(model, 0.1)
        model.eval()
        if case.file in ("bf16", "f16", "f64"):
            dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}[case.file]
            # Rounded first, so that the outputs belong to the file's values.
            if case.file != "f64":
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.copy_(parameter.to(dtype))
            model.save_pretrained(folder)
            file = os.path.join(folder, "adapter_model.safetensors")
            save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
        else:
            model.save_pretrained(folder, safe_serialization=case.file != "bin")
        with open(os.path.join(folder, "adapter_config.json")) as file:
            config = json.load(file)
        adapted = self.output(model, case.base)
        state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        merged = self.output(model.merge_and_unload(), case.base)
        return dict(start=start, adapted=adapted, merged=merged, config=config, state=state)

    def load_in_python(self, folder, base):
        """The outputs of an adapter of ours in Python; raises where a key is missing or not expected."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(copy.deepcopy(self.bases[base]), folder).eval()
        result = set_peft_model_state_dict(model, load_peft_weights(folder))
        spoken = [str(w.message) for w in caught if "key" in str(w.message).lower() or "match" in str(w.message).lower()]
        if spoken:
            raise ValueError(f"Python warns: {spoken}")
        missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save.default" in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"missing {missing}, unexpected {result.unexpected_keys}")
        wanted, got = set(get_peft_model_state_dict(model)), set(load_file(f"{folder}/adapter_model.safetensors"))
        wanted = {key for key in wanted if ".modules_to_save." not in key and ".original_module." not in key}
        if wanted != got:
            raise ValueError(f"other keys: {sorted(wanted ^ got)}")
        return self.output(model, base)

    def check(self, row, column, error, limit=TOLERANCE):
        row[column] = error
        if not error <= limit:
            self.failures.append(f"{row['name']}: {column}: {error:.3g}")

    def fail(self, row, column, text):
        row[column] = float("nan")
        self.failures.append(f"{row['name']}: {column}: {text}")

    def compare_config(self, row, theirs, ours):
        plain = lambda value: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key in sorted(set(theirs) | set(ours)):
            a, b = theirs.get(key, "absent"), ours.get(key, "absent")
            if key == "auto_mapping" or plain(a) == plain(b):
                continue
            if key == "modules_to_save" and sorted(set(a)) == sorted(set(b)):
                continue
            if key == "exclude_modules" or key == "target_modules":
                continue  # the same modules in other words; that they are the same, `back` shows
            self.fail(row, "again", f"'{key}' is {b!r}, expected {a!r}")

    def run(self):
        self.make_bases()
        pending = [case for case in cases() if not self.only or self.only in f"{case.base}: {case.name}"]
        jobs, python = [], []
        for i, case in enumerate(pending):
            folder = self.path(f"case{i}")
            os.makedirs(folder)
            python.append(self.make_python(case, f"{folder}/python"))
            shared = {"base": self.path(case.base), "inputs": self.path(case.base, "inputs.safetensors")}
            jobs.append({**shared, "adapter": f"{folder}/python", "out": f"{folder}/read"})
            jobs.append({**shared, "options": ours_of(case), "seed": 0, "out": f"{folder}/ours"})
            optimizer = list(OPTIMIZERS)[i % 2]
            jobs.append({**shared, "adapter": f"{folder}/python", "optimizer": optimizer, "lr": OPTIMIZERS[optimizer][1],
                         "steps": STEPS, "double": True, "out": f"{folder}/train"})
        with open(self.path("jobs.json"), "w") as file:
            json.dump(jobs, file)
        done = subprocess.run([self.tool, self.path("jobs.json")], capture_output=True, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0 or len(answers) != len(jobs):
            raise RuntimeError(f"the tool ended with {done.returncode} after {len(answers)} jobs: {done.stderr[-2000:]}")
        for i, case in enumerate(pending):
            row = {"name": f"{case.base}: {case.name}"}
            self.rows.append(row)
            try:
                self.compare(row, case, python[i], answers[3 * i], answers[3 * i + 1], self.path(f"case{i}"))
                if case.base != "toy_bf16" and case.file != "none":
                    self.compare_training(row, case, jobs[3 * i + 2]["optimizer"], answers[3 * i + 2], self.path(f"case{i}"))
            except Exception as error:  # noqa: BLE001: a row that fails must not hide the others
                self.failures.append(f"{row['name']}: {type(error).__name__}: {error}")

    def compare(self, row, case, python, read, ours, folder):
        half_base = case.base == "toy_bf16"
        limit = 0.02 if half_base else TOLERANCE  # in bfloat16 the plain models differ as much
        plain = self.output(self.bases[case.base], case.base)
        if not difference(python["adapted"], plain) > (0.01 if half_base else 10 * limit):
            raise ValueError("the adapter does nothing")
        if case.file == "none":
            if "hint: other rank" not in read.get("error", ""):
                self.fail(row, "read", f"expected a refusal, but got {read}")
        elif "error" in read:
            self.fail(row, "read", read["error"])
        else:
            outputs = load_file(f"{folder}/read/outputs.safetensors")
            self.check(row, "read", difference(outputs["adapted"], python["adapted"]), limit)
            self.check(row, "merged", difference(outputs["merged"], python["merged"]), limit)
            if not outputs["unmerged"].equal(outputs["adapted"]):
                self.fail(row, "merged", "unmerge does not restore the outputs")
            if difference(outputs["disabled"], plain) > limit:
                self.fail(row, "read", "the disabled model is not the base")
            again = load_file(f"{folder}/read/adapter/adapter_model.safetensors")
            state = {key: value for key, value in python["state"].items()
                     if ".modules_to_save." not in key and ".original_module." not in key}
            if set(again) != set(state):
                raise ValueError(f"written again with other keys: {sorted(set(again) ^ set(state))}")
            self.check(row, "again", max(difference(again[key], value) for key, value in state.items()), 0.0)
            with open(f"{folder}/read/adapter/adapter_config.json") as file:
                self.compare_config(row, python["config"], json.load(file))
            back = self.load_in_python(f"{folder}/read/adapter", case.base)
            self.check(row, "back", difference(back, python["adapted"]))
        if "error" in ours:
            self.fail(row, "ours", ours["error"])
            return
        start = load_file(f"{folder}/ours/start/adapter_model.safetensors")
        theirs = {key: value for key, value in python["start"].items()
                  if ".modules_to_save." not in key and ".original_module." not in key}
        if set(start) != set(theirs):
            raise ValueError(f"other keys at the start: {sorted(set(start) ^ set(theirs))}")
        different = [key for key, value in theirs.items()
                     if not (start[key].dtype == value.dtype and start[key].equal(value))]
        if different:
            self.fail(row, "start", f"not bit for bit: {different}")
        else:
            row["start"] = 0.0
        outputs = load_file(f"{folder}/ours/outputs.safetensors")
        self.check(row, "ours", difference(self.load_in_python(f"{folder}/ours/adapter", case.base), outputs["adapted"]),
                   limit)

    def compare_training(self, row, case, optimizer, answer, folder):
        if "error" in answer:
            self.fail(row, "train", answer["error"])
            return
        theirs = self.losses(f"{folder}/python", case.base, optimizer)
        if theirs[0] == theirs[-1]:
            raise ValueError(f"the loss does not move: {theirs[0]}")
        ours = load_file(f"{folder}/train/outputs.safetensors")["losses"]
        self.check(row, "train", float((ours - theirs).abs().max()), 1e-9)

    def report(self):
        print(f"{'':44}" + "".join(f"{column:>10}" for column in COLUMNS))
        for row in self.rows:
            print(f"{row['name']:44}" + "".join(f"{row[c]:10.2g}" if c in row else f"{'-':>10}" for c in COLUMNS))
        for failure in self.failures:
            print(f"failed: {failure}")
        print(f"{len(self.failures)} failures in {len(self.rows)} cases" if self.failures
              else f"{len(self.rows)} cases agree")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_PEFT_TOOL"))
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if not arguments.tool:
        parser.error("--tool or PEFT_PEFT_TOOL must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}", flush=True)
    torch.manual_seed(arguments.seed)
    comparison = Comparison(arguments.tool, arguments.seed, arguments.only)
    comparison.run()
    comparison.report()
    return 1 if comparison.failures or not comparison.rows else 0


if __name__ == "__main__":
    sys.exit(main())
