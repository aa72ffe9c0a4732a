"""Compares our AdapterHub directories with those of Python's adapters, live, both ways.

    python tests/reference/compare_adapterhub.py [--tool build/tests/adapterhub-tool] [--count 40] [--seed N]

Needs a Python with `adapters` 1.3.0: this one, or the one that PEFT_ADAPTERS_PYTHON names. --tool is by default the
environment's PEFT_ADAPTERHUB_TOOL, --seed random. Every configuration (the named ones, with small sizes, and --count
random ones) is put on a tiny model of each family with random weights and saved by Python, as a pickle or as
safetensors; so are fusions of two. Our program loads it under another name, runs a padded batch and writes it again;
Python loads that into a fresh model. Outputs must agree within 3e-6 of the largest value, Python must miss no key and
find none unexpected, and the config must say what it said.

Exit status 0 only when nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import copy
import functools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile

import adapters_python  # noqa: F401 (first: it may continue in another Python)
import adapters
import torch
import transformers
from adapters.composition import Fuse
from adapters import (AdapterPlusConfig, BnConfig, CompacterConfig, CompacterPlusPlusConfig, ConfigUnion,
                      DoubleSeqBnConfig, DoubleSeqBnInvConfig, IA3Config, LoRAConfig, MAMConfig, ParBnConfig,
                      PrefixTuningConfig, PromptTuningConfig, SeqBnConfig, SeqBnInvConfig, UniPELTConfig)
from safetensors.torch import load_file, save_file

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
TOLERANCE = 3e-6
WIDTH, LAYERS, TIME = 16, 3, 7
BERT = ["BertForSequenceClassification", "BertModel", "BertForTokenClassification"]
ROBERTA = ["RobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForTokenClassification",
           "RobertaForQuestionAnswering"]
DEBERTA = ["DebertaV2ForSequenceClassification", "DebertaV2Model", "DebertaV2ForTokenClassification"]
GPT2 = ["GPT2LMHeadModel", "GPT2Model"]
ACTIVATIONS = ["relu", "gelu", "gelu_new", "swish", "silu", "tanh", "leakyrelu", "sigmoid", "mish"]


def named_configs():
    prefix = PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
    return {
        "houlsby": DoubleSeqBnConfig(reduction_factor=4),
        "pfeiffer": SeqBnConfig(reduction_factor=4),
        "parallel": ParBnConfig(reduction_factor=4),
        "scaled parallel": ParBnConfig(reduction_factor=4, scaling="learned"),
        "adapter plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
        "factor map": DoubleSeqBnConfig(reduction_factor={"0": 2, "2": 5.5, "default": 8}),
        "left out": SeqBnConfig(reduction_factor=4, leave_out=[0, 2]),
        "norms": SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True),
        "norms inside": DoubleSeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True,
                                          adapter_residual_before_ln=True),
        "gate": SeqBnConfig(reduction_factor=4, use_gating=True, scaling="channel"),
        "compacter": CompacterConfig(reduction_factor=4, phm_dim=2),
        "compacter++": CompacterPlusPlusConfig(reduction_factor=2, phm_dim=4, phm_rank=2),
        "own rules": CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, shared_phm_rule=False,
                                             factorized_phm_rule=True, learn_phm=False),
        "whole weights": CompacterConfig(reduction_factor=4, phm_dim=2, factorized_phm_rule=True,
                                         factorized_phm_W=False, phm_bias=True),
        "shared weights": CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, shared_W_phm=True),
        "houlsby inv": DoubleSeqBnInvConfig(reduction_factor=4),
        "pfeiffer inv": SeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=4),
        "prefix": prefix,
        "prefix flat": PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[1]),
        "prefix gates": PrefixTuningConfig(prefix_length=2, bottleneck_size=5, use_gating=True, shared_gating=False),
        "prompt": PromptTuningConfig(prompt_length=3),
        "prompt after bos": PromptTuningConfig(prompt_length=2, combine="prefix_after_bos"),
        "lora": LoRAConfig(r=2, alpha=3),
        "lora everywhere": LoRAConfig(r=3, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True,
                                      output_lora=True, dropout=0.1),
        "lora keys": LoRAConfig(r=2, alpha=2, attn_matrices=["k"], leave_out=[1]),
        "lora feed-forward": LoRAConfig(r=2, selfattn_lora=False, output_lora=True),
        "ia3": IA3Config(),
        "ia3 outputs": IA3Config(attn_matrices=["q", "v"], output_lora=True, leave_out=[0]),
        "mam": MAMConfig(prefix, ParBnConfig(reduction_factor=4)),
        "two bottlenecks": ConfigUnion(
            DoubleSeqBnConfig(reduction_factor=4, output_adapter=False),
            SeqBnConfig(reduction_factor=2, non_linearity="tanh")),
        "lora and bottleneck": ConfigUnion(LoRAConfig(r=2, alpha=4), SeqBnConfig(reduction_factor=8)),
        "unipelt": UniPELTConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
                                 SeqBnConfig(reduction_factor=4), LoRAConfig(r=2, alpha=2)),
    }


def fused_configs():
    """Pairs of configurations, and that of their fusion."""
    houlsby, pfeiffer = DoubleSeqBnConfig(reduction_factor=4), SeqBnConfig(reduction_factor=2)
    return {
        "fusion": (pfeiffer, SeqBnConfig(reduction_factor=4, use_gating=True), "dynamic"),
        "static fusion": (houlsby, DoubleSeqBnConfig(reduction_factor=2, non_linearity="tanh"), "static"),
        "parallel fusion": (ParBnConfig(reduction_factor=4), pfeiffer, {
            "key": False, "query": True, "value": True, "query_before_ln": True, "regularization": False,
            "residual_before": True, "temperature": False, "value_before_softmax": False,
            "value_initialized": False, "dropout_prob": 0.2}),
    }


def random_config(rng):
    leave_out = rng.sample(range(LAYERS), rng.choice([0, 0, 1, 2]))
    flag = lambda: rng.random() < 0.5
    if rng.random() < 0.6:
        before = flag()
        places = rng.choice([(True, False), (False, True), (True, True)])
        config = BnConfig(
            mh_adapter=places[0], output_adapter=places[1],
            reduction_factor=rng.choice([0.5, 1, 2, 3.3, 16, 40, {"1": 2, "default": 4}]),
            non_linearity=rng.choice(ACTIVATIONS), original_ln_before=before, original_ln_after=flag() or not before,
            ln_before=flag(), ln_after=flag(), is_parallel=rng.random() < 0.3,
            scaling=rng.choice([1.0, 0.3, 4.0, "learned", "channel"]), use_gating=rng.random() < 0.3,
            residual_before_ln=rng.choice([True, False, "post_add"]) if before else flag(),
            adapter_residual_before_ln=flag(), leave_out=leave_out,
            init_weights=rng.choice(["bert", "mam_adapter", "houlsby"]), dropout=rng.choice([0.0, 0.1]))
        return config
    if rng.random() < 0.5:
        return PrefixTuningConfig(prefix_length=rng.randrange(1, 5), bottleneck_size=rng.randrange(1, 9), flat=flag(),
                                  non_linearity=rng.choice(ACTIVATIONS), use_gating=flag(), shared_gating=flag(),
                                  leave_out=leave_out)
    return LoRAConfig(r=rng.randrange(1, 5), alpha=rng.randrange(1, 9), leave_out=leave_out, intermediate_lora=flag(),
                      output_lora=flag(), attn_matrices=sorted(rng.sample("qkv", rng.randrange(1, 4))))


def fits(name, config, model):
    """What Python itself cannot do is not compared."""
    if isinstance(config, tuple):
        return None
    if model == "GPT2LMHeadModel" and getattr(config, "inv_adapter", None):
        return "Python's GPT2LMHeadModel does not undo invertible adapters before its output layer"
    if model in GPT2:
        if isinstance(config, PromptTuningConfig):
            return "Python's GPT-2 takes no prompts"
        parts = config.configs if isinstance(config, ConfigUnion) else [config]
        if name == "unipelt":
            return "of a gate for each of the stacked matrices"
        if any(getattr(part, "residual_before_ln", None) == "post_add" for part in parts):
            return "Python's residual \"post_add\" needs a norm at the join"
    if model in ("BertModel", "GPT2Model") and name in ("compacter", "compacter++", "whole weights", "shared weights"):
        return "Python does not save what a model without a head shares"
    return None


def tiny_config(kind):
    sizes = dict(vocab_size=30, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                 intermediate_size=20, max_position_embeddings=24, num_labels=3, hidden_act="gelu")
    if kind in GPT2:
        return transformers.GPT2Config(vocab_size=30, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=24,
                                       bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if kind in BERT:
        return transformers.BertConfig(**sizes)
    if kind in ROBERTA:
        sizes["num_labels"] = 2 if kind.endswith("QuestionAnswering") else 3
        return (transformers.XLMRobertaConfig if kind.startswith("XLM") else transformers.RobertaConfig)(**sizes)
    deberta = dict(relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm", pos_att_type="p2c|c2p",
                   type_vocab_size=0, position_biased_input=False, share_att_key=True)  # as version 3
    if kind == "DebertaV2Model":
        deberta.update(share_att_key=False, conv_kernel_size=3, conv_act="gelu", position_biased_input=True)
    return transformers.DebertaV2Config(**sizes, **deberta)


def make_base(kind, folder):
    model = getattr(transformers, kind)(tiny_config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@functools.cache
def plain_model(kind, folder):
    return getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()


def open_model(kind, folder, flexible=False):
    if flexible:  # the library's own class, with a head like that of transformers' class
        model = adapters.AutoAdapterModel.from_pretrained(folder, attn_implementation="eager").eval()
        model.add_classification_head("their", num_labels=3, activation_function="gelu" if kind in DEBERTA else "tanh")
        return model
    model = copy.deepcopy(plain_model(kind, folder))
    adapters.init(model)
    return model


def run(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state


def distance(ours, theirs, mask=None):
    if ours.shape != theirs.shape:
        return float("inf")
    if mask is not None and ours.dim() == 3:  # virtual tokens come before
        keep = mask.bool()
        extra = ours.shape[1] - mask.shape[1]
        keep = torch.cat([torch.ones(len(mask), extra, dtype=torch.bool), keep], 1)
        ours, theirs = ours[keep], theirs[keep]
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item()


def prepare(number, label, config, kind, rng, root):
    folder = os.path.join(root, str(number))
    base = os.path.join(root, kind)
    if not os.path.isdir(base):
        make_base(kind, base)
    model = open_model(kind, base, flexible=label == "flexible head")
    fused = isinstance(config, tuple)
    names = ["their", "other"] if fused else ["their"]
    for name, one in zip(names, config if fused else [config]):
        model.add_adapter(name, config=one)
    setup = Fuse(*names) if fused else "their"
    if fused:
        model.add_adapter_fusion(setup, config=config[2])
    model.set_active_adapters(setup)
    parts = [f".{name}." for name in names] + ["adapter_fusion_layer"]
    head = hasattr(model, model.base_model_prefix) and not fused  # two adapters that are fused cannot each have one
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in parts) or (head and not key.startswith(model.base_model_prefix)):
                parameter += 0.2 * torch.randn_like(parameter)
    inputs = {"input_ids": torch.randint(3, 30, (3, TIME)), "attention_mask": torch.ones(3, TIME, dtype=torch.long)}
    if not (kind in DEBERTA and isinstance(config, PromptTuningConfig)):  # Python's virtual tokens look at padding
        inputs["attention_mask"][1, 4:] = 0
        inputs["input_ids"][1, 4:] = model.config.pad_token_id
    os.makedirs(folder)
    safe = rng.random() < 0.5
    for name in names:
        try:
            model.save_adapter(os.path.join(folder, name), name, use_safetensors=safe)
        except RuntimeError:  # tensors that share memory
            model.save_adapter(os.path.join(folder, name), name)
    save_file(inputs, os.path.join(folder, "inputs.safetensors"))
    job = {"base": base, "model": kind, "adapters": {f"our_{name}": os.path.join(folder, name) for name in names},
           "inputs": os.path.join(folder, "inputs.safetensors"), "out": os.path.join(folder, "out")}
    if fused:
        job["fusion"] = os.path.join(folder, "fusion")
        model.save_adapter_fusion(job["fusion"], names, use_safetensors=safe)
    return job, {"label": f"{label} on {kind}", "inputs": inputs, "expected": run(model, inputs)}


def read_configs(folder):
    """The configs of an adapter, in one order and one spelling."""
    with open(os.path.join(folder, "adapter_config.json")) as file:
        config = json.load(file)["config"]
    configs = config.get("configs", [config])
    for config in configs:
        for key in ("leave_out", "attn_matrices"):
            if key in config:
                config[key] = sorted(config[key])
        factors = config.get("reduction_factor")
        if factors is not None:
            factors = factors if isinstance(factors, dict) else {"default": factors}
            config["reduction_factor"] = [factors.get(str(layer), factors.get("default")) for layer in range(LAYERS)
                                          if layer not in config["leave_out"]]
    return sorted(configs, key=lambda config: (str(config.get("architecture")), config.get("mh_adapter", False)))


def fusion_tensors(folder):
    safe = os.path.join(folder, "model_adapter_fusion.safetensors")
    return load_file(safe) if os.path.exists(safe) else torch.load(os.path.join(folder, "pytorch_model_adapter_fusion.bin"))


def compare(job, case, line):
    if "error" in line:
        return [line["error"]], {}
    problems = []
    found = load_file(os.path.join(job["out"], "outputs.safetensors"))
    errors = {}

    def check(what, ours, theirs):
        mask = case["inputs"]["attention_mask"] if not job["model"].endswith("ForSequenceClassification") else None
        errors[what] = distance(ours, theirs, mask)
        if not errors[what] <= TOLERANCE:
            problems.append(f"{what} differs by {errors[what]:.2g}")

    check("our output", found["adapted"], case["expected"])
    check("the base", found["disabled"], run(plain_model(job["model"], job["base"]), case["inputs"]))
    written = {name: os.path.join(job["out"], name) for name in job["adapters"]}
    pairs = [pair for name in written
             for pair in zip(read_configs(job["adapters"][name]), read_configs(written[name]), strict=True)]
    for theirs, ours in pairs:
        silent = {"init_weights", "cross_prefix", "encoder_prefix"}
        silent |= {key for key in theirs if "phm" in key and not theirs.get("phm_layer")}
        if theirs.get("flat"):
            silent |= {"bottleneck_size", "non_linearity"}
        if not theirs.get("use_gating"):
            silent.add("shared_gating")
        if not theirs.get("selfattn_lora", True):
            silent.add("attn_matrices")
        for key in theirs:
            if key not in silent and theirs[key] != ours.get(key):
                problems.append(f"the config's {key} was {theirs[key]}, is {ours.get(key)}")
    model = open_model(job["model"], job["base"])
    for folder in written.values():
        info = {}
        model.load_adapter(folder, use_safetensors=True, loading_info=info, set_active=True)
        for kind in ("missing_keys", "unexpected_keys"):
            if info.get(kind):
                problems.append(f"Python has {kind}: {info[kind]}")
    if "fusion" in job:
        fusion = os.path.join(job["out"], "fusion")
        with open(os.path.join(job["fusion"], "adapter_fusion_config.json")) as file:
            theirs = json.load(file)["config"]
        with open(os.path.join(fusion, "adapter_fusion_config.json")) as file:
            if json.load(file)["config"] != theirs:
                problems.append("the fusion's config is another")
        # Python does not say which keys of a fusion it misses.
        ours = {key.replace("our_", "") for key in fusion_tensors(fusion)}
        if ours != fusion_tensors(job["fusion"]).keys():
            problems.append(f"the fusion has other keys: {sorted(ours ^ fusion_tensors(job['fusion']).keys())[:4]}")
        model.load_adapter_fusion(fusion, use_safetensors=True, set_active=True)
    if "fusion" not in job:
        model.set_active_adapters("our_their")
    check("Python's output", run(model, case["inputs"]), case["expected"])
    return problems, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", default=os.environ.get("PEFT_ADAPTERHUB_TOOL", "build/tests/adapterhub-tool"))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.randrange(10 ** 6))
    parser.add_argument("--only", help="configurations whose label has this text")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    wanted = [(name, config, kind) for name, config in named_configs().items()
              for kind in BERT[:2] + ROBERTA[:1] + DEBERTA[:1] + GPT2[:1]]
    wanted += [(name, config, kind) for name, config in fused_configs().items()
               for kind in BERT[:2] + ROBERTA[:1] + DEBERTA[:1] + GPT2[1:]]
    wanted += [(name, named_configs()[name], "GPT2Model") for name in ("houlsby inv", "pfeiffer inv")]
    wanted += [(name, named_configs()[name], kind) for name in ("pfeiffer inv", "prefix gates", "ia3", "unipelt")
               for kind in ROBERTA[1:] + DEBERTA[1:]]
    wanted += [("flexible head", named_configs()["pfeiffer"], kind) for kind in (ROBERTA[0], DEBERTA[0])]
    for number in range(options.count):
        wanted.append((f"random {number}", random_config(rng), rng.choice(BERT + ROBERTA + DEBERTA + GPT2)))
    with tempfile.TemporaryDirectory() as root:
        jobs, cases, skipped = [], [], {}
        for number, (name, config, kind) in enumerate(wanted):
            if options.only and options.only not in f"{name} on {kind}":
                continue
            why = fits(name, config, kind)
            if why:
                skipped[why] = skipped.get(why, 0) + 1
                continue
            job, case = prepare(number, name, config, kind, rng, root)
            case["config"] = config
            jobs.append(job)
            cases.append(case)
        path = os.path.join(root, "jobs.json")
        with open(path, "w") as file:
            json.dump(jobs, file)
        lines = subprocess.run([options.tool, path], stdout=subprocess.PIPE, check=True, text=True).stdout
        failures, worst = 0, {}
        for job, case, line in zip(jobs, cases, lines.splitlines(), strict=True):
            problems, errors = compare(job, case, json.loads(line))
            for what, error in errors.items():
                worst[what] = max(worst.get(what, 0), error)
            if problems:
                failures += 1
                print(f"{case['label']}: " + "; ".join(problems))
                if "random" in case["label"]:
                    print("   ", case["config"])
    for why, count in skipped.items():
        print(f"{count} not compared: {why}")
    print(f"{len(jobs)} adapters, {failures} differ; largest differences: "
          + ", ".join(f"{what} {error:.1e}" for what, error in worst.items()))
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
