"""Compares bottleneck and invertible adapters with AdapterHub's library, live.

    python tests/reference/compare_adapters.py [--tool build/tests/bottleneck-tool] [--random 12] [--seed N] [--only NAME]

Needs a Python with `adapters` 1.3.0, which wants older transformers than the other comparisons: this one, or the one that
PEFT_ADAPTERS_PYTHON names (`python -m venv hub && hub/bin/pip install adapters==1.3.0`). On random small BERTs and GPT-2s, for
every named configuration and for random combinations of options: the adapter drawn from the same seed must have the same
tensors, bit for bit; logits before and after 12 steps of AdamW in float64 (AdamW makes steps of the rounding of a gradient near
0), the losses and the trained tensors must agree within 1e-8 of the largest value; the number of weights must be the same; and
with the adapter off the logits those of the plain model. Exit status 0 only when nothing differs; 77 where the libraries are missing.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import types

import adapters_python  # noqa: F401 (first: it may continue in another Python)
import adapters
import torch
import transformers
from adapters.methods import modeling
from safetensors.torch import load_file, save_file

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

STEPS, RATE, TOLERANCE = 12, 1e-3, 1e-8
NAMED = ["double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn", "adapter_plus", "compacter", "compacter++", "double_seq_bn_inv",
         "seq_bn_inv"]
ACTIVATIONS = [name for name in transformers.activations.ACT2FN if name not in ("prelu", "xielu")] + ["leakyrelu"]


def without_torchvision():
    """AdapterHub asks torchvision for one function: rows of a batch dropped, those kept divided by their share."""

    class StochasticDepth(torch.nn.Module):
        def __init__(self, p, mode):
            super().__init__()
            assert mode == "row"
            self.p = p

        def forward(self, x):
            if not self.training:
                return x
            rows = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype).bernoulli_(1 - self.p)
            return x * rows.div_(1 - self.p)

    for name in ("torchvision", "torchvision.ops", "torchvision.ops.stochastic_depth"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.ops.stochastic_depth"].StochasticDepth = StochasticDepth
    modeling.is_torchvision_available = lambda: True


def named_configs(width):
    for name in NAMED:
        changes = {}
        if name.startswith("compacter"):
            changes["reduction_factor"] = width // 8
        elif name == "adapter_plus":
            changes["reduction_factor"] = width // 3
        plus = name == "adapter_plus"  # has no name in the library
        yield name, adapters.AdapterPlusConfig(**changes) if plus else adapters.AdapterConfig.load(name, **changes)


def random_config(rng, width, layers, kind):
    mh, out = rng.choice([(True, True), (True, False), (False, True)])
    phm = rng.random() < 0.3
    before = rng.random() < 0.5
    parallel = rng.random() < 0.3
    residuals = [True, False] + (["post_add"] if kind == "bert" and before and not parallel else [])
    settings = dict(
        mh_adapter=mh, output_adapter=out, non_linearity=rng.choice(ACTIVATIONS), original_ln_before=before,
        reduction_factor=rng.choice([1.5, 2, 4, 0.5, width + 1, {"0": 2, "default": 4}, {str(layers - 1): 3.3, "default": 2}]),
        original_ln_after=rng.random() < 0.7, ln_before=rng.random() < 0.4, ln_after=rng.random() < 0.4,
        init_weights=rng.choice(["bert", "mam_adapter", "houlsby"]), init_weights_seed=rng.choice([None, 0, 7]),
        is_parallel=parallel, scaling=rng.choice([1.0, 0.5, 4.0, "learned", "channel"]), use_gating=rng.random() < 0.4,
        residual_before_ln=rng.choice(residuals), adapter_residual_before_ln=rng.random() < 0.5,
        leave_out=rng.choice([[], [], [0], [layers - 1]]), dropout=rng.choice([0.0, 0.1]),
        stochastic_depth=rng.choice([0.0, 0.0, 0.3]), inv_adapter=rng.choice([None, None, "nice"]),
        inv_adapter_reduction_factor=rng.choice([2, 3, 1.5]))
    if phm:
        shared_weights = rng.random() < 0.3
        settings.update(
            phm_layer=True, init_weights="bert", phm_dim=rng.choice([1, 2, 4]), reduction_factor=rng.choice([2, 4]),
            shared_W_phm=shared_weights, factorized_phm_W=shared_weights or rng.random() < 0.6, phm_rank=rng.choice([1, 2]),
            shared_phm_rule=rng.random() < 0.6, factorized_phm_rule=rng.random() < 0.4, learn_phm=rng.random() < 0.8,
            phm_c_init=rng.choice(["normal", "uniform"]), phm_bias=rng.random() < 0.7,
            hypercomplex_nonlinearity=rng.choice(["phm", "glorot-normal", "glorot-uniform", "normal"]))
    return adapters.BnConfig(**settings)


def make_folder(rng, kind, folder):
    heads, layers = rng.choice([2, 4]), rng.choice([2, 3])
    width = 12 * heads if heads == 4 else 32
    torch.manual_seed(rng.randrange(10**6))
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
            hidden_act=rng.choice(["gelu", "gelu_new", "relu"]), max_position_embeddings=40, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=60, n_embd=width, n_layer=layers, n_head=heads, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.1, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return width, layers


def open_model(kind, folder):
    if kind == "bert":
        model = transformers.BertForSequenceClassification.from_pretrained(folder)
        adapters.init(model)
        return model
    return adapters.GPT2AdapterModel.from_pretrained(folder)  # its head undoes invertible adapters; GPT2LMHeadModel's does not


def make_batches(rng, kind, folder):
    batches = []
    for _ in range(4):
        rows, time = rng.randrange(2, 5), rng.randrange(4, 9)
        ids = torch.randint(3, 60, (rows, time))
        mask = torch.ones(rows, time, dtype=torch.long)
        labels = ids % 3 if kind == "bert" else ids.clone()
        if kind == "bert":
            labels = labels[:, 0]
            for row in range(rows - 1):
                mask[row, rng.randrange(2, time + 1):] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    save_file({f"b{i}.{key}": value.contiguous() for i, batch in enumerate(batches) for key, value in batch.items()},
              f"{folder}/inputs.safetensors")
    return batches


def our_name(name, first_site):
    """Ours for a tensor of AdapterHub's, or None for one listed twice."""
    name = name.replace(".adapters.case.", ".")
    for theirs, ours in [(".attention.output.", ".attention.output.LayerNorm.bottleneck."), (".attention_adapters.",
                         ".attn_residual.bottleneck."), (".output_adapters.", ".mlp_residual.bottleneck.")]:
        if theirs in name:
            name = name.replace(theirs, ours)
            break
    else:
        if ".layer." in name:
            name = name.replace(".output.", ".output.LayerNorm.bottleneck.")
    name = name.replace("bert.invertible_adapters.case.", "bert.embeddings.output.invertible.")
    name = name.replace("transformer.invertible_adapters.case.", "transformer.output.invertible.")
    for model in ("bert", "transformer"):
        name = name.replace(f"{model}.shared_parameters.case.", f"{first_site}.shared.bottleneck.")
    return name.replace(".adapter_down.0.", ".adapter_down.").replace(".adapter_down.1.", ".adapter_down.")


def tensors_of(model, config):
    found = {name: value for name, value in model.state_dict().items() if ".case." in name}
    if config.ln_before:  # the norm is listed twice
        found = {name: value for name, value in found.items() if ".adapter_down.0." not in name}
    return found


def reference(kind, folder, batches, setup, config):
    model = open_model(kind, folder)
    torch.manual_seed(setup["seed"])
    model.add_adapter("case", config=config)
    model.train_adapter("case")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".case." in name and (config.learn_phm or "phm_rule" not in name))
    model.double()
    out = {"start": {name: value.clone() for name, value in tensors_of(model, config).items()}}
    out["count"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    with torch.no_grad():
        out["first"] = model(**batches[0]).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setup["lr"], weight_decay=0.01)
    torch.manual_seed(setup["train_seed"])
    model.train()
    losses = []
    for step in range(setup["steps"]):
        loss = model(**batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out["losses"], out["end"] = torch.tensor(losses, dtype=torch.double), tensors_of(model, config)
    model.eval()
    with torch.no_grad():
        out["last"] = model(**batches[0]).logits
    return out


def relative(ours, theirs):
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)) if theirs.numel() else 0.0


def compare(label, prefix, ours, expected):
    """The largest errors of one case, and what is wrong."""
    wrong, errors = [], {}
    first_site = next((key.split(".start.")[1].split(".shared.")[0] for key in ours
                       if key.startswith(prefix) and ".start." in key and ".shared." in key), "")
    for when in ("start", "end"):
        theirs = {our_name(name, first_site): value for name, value in expected[when].items()}
        mine = {key.removeprefix(f"{prefix}{when}."): value for key, value in ours.items() if key.startswith(f"{prefix}{when}.")}
        if set(theirs) != set(mine):
            wrong.append(f"other tensors: {sorted(set(theirs) ^ set(mine))[:4]}")
            continue
        worst, name = max((relative(mine[name], value), name) for name, value in theirs.items())
        errors[when] = worst
        if worst > (0 if when == "start" else TOLERANCE):
            wrong.append(f"{when} of {name}: {worst:.3g}")
    for what in ("first", "last", "losses"):
        errors[what] = relative(ours[prefix + what], expected[what])
        if errors[what] > TOLERANCE:
            wrong.append(f"{what}: {errors[what]:.3g}")
    if not torch.equal(ours[prefix + "plain"], ours[prefix + "off"]):
        wrong.append("the model is another one when the adapter is off")
    print(f"{'FAILED' if wrong else 'ok':7}{label:32}{expected['count']:8}  " +
          "  ".join(f"{key} {value:.1e}" for key, value in errors.items()) + "".join("\n         " + line for line in wrong), flush=True)
    return not wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_BOTTLENECK_TOOL"))
    parser.add_argument("--random", type=int, default=12, help="random combinations on each model")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", default="", help="cases whose name has this text")
    arguments = parser.parse_args()
    if not arguments.tool:
        sys.exit("compare_adapters.py: --tool or PEFT_BOTTLENECK_TOOL must name the program")
    without_torchvision()
    print(f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, seed {arguments.seed}")
    good = True
    for kind in ("bert", "gpt2"):
        rng = random.Random(arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            width, layers = make_folder(rng, kind, folder)
            batches = make_batches(rng, kind, folder)
            cases = list(named_configs(width))
            cases += [(f"random {i}", random_config(rng, width, layers, kind)) for i in range(arguments.random)]
            cases = [(name, config) for name, config in cases if arguments.only in f"{kind} {name}"]
            setups = [dict(config=config.to_dict(), seed=rng.randrange(10**6), train_seed=rng.randrange(10**6), steps=STEPS, lr=RATE)
                      for _, config in cases]
            job = dict(kind=kind, model=folder, inputs=f"{folder}/inputs.safetensors", outputs=f"{folder}/out.safetensors", cases=setups)
            with open(f"{folder}/job.json", "w", encoding="utf-8") as file:
                json.dump(job, file)
            subprocess.run([arguments.tool, f"{folder}/job.json"], check=True)
            ours = load_file(job["outputs"])
            for i, ((name, config), setup) in enumerate(zip(cases, setups)):
                passed = compare(f"{kind} {name}", f"c{i}.", ours, reference(kind, folder, batches, setup, config))
                if not passed:
                    print("         " + json.dumps(setup["config"]))
                good = good and passed
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
