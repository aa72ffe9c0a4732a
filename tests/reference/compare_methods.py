"""Compares every weight method with Python PEFT's, live, and prints the table method × what agrees.

    python tests/reference/compare_methods.py [--tool build/tests/peft-tool] [--seed N] [--only TEXT] [--cases]

--tool is by default the environment's PEFT_PEFT_TOOL, --seed random. Python makes an adapter of random values from a
config, on a toy model with every kind of layer (tests/io/toy_model.h), a BERT classifier of random sizes or a small
classifier of another family of encoders, and:

  forward   the adapter it wrote gives the same outputs with us
  merged    and so do its merged weights, with us and in Python
  train     12 steps of AdamW from it, in float64, give the same losses and outputs
  py->c++   written again by us, it has the same keys and values, and the same config
  c++->py   what those 12 steps with us left, written by us, loads in Python with the same outputs
  count     the weights that train are as many as the paper's formula says, with us and in Python

A cell holds the largest error over a method's cases (--cases prints each), relative to the largest value compared; the
last column the number of weights. A reason stands under the table for every cell that is empty. Exit status 0 only when
nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import collections
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import warnings

import compare_peft as common  # leaves with 77 without Python's libraries
import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

# With an eps of the gradients' size the step depends on how large a gradient is. One far below it divides the size out,
# which hides a wrong factor, and leaves the sign of rounding errors where the gradient is near 0.
STEPS, RATE, EPS, AMOUNT = 12, 5e-3, 1e-3, 0.1
LIMITS = {"forward": 1e-5, "merged": 2e-5, "train": 1e-9, "py->c++": 0.0, "c++->py": 1e-5, "count": 0.0}
COLUMNS = list(LIMITS)

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 8)), nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x):
        h = torch.einsum("eoi,...i->e...o", self.up, x).tanh()
        return torch.einsum("eoi,e...i->e...o", self.down, h).mean(0)


class Turned(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.stack, self.flat = nn.Parameter(torch.randn(2, 8, 5)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.einsum("eio,...i->...o", self.stack, x).tanh() @ self.flat.T


class Rare(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.attn = nn.Embedding(10, 8), nn.MultiheadAttention(8, 2)
        self.experts, self.turned, self.lstm = Experts(), Turned(), nn.LSTM(4, 6)
        self.conv, self.head = nn.Conv1d(6, 4, 3, groups=2, padding=1), nn.Linear(4, 3)

    def forward(self, ids):
        x = self.emb(ids).transpose(0, 1)
        h = self.attn(x, x, x)[0]
        h = self.lstm(self.turned(h + self.experts(h)))[0]
        return self.head(self.conv(h.permute(1, 2, 0)).tanh().mean(2))


def hadamard_product(t1, w1a, w1b, t2, w2a, w2b, scale):
    """LoHa's effective convolution by autograd, for PEFT's own backward has wrong gradients of w1a and w2a."""
    one, two = (torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, a, b in [(t1, w1a, w1b), (t2, w2a, w2b)])
    return one * two * scale


# `count`: the weights one layer trains, of (module, config); `without`: why columns are empty.
# `make`: makes the adapter otherwise; `extra`: weights beside the targets'; `written_plain`: we write the start that
# was taken out of the base as LoRA of twice the rank; `python_base`: the base PEFT has, where it is another;
# `merged_counts`: PEFT's merged outputs are the reference; `begins`: the tool's options for an adapter that trains from
# its start, where a file cannot train on.
Row = collections.namedtuple("Row", "method case base config count make without extra written_plain python_base "
                             "merged_counts begins", defaults=(None, {}, 0, False, None, False, None))


class Blocks:
    """What PEFT's CUDA extension computes for BOFT, without which it takes a single butterfly factor."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        cut = lambda matrix: torch.stack([matrix[i:i + h, i:i + h] for i in range(0, len(matrix), h)])
        h = blocks.shape[-1]
        return [torch.stack([cut(matrix) for matrix in gradient])]


def fan_in(module):
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return module.weight.shape[1:].numel() * getattr(module, "groups", 1)


def fan_out(module):
    return module.embedding_dim if isinstance(module, nn.Embedding) else module.weight.shape[0]


def count_lora(module, config):
    return config.r * fan_in(module) + config.r // getattr(module, "groups", 1) * fan_out(module)


def count_attention(module, config):
    if isinstance(module, nn.MultiheadAttention):
        return config.r * (module.embed_dim + 3 * module.embed_dim) + config.r * 2 * module.embed_dim
    return count_lora(module, config)


def count_parameter(tensor, config):
    if isinstance(tensor, nn.Module):
        return count_lora(tensor, config)
    experts = tensor.shape[0] if tensor.dim() == 3 else 1
    return config.r * experts * (tensor.shape[-1] + tensor.shape[-2])


def count_dora(module, config):
    return count_lora(module, config) + fan_out(module)


def count_adalora(module, config):
    return config.init_r * (fan_in(module) + fan_out(module) + 1)


def count_ia3(module, config):
    name = next(n for n, m in config.modules if m is module)
    inward = any(name.endswith(f) for f in config.feedforward_modules)
    return module.weight.shape[1 if inward else 0]


def count_loha(module, config):
    if getattr(config, "use_effective_conv2d", False) and module.weight.dim() > 2 and module.weight[0, 0].numel() > 1:
        return 2 * config.r * (module.weight.shape[0] + module.weight.shape[1] + config.r * module.weight[0, 0].numel())
    return 2 * config.r * (fan_in(module) + fan_out(module))


def factorization(size, factor):
    """The two factors of a dimension nearest to each other, or nearest to `factor` (LyCORIS)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    m, n = 1, size
    limit = size if factor == -1 else factor
    while m < n:
        new = m + 1
        while size % new != 0:
            new += 1
        if new + size // new > m + n or new > limit:
            break
        m, n = new, size // new
    return (n, m) if m > n else (m, n)


def count_lokr(module, config):
    kernel = module.weight.shape[2:].numel()
    out_l, out_k = factorization(module.weight.shape[0], config.decompose_factor)
    in_m, in_n = factorization(module.weight.shape[1], config.decompose_factor)
    r = config.r
    first = r * (out_l + in_m) if config.decompose_both and r < max(out_l, in_m) / 2 else out_l * in_m
    if r >= max(out_k, in_n) / 2:
        return first + out_k * in_n * kernel
    if config.use_effective_conv2d and kernel > 1:
        return first + r * r * kernel + r * (out_k + in_n)
    return first + r * (out_k + in_n * kernel)


def count_vera(module, config):
    return fan_out(module) + config.r


def count_vera_bias(module, config):
    return count_vera(module, config) + fan_out(module)


def count_oft(module, config):
    block = config.oft_block_size or fan_in(module) // config.r
    return (1 if config.block_share else fan_in(module) // block) * (block * (block - 1) // 2)


def count_boft(module, config):
    block = config.boft_block_size or fan_in(module) // config.boft_block_num
    return config.boft_n_butterfly_factor * fan_in(module) * block + fan_out(module)


def count_all(module, config):
    return sum(parameter.numel() for parameter in module.parameters())


def count_tokens(module, config):
    return len(config.token_indices) * module.embedding_dim


def count_mica(module, config):
    return config.r * fan_in(module)


LINEAR, EVERY = ["q", "v", "fc", "mlp.0"], common.EVERY
# Of each family of encoders beside BERT: what transformers' classes begin with, the config's own settings, its attention's
# names, and whether it takes prefixes. Its bases are called by what follows its name.
Family = collections.namedtuple("Family", "name config query key value prefix")
FAMILIES = {
    "roberta": Family("Roberta", dict(pad_token_id=1, max_position_embeddings=30, type_vocab_size=1), "query", "key", "value",
                      True),
    "deberta-v2": Family("DebertaV2", dict(max_position_embeddings=30, relative_attention=True, position_buckets=8,
                                           share_att_key=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                                           position_biased_input=False), "query_proj", "key_proj", "value_proj", False),
}
TASKS = {"": ("ForSequenceClassification", "SEQ_CLS"), " tasks": ("ForSequenceClassification", "SEQ_CLS"),
         " tokens": ("ForTokenClassification", "TOKEN_CLS"), " spans": ("ForQuestionAnswering", "QUESTION_ANS"),
         " words": ("ForMaskedLM", None)}
ATTENTION = ["query", "key", "value", "dense"]


def count_prompt(model, config):
    heads = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return sum(p.numel() for module in [model.prompt_encoder, *heads] for p in module.parameters())


def prompt_rows():
    unmerged = {"merged": "a prompt lengthens the text and leaves the weights alone"}
    for base, task in [("prompted", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]:
        shared = dict(task_type=task, num_virtual_tokens=5)
        for case, start in [("random", {}), ("words", {"prompt_tuning_init": "SAMPLE_VOCAB"})]:
            yield Row("prompt tuning", f"{base}, {case}", base,
                      lambda shared=shared, start=start: peft.PromptTuningConfig(**shared, **start), count_prompt,
                      without=unmerged)
        for kind in ["MLP", "LSTM"]:
            network = dict(shared, encoder_reparameterization_type=kind, encoder_hidden_size=6)
            yield Row("P-tuning", f"{base}, {kind}", base, lambda network=network: peft.PromptEncoderConfig(**network),
                      count_prompt, without=unmerged,
                      begins={**network, "modules_to_save": ["classifier"] if task == "SEQ_CLS" else []})
    longer = {"merged": "a prefix lengthens keys and values and leaves the weights alone"}
    for base, task in [("prompted", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]:
        shared = dict(task_type=task, num_virtual_tokens=5)
        for case, start in [("random", {}), ("zeros", {"init_weights": "zero"})]:
            yield Row("prefix tuning", f"{base}, {case}", base,
                      lambda shared=shared, start=start: peft.PrefixTuningConfig(**shared, **start), count_prompt,
                      without=longer)
        network = dict(shared, prefix_projection=True, encoder_hidden_size=6)
        yield Row("prefix tuning", f"{base}, projected", base, lambda network=network: peft.PrefixTuningConfig(**network),
                  count_prompt, without=longer,
                  begins={**network, "modules_to_save": ["classifier"] if task == "SEQ_CLS" else []})
    yield Row("multitask prompt tuning", "3 tasks, rank 2", "prompted",
              lambda: peft.MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5, num_tasks=3, num_ranks=2),
              count_prompt, without=unmerged)


def family_rows(base, family):
    """One adapter of each method on a family of encoders."""
    linear = [family.query, family.key, family.value, "dense"]
    yield Row("LoRA", base, base, lambda: lora(target_modules=linear), count_lora)
    yield Row("LoRA", f"{base}, embeddings", base, lambda: lora(target_modules=["word_embeddings", family.value]), count_lora)
    yield Row("rsLoRA", base, base, lambda: lora(target_modules=linear, use_rslora=True), count_lora)
    yield Row("DoRA", base, base, lambda: lora(target_modules=linear, use_dora=True), count_dora)
    yield Row("PiSSA", base, base, lambda: lora(target_modules=linear, init_lora_weights="pissa"), count_lora,
              written_plain=True)
    yield Row("AdaLoRA", f"{base}, no pruning", base,
              lambda: adalora(target_modules=linear, tinit=12, total_step=40, lora_alpha=12), count_adalora)
    yield Row("(IA)³", base, base, lambda: ia3([family.key, family.value, "output.dense"], ["output.dense"]), count_ia3)
    for name, make, count in [("LoHa", peft.LoHaConfig, count_loha), ("LoKr", peft.LoKrConfig, count_lokr)]:
        yield Row(name, base, base, lambda make=make: make(target_modules=linear, r=2, alpha=3), count)
    yield Row("VeRA", base, base, lambda: peft.VeraConfig(target_modules=[family.query], r=12, d_initial=0.3), count_vera)
    yield Row("OFT", base, base, lambda: peft.OFTConfig(target_modules=linear, oft_block_size=2, module_dropout=0.0), count_oft)
    yield Row("BOFT", base, base, lambda: peft.BOFTConfig(target_modules=linear, boft_block_size=2), count_boft)
    yield Row("LayerNorm tuning", base, base, lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]), count_all)
    yield Row("trainable tokens", base, base,
              lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=list(range(5, 25))),
              count_tokens)
    unmerged = {"merged": "virtual tokens leave the weights alone"}
    shared = dict(task_type="SEQ_CLS", num_virtual_tokens=5)
    yield Row("prompt tuning", base, base, lambda: peft.PromptTuningConfig(**shared), count_prompt, without=unmerged)
    network = dict(shared, encoder_reparameterization_type="MLP", encoder_hidden_size=6)
    yield Row("P-tuning", base, base, lambda: peft.PromptEncoderConfig(**network), count_prompt, without=unmerged,
              begins={**network, "modules_to_save": ["classifier"]})
    yield Row("multitask prompt tuning", base, f"{base} tasks",
              lambda: peft.MultitaskPromptTuningConfig(**shared, num_tasks=3, num_ranks=2), count_prompt, without=unmerged)
    if family.prefix:
        yield Row("prefix tuning", base, base, lambda: peft.PrefixTuningConfig(**shared), count_prompt, without=unmerged)
    for end in [" tokens", " spans", " words"]:
        yield Row("LoRA", base + end, base + end, lambda: lora(target_modules=linear), count_lora)
    for end in [" tokens", " spans"]:
        task = dict(shared, task_type=TASKS[end][1])
        yield Row("prompt tuning", base + end, base + end, lambda task=task: peft.PromptTuningConfig(**task), count_prompt,
                  without=unmerged)
        if family.prefix:
            yield Row("prefix tuning", base + end, base + end, lambda task=task: peft.PrefixTuningConfig(**task), count_prompt,
                      without=unmerged)


# Heads of masked words, whose bias has two names: family, more of its config, head, weights of the head, all biases.
HEADS = {
    "bert head": ("Bert", {}, "cls", 1154, 370),
    "roberta head": ("Roberta", FAMILIES["roberta"].config, "lm_head", 1154, 370),
    "deberta-v2 head": ("DebertaV2", FAMILIES["deberta-v2"].config, "cls", 1154, 386),
    "deberta-v2 new head": ("DebertaV2", {**FAMILIES["deberta-v2"].config, "legacy": False}, "lm_predictions", 354, 386),
}


def head_rows(base, name, head, weights, biases):
    ends = "_proj" if name == "DebertaV2" else ""
    targets = [f"query{ends}", f"value{ends}"]
    yield Row("LoRA", f"{base} saved", base, lambda: lora(target_modules=targets, modules_to_save=[head]), count_lora,
              extra=weights)
    yield Row("LoRA", f"{base}, all biases", base, lambda: lora(target_modules=targets, bias="all"), count_lora, extra=biases)


def lora(**more):
    return peft.LoraConfig(**{**dict(r=4, lora_alpha=6), **more})


def adalora(**more):
    return peft.AdaLoraConfig(**{**dict(init_r=4, target_r=2, tinit=2, tfinal=3, total_step=12, lora_alpha=6), **more})


def ia3(targets, inward):
    return peft.IA3Config(target_modules=targets, feedforward_modules=inward)


def prepared(comparison, row):
    """PEFT's model, its start measured on the base's inputs where it is."""
    base, config = copy.deepcopy(comparison.bases[row.base]), row.config()
    inputs, init = comparison.inputs[row.base], getattr(config, "init_lora_weights", True)
    torch.manual_seed(0)
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda
        rows = [{key: value[i:i + 1] for key, value in inputs.items()} for i in range(4)]  # it takes matrices only
        preprocess_corda(base, config, run_model=lambda: [base(**row) for row in rows])
    if init == "lora_ga":
        def step():
            output = base(**inputs)
            logits = getattr(output, "logits", output)
            nn.functional.cross_entropy(logits, comparison.labels[row.base]).backward()
        peft.tuners.lora.preprocess_loraga(base, config, step)
        base.zero_grad()
    return get_peft_model(base, config).eval()


def converted(comparison, row, folder):
    """Written by Python as a plain LoRA of twice the rank, for the base as it was."""
    model = prepared(comparison, row)
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(f"{folder}-start")
    config.init_lora_weights = init
    common.move(model, AMOUNT)
    return comparison.describe(row, model, folder, path_initial_model_for_weight_conversion=f"{folder}-start")


def on_changed_base(comparison, row, folder):
    """A plain LoRA in the file, and the base that Python changed beside it."""
    model = prepared(comparison, row)
    model.peft_config["default"].init_lora_weights = True
    changed = {key.replace(".base_layer", ""): value for key, value in model.base_model.model.state_dict().items()
               if "lora_" not in key}
    base = copy.deepcopy(comparison.bases[row.base])
    base.load_state_dict(changed)
    row = row._replace(base=comparison.add_base(row, base))
    common.move(model, AMOUNT)
    return comparison.describe(row, model, folder)


def eva(comparison, row, folder):
    model = prepared(comparison, row)
    inputs = comparison.inputs[row.base]
    peft.initialize_lora_eva_weights(model, [inputs] * 4, forward_fn=lambda m, i: m(**i), prepare_model_inputs_fn=None,
                                     prepare_layer_inputs_fn=lambda x, *_: x[0].flatten(0, -2), show_progress_bar=False)
    common.move(model, AMOUNT)
    return comparison.describe(row, model, folder)


def loftq(comparison, row, folder):
    """Quantised by us, for PEFT does it with bitsandbytes on CUDA only; its adapter then lies on our quantised base."""
    made = f"{folder}-made"
    options = {"target_modules": LINEAR, "r": 4, "lora_alpha": 4, "init_lora_weights": "loftq"}
    answer = comparison.run_tool([{**comparison.shared(row), "options": options, "seed": 0, "out": made}])[0]
    if "error" in answer:
        raise ValueError(answer["error"])
    base = common.Toy()
    base.load_state_dict(load_file(f"{made}/start/toy.safetensors"))
    row = row._replace(python_base=comparison.add_base(row, base.eval()))
    start = comparison.readable(f"{made}/start", row)
    model = PeftModel.from_pretrained(comparison.fresh_base(row), start, is_trainable=True).eval()
    common.move(model, AMOUNT)
    result = comparison.describe(row, model, folder)
    result["config"].update(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump(result["config"], file)
    return result


def increlora(comparison, row, folder):
    """Made, grown and written by us alone, as a plain LoRA."""
    return {"row": row, "options": {"target_rank": 2, "target_modules": LINEAR}}


def rows():
    yield Row("LoRA", "linear", "toy", lambda: lora(target_modules=LINEAR), count_lora)
    yield Row("LoRA", "every layer kind", "toy", lambda: lora(target_modules=EVERY), count_lora)
    yield Row("LoRA", "BERT", "bert", lambda: lora(target_modules=ATTENTION), count_lora)
    yield Row("rsLoRA", "every layer kind", "toy", lambda: lora(target_modules=EVERY, use_rslora=True), count_lora)
    yield Row("rsLoRA", "BERT", "bert", lambda: lora(target_modules=ATTENTION, use_rslora=True), count_lora)
    for kind in ["q", "emb", "conv1", "conv", "conv3"]:
        yield Row("DoRA", kind, "toy", lambda kind=kind: lora(target_modules=[kind], use_dora=True), count_dora)
    yield Row("DoRA", "patterns, rsLoRA", "toy",
              lambda: lora(target_modules=EVERY, use_dora=True, use_rslora=True, alpha_pattern={"q": 3}), count_dora)
    yield Row("DoRA", "BERT", "bert", lambda: lora(target_modules=ATTENTION, use_dora=True), count_dora)
    for init in ["pissa", "olora"]:
        name = {"pissa": "PiSSA", "olora": "OLoRA"}[init]
        yield Row(name, "linear", "toy", lambda init=init: lora(target_modules=LINEAR, init_lora_weights=init),
                  count_lora, written_plain=True)
        yield Row(name, "BERT, DoRA", "bert",
                  lambda init=init: lora(target_modules=["query"], init_lora_weights=init, use_dora=True), count_dora,
                  written_plain=True)
        yield Row(name, "converted", "toy",
                  lambda init=init: lora(target_modules=LINEAR, use_rslora=True, init_lora_weights=init), count_lora,
                  make=converted)
    yield Row("PiSSA", "16 iterations, converted", "bert",
              lambda: lora(target_modules=ATTENTION, init_lora_weights="pissa_niter_16"), count_lora, make=converted)
    yield Row("orthogonal", "linear", "toy", lambda: lora(target_modules=LINEAR, init_lora_weights="orthogonal"),
              count_lora)
    yield Row("MiCA", "linear, embedding", "toy",
              lambda: lora(target_modules=LINEAR + ["emb"], init_lora_weights="mica"), count_mica)
    yield Row("MiCA", "BERT", "bert", lambda: lora(target_modules=ATTENTION, init_lora_weights="mica"), count_mica)
    yield Row("EVA", "linear, ranks moved", "toy",
              lambda: lora(target_modules=LINEAR, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2)),
              count_lora, make=eva)
    for case, make in [("on the changed base", on_changed_base), ("converted", converted)]:
        yield Row("CorDA", case, "toy",
                  lambda: lora(target_modules=LINEAR, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()),
                  count_lora, make=make)
        yield Row("LoRA-GA", case, "bert",
                  lambda: lora(target_modules=["query", "value"], r=2, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
                  count_lora, make=make)
    yield Row("LoRA", "grouped convolution", "rare", lambda: lora(target_modules=["conv"]), count_lora,
              without={"merged": "A sees the channels of all groups, so that W has no place for the product"})
    yield Row("LoRA on attention", "MultiheadAttention", "rare", lambda: lora(target_modules=["attn"]), count_attention)
    yield Row("LoRA on attention", "beside others", "rare",
              lambda: lora(target_modules=["attn", "head"], use_rslora=True, rank_pattern={"attn": 2}), count_attention)
    parameters = ["experts.up", "experts.down", "turned.stack", "turned.flat"]
    yield Row("LoRA on parameters", "experts", "rare",
              lambda: lora(target_modules=[], target_parameters=parameters, rank_pattern={"down": 3}), count_parameter)
    yield Row("LoRA on parameters", "LSTM", "rare",
              lambda: lora(target_modules=["head"], target_parameters=["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
              count_parameter)
    yield Row("LoftQ", "linear, as a file", "toy", None, count_lora, make=loftq)
    yield Row("IncreLoRA", "linear, grown, as plain LoRA", "toy", None, lambda module, _: fan_in(module) + fan_out(module) + 1,
              make=increlora,
              without={"forward": "PEFT lacks the method", "py->c++": "PEFT lacks the format",
                       "train": "PEFT lacks the method (compare_increlora.py follows the author's code)"})
    yield Row("AdaLoRA", "linear", "toy", lambda: adalora(target_modules=LINEAR), count_adalora)
    yield Row("AdaLoRA", "convolution", "toy", lambda: adalora(target_modules=["conv", "q"]), count_adalora)
    yield Row("AdaLoRA", "BERT, no pruning", "bert",
              lambda: adalora(target_modules=ATTENTION, tinit=12, total_step=40, lora_alpha=12), count_adalora)
    yield Row("(IA)³", "outputs", "toy", lambda: ia3(["q", "v", "conv"], []), count_ia3)
    yield Row("(IA)³", "feed-forward", "toy", lambda: ia3(["q", "v", "fc", "conv", "conv3"], ["fc", "conv", "conv3"]), count_ia3)
    yield Row("(IA)³", "BERT", "bert", lambda: ia3(["key", "value", "output.dense"], ["output.dense"]), count_ia3)
    for name, make, count in [("LoHa", peft.LoHaConfig, count_loha), ("LoKr", peft.LoKrConfig, count_lokr)]:
        shared = dict(r=2, alpha=3)
        yield Row(name, "linear, patterns", "toy",
                  lambda make=make: make(target_modules=LINEAR, rank_pattern={"fc": 3}, alpha_pattern={"q": 5}, **shared), count)
        yield Row(name, "convolutions", "toy", lambda make=make: make(target_modules=["conv1", "conv", "q"], **shared), count)
        yield Row(name, "effective convolutions", "toy",
                  lambda make=make: make(target_modules=["conv1", "conv"], use_effective_conv2d=True, r=2, alpha=100), count)
        yield Row(name, "BERT", "bert", lambda make=make: make(target_modules=ATTENTION, **shared), count)
    yield Row("LoKr", "both decomposed, factor 2", "toy",
              lambda: peft.LoKrConfig(target_modules=LINEAR, r=1, alpha=2, decompose_both=True, decompose_factor=2), count_lokr)
    yield Row("VeRA", "linear", "toy", lambda: peft.VeraConfig(target_modules=LINEAR, r=6), count_vera)
    yield Row("VeRA", "projection left out", "toy",
              lambda: peft.VeraConfig(target_modules=LINEAR, r=6, save_projection=False, projection_prng_key=11), count_vera)
    yield Row("VeRA", "BERT, biases", "bert",
              lambda: peft.VeraConfig(target_modules=["query"], r=12, d_initial=0.3, bias="vera_only"), count_vera_bias)
    oft = lambda **more: peft.OFTConfig(**{**dict(target_modules=LINEAR, oft_block_size=4, module_dropout=0.0), **more})
    yield Row("OFT", "linear", "toy", lambda: oft(target_modules=["q", "v", "fc"]), count_oft)
    yield Row("OFT", "exact, constrained", "toy", lambda: oft(use_cayley_neumann=False, coft=True, eps=1e-3), count_oft)
    yield Row("OFT", "shared blocks", "toy", lambda: oft(block_share=True), count_oft)
    yield Row("OFT", "convolution, number of blocks", "toy",
              lambda: oft(target_modules=["conv"], oft_block_size=0, r=9, use_cayley_neumann=False), count_oft,
              merged_counts=True,
              without={"train": "on convolutions of several positions PEFT's forward sums overlapping patches and "
                                "contradicts its merge, which is what the other columns compare with"})
    yield Row("OFT", "embedding", "toy", lambda: oft(target_modules=["emb"]), count_oft)
    yield Row("OFT", "biases", "toy", lambda: oft(target_modules=["q", "v"], bias="oft_only"), count_oft, extra=16)
    yield Row("OFT", "BERT", "bert", lambda: oft(target_modules=["query", "key"], oft_block_size=2), count_oft)
    boft = lambda **more: peft.BOFTConfig(**{**dict(target_modules=["q", "v", "fc"], boft_block_size=2), **more})
    yield Row("BOFT", "linear", "toy", boft, count_boft)
    yield Row("BOFT", "two factors", "toy", lambda: boft(boft_n_butterfly_factor=2), count_boft)
    yield Row("BOFT", "convolution, number of blocks", "toy",
              lambda: boft(target_modules=["conv"], boft_block_size=0, boft_block_num=6), count_boft)
    yield Row("BOFT", "biases", "toy", lambda: boft(target_modules=["q", "v"], bias="boft_only"), count_boft, extra=16)
    yield Row("BOFT", "BERT", "bert", lambda: boft(target_modules=["query", "key"]), count_boft)
    yield Row("LayerNorm tuning", "toy", "toy", lambda: peft.LNTuningConfig(target_modules=["ln"]), count_all)
    yield Row("LayerNorm tuning", "BERT", "bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]), count_all)
    yield Row("trainable tokens", "toy", "toy", lambda: peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[4, 1, 7]),
              count_tokens)
    yield Row("trainable tokens", "BERT", "bert",
              lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=list(range(5, 25))),
              count_tokens)
    yield Row("trainable tokens", "beside LoRA", "toy",
              lambda: lora(target_modules=LINEAR, trainable_token_indices={"emb": [4, 1, 7]}), count_lora, extra=3 * 8)
    yield from prompt_rows()
    for base, family in FAMILIES.items():
        yield from family_rows(base, family)
    for base, (name, _, head, weights, biases) in HEADS.items():
        yield from head_rows(base, name, head, weights, biases)


class Comparison(common.Comparison):
    def make_python(self, row, folder):
        """Makes, runs and writes PEFT's adapter."""
        if row.make:
            return row.make(self, row, folder)
        model = prepared(self, row)
        common.move(model, AMOUNT)
        return self.describe(row, model, folder)

    def describe(self, row, model, folder, **how):
        adapted = self.output(model, row.base)
        model.save_pretrained(folder, **how)
        with open(f"{folder}/adapter_config.json") as file:
            config = json.load(file)
        merged = None if "merged" in row.without else self.output(copy.deepcopy(model).merge_and_unload(), row.base)
        adapted = merged if row.merged_counts else adapted
        generated = None
        if row.base == "gpt2":
            generated = model.generate(**self.inputs["gpt2"], max_new_tokens=8, do_sample=False, pad_token_id=0).float()
        return dict(generated=generated, row=row, config=config, state=load_file(f"{folder}/adapter_model.safetensors"), adapted=adapted,
                    merged=merged)

    def make_bases(self):
        super().make_bases()
        self.bases["rare"], self.inputs["rare"], self.labels["rare"] = Rare().eval(), self.inputs["toy"], self.labels["toy"]
        self.write_base("rare", "rare.safetensors")
        bert, inputs, labels = self.bases["bert"], self.inputs["bert"], self.labels["bert"]
        gpt2 = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=30, initializer_range=0.2,
                                       bos_token_id=0, eos_token_id=0)
        rows = dict(token_type_ids=torch.randint(2, (4, 9)), task_ids=torch.tensor([2, 0, 1, 2]))
        self.bases["prompted"], self.inputs["prompted"], self.labels["prompted"] = bert, {**inputs, **rows}, labels
        self.bases["gpt2"] = transformers.GPT2LMHeadModel(gpt2).eval()
        texts = torch.arange(9) >= torch.randint(9, (50, 1))  # padded on the left
        self.inputs["gpt2"] = {"input_ids": torch.randint(1, 40, (50, 9)) * texts, "attention_mask": texts.long()}
        self.labels["gpt2"] = torch.randint(40, (50,))
        sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                     initializer_range=0.2)
        for name, (family, more, *_) in HEADS.items():
            config = getattr(transformers, f"{family}Config")(**sizes, **more)
            self.bases[name] = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
            self.inputs[name] = {**inputs, "input_ids": inputs["input_ids"].clamp_min(2)}
            self.labels[name] = torch.randint(3, (4,))
        for name, family in FAMILIES.items():
            config = getattr(transformers, f"{family.name}Config")(**sizes, **family.config)
            padding, masked = config.pad_token_id, inputs["attention_mask"] == 0
            ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == padding, 2).masked_fill(masked, padding)
            for end, (task, _) in TASKS.items():
                config.num_labels = 2 if "Answering" in task else 3
                self.bases[name + end] = getattr(transformers, family.name + task)(copy.deepcopy(config)).eval()
                self.inputs[name + end] = {**inputs, "input_ids": ids}
                self.labels[name + end] = torch.randint(3, (4,))
            self.inputs[f"{name} tasks"]["task_ids"] = rows["task_ids"]
        for name in ["prompted", "gpt2", *HEADS, *(name + end for name in FAMILIES for end in TASKS)]:
            self.write_base(name, None)

    def write_base(self, name, file):
        os.makedirs(self.path(name))
        if file:
            save_file(self.bases[name].state_dict(), self.path(name, file))
        else:
            self.bases[name].save_pretrained(self.path(name))
        save_file({**self.inputs[name], "labels": self.labels[name]}, self.path(name, "inputs.safetensors"))

    def add_base(self, row, base):
        """A base of the row's own."""
        name = f"{row.base} of {row.method}"
        self.bases[name], self.inputs[name], self.labels[name] = base, self.inputs[row.base], self.labels[row.base]
        self.write_base(name, None if row.base == "bert" else "toy.safetensors")
        return name

    def forward(self, model, base):
        inputs = dict(self.inputs[base])
        if not isinstance(model, PeftModel):
            inputs.pop("task_ids", None)
        output = model(**inputs)
        if hasattr(output, "start_logits"):
            return torch.cat([output.start_logits, output.end_logits], 1)
        logits = getattr(output, "logits", output)
        return logits[:, -1] if base == "gpt2" else logits.flatten(1)

    def formula(self, row, model):
        config, base = model.peft_config["default"], self.bases[row.base]
        if config.is_prompt_learning:
            return row.count(model, config)
        config.modules = list(base.named_modules())
        total = row.extra
        parameters = getattr(model.base_model, "targeted_parameter_names", [])
        for name in list(model.base_model.targeted_module_names) + list(parameters):
            local = copy.copy(config)
            for pattern, rank in (getattr(config, "rank_pattern", None) or {}).items():
                if isinstance(rank, int) and re.match(rf"(.*\.)?({pattern})$", name):
                    local.r = rank
                    break
            total += row.count(base.get_parameter(name) if name in parameters else base.get_submodule(name), local)
        return total

    def train_python(self, row, folder):
        model = self.trainable(row, folder).double()
        for name, parameter in model.named_parameters():
            if "out_proj.lora_" in name:  # PEFT adds this product twice, with the gradient of once
                parameter.register_hook(lambda gradient: 2 * gradient)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, eps=EPS)
        allocates = hasattr(model.base_model, "update_and_allocate")
        losses = []
        for step in range(STEPS):
            loss = nn.functional.cross_entropy(self.forward(model, row.base), self.labels[row.base])
            losses.append(loss.item())
            optimizer.zero_grad()
            (loss + self.penalty(model) if allocates else loss).backward()
            optimizer.step()
            if allocates:
                model.base_model.update_and_allocate(step)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return torch.tensor(losses, dtype=torch.float64), self.output(model, row.base), count, self.formula(row, model)

    def trainable(self, row, folder):
        if row.begins:
            torch.manual_seed(0)
            return get_peft_model(self.fresh_base(row), row.config()).eval()
        config = peft.PeftConfig.from_pretrained(folder)
        if not config.is_prompt_learning:
            return PeftModel.from_pretrained(self.fresh_base(row), self.readable(folder, row), is_trainable=True).eval()
        model = PeftModel.from_pretrained(self.fresh_base(row), folder).eval()  # which trains no prompt on by itself
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prompt_encoder" in name or "modules_to_save" in name)
        return model

    @staticmethod
    def penalty(model):
        """AdaLoRA's, which Python adds only to the losses that transformers' own models return."""
        terms = [p @ p.T if "lora_A" in n else p.T @ p for n, p in model.named_parameters()
                 if ("lora_A" in n or "lora_B" in n) and p.requires_grad]
        norms = [torch.norm(t - torch.eye(len(t)), p="fro") for t in terms]
        return model.peft_config["default"].orth_reg_weight * sum(norms) / len(norms)

    def fresh_base(self, row):
        return copy.deepcopy(self.bases[row.python_base or row.base])

    @staticmethod
    def readable(folder, row):
        """The same files, telling PEFT nothing of a base it has changed already."""
        if not row.python_base:
            return folder
        shutil.copytree(folder, f"{folder}-plain", dirs_exist_ok=True)
        with open(f"{folder}-plain/adapter_config.json") as file:
            config = json.load(file)
        with open(f"{folder}-plain/adapter_config.json", "w") as file:
            json.dump({**config, "init_lora_weights": True, "loftq_config": {}}, file)
        return f"{folder}-plain"

    def load_in_python(self, folder, row):
        model = PeftModel.from_pretrained(self.fresh_base(row), self.readable(folder, row)).eval()
        wanted, got = set(get_peft_model_state_dict(model)), set(load_file(f"{folder}/adapter_model.safetensors"))
        if wanted != got:
            raise ValueError(f"other keys: {sorted(wanted ^ got)}")
        return self.output(model.merge_and_unload() if row.merged_counts else model, row.base)

    def run(self):
        self.make_bases()
        pending = [row for row in rows() if not self.only or self.only in f"{row.method}: {row.case}"]
        jobs, python = [], []
        for i, row in enumerate(pending):
            folder = self.path(f"case{i}")
            os.makedirs(folder)
            try:
                python.append(self.make_python(row, f"{folder}/python"))
                row = python[-1]["row"]
            except Exception as error:  # noqa: BLE001: a row that fails must not hide the others
                python.append(error)
            options = python[-1].get("options") if isinstance(python[-1], dict) else None
            shared = {**self.shared(row), **({"options": options} if options else {"adapter": f"{folder}/python"})}
            training = {"optimizer": "peft", "lr": RATE, "eps": EPS, "steps": STEPS, "double": True, "training": True}
            jobs.append({**shared, **(training if options else {}), "out": f"{folder}/read"})
            begins = {**self.shared(row), "options": row.begins} if row.begins else shared
            jobs.append({**begins, **training, "out": f"{folder}/train"})
        answers = self.run_tool(jobs)
        for i, row in enumerate(pending):
            cells = {"name": f"{row.method}: {row.case}", "row": row}
            self.rows.append(cells)
            try:
                if isinstance(python[i], Exception):
                    raise python[i]
                row = cells["row"] = python[i]["row"]
                if "options" in python[i]:
                    self.compare_ours(cells, row, answers[2 * i + 1], f"{self.path(f'case{i}')}/train")
                    continue
                self.compare(cells, row, python[i], answers[2 * i], self.path(f"case{i}"))
                self.compare_training(cells, row, python[i], answers[2 * i + 1], self.path(f"case{i}"))
            except Exception as error:  # noqa: BLE001
                self.failures.append(f"{cells['name']}: {type(error).__name__}: {error}")

    def shared(self, row):
        return {"base": self.path(row.base), "inputs": self.path(row.base, "inputs.safetensors")}

    def run_tool(self, jobs):
        with open(self.path("jobs.json"), "w") as file:
            json.dump(jobs, file)
        done = subprocess.run([self.tool, self.path("jobs.json")], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0 or len(answers) != len(jobs):
            raise RuntimeError(f"the tool ended with {done.returncode} after {len(answers)} jobs: {done.stderr[-2000:]}")
        return answers

    def compare_ours(self, cells, row, answer, folder):
        """An adapter PEFT has no method for."""
        if "error" in answer:
            return self.fail(cells, "c++->py", answer["error"])
        outputs = load_file(f"{folder}/outputs.safetensors")
        self.check(cells, "merged", common.difference(outputs["merged"], outputs["trained"]), LIMITS["merged"])
        back = self.load_in_python(f"{folder}/adapter", row)
        self.check(cells, "c++->py", common.difference(back, outputs["trained"]), LIMITS["c++->py"])
        targets = [m for n, m in self.bases[row.base].named_modules() if any(n == t or n.endswith(f".{t}") for t in LINEAR)]
        cells["weights"] = sum(row.count(module, None) for module in targets)
        self.check(cells, "count", float(abs(answer["count"] - cells["weights"])), 0.0)

    def compare(self, cells, row, python, answer, folder):
        plain = self.output(self.bases[row.base], row.base)
        if python["adapted"].shape == plain.shape and not common.difference(python["adapted"], plain) > 1e-4:
            raise ValueError("the adapter does nothing")
        if "error" in answer:
            return self.fail(cells, "forward", answer["error"])
        outputs = load_file(f"{folder}/read/outputs.safetensors")
        self.check(cells, "forward", common.difference(outputs["adapted"], python["adapted"]), LIMITS["forward"])
        if python["generated"] is not None:
            cells["generated"] = len(python["generated"])
            if outputs["generated"].shape != python["generated"].shape or not outputs["generated"].equal(python["generated"]):
                self.fail(cells, "forward", "the generated texts are others")
        if common.difference(outputs["disabled"], plain) > 1e-6:
            self.fail(cells, "forward", "the disabled model is not the base")
        if "merged" not in row.without:
            if "merge_error" in answer:
                return self.fail(cells, "merged", answer["merge_error"])
            self.check(cells, "merged", max(common.difference(outputs["merged"], outputs["adapted"]),
                                            common.difference(outputs["merged"], python["merged"])), LIMITS["merged"])
            if not outputs["unmerged"].equal(outputs["adapted"]):
                self.fail(cells, "merged", "unmerge does not restore the outputs")
        again = load_file(f"{folder}/read/adapter/adapter_model.safetensors")
        if row.written_plain:
            cells["py->c++"] = common.difference(self.load_in_python(f"{folder}/read/adapter", row), python["adapted"])
            return self.check(cells, "py->c++", cells["py->c++"], LIMITS["forward"])
        if set(again) != set(python["state"]):
            return self.fail(cells, "py->c++", f"other keys: {sorted(set(again) ^ set(python['state']))}")
        self.check(cells, "py->c++", max(common.difference(again[key], value) for key, value in python["state"].items()), 0.0)
        with open(f"{folder}/read/adapter/adapter_config.json") as file:
            self.compare_config(cells, python["config"], json.load(file))

    def compare_config(self, cells, theirs, ours):
        if theirs.get("init_lora_weights") in ("eva", "orthogonal"):
            theirs["init_lora_weights"] = True  # how the tensors began no longer matters
        for key in ["eva_config", "corda_config", "lora_ga_config"]:
            if key in theirs:
                theirs[key] = None
        before = len(self.failures)
        super().compare_config(cells, theirs, ours)
        if len(self.failures) > before:
            cells["py->c++"] = float("nan")
            cells.pop("again", None)

    def compare_training(self, cells, row, python, answer, folder):
        if "error" in answer:
            return self.fail(cells, "train", answer["error"])
        losses, trained, count, formula = self.train_python(row, f"{folder}/python")
        if losses[0] == losses[-1]:
            raise ValueError(f"the loss does not move: {losses[0]}")
        outputs = load_file(f"{folder}/train/outputs.safetensors")
        if "train" not in row.without:
            limit = LIMITS["forward" if row.written_plain else "train"]  # each has a float32 start of its own
            self.check(cells, "train", max(common.difference(outputs["losses"], losses),
                                           common.difference(outputs["trained"], trained)), limit)
        back = self.load_in_python(f"{folder}/train/adapter", row)
        self.check(cells, "c++->py", common.difference(back, outputs["trained"]), LIMITS["c++->py"])
        cells["weights"] = formula
        self.check(cells, "count", float(max(abs(formula - count), abs(formula - answer["count"]))), 0.0)

    def report(self, cases=False):
        groups = {}
        for cells in self.rows:
            groups.setdefault(cells["name"] if cases else cells["row"].method, []).append(cells)
        width = max(len(name) for name in groups) + 2
        print(f"{'':{width}}{'cases':>6}" + "".join(f"{column:>10}" for column in COLUMNS) + f"{'weights':>10}")
        for name, group in groups.items():
            line = f"{name:{width}}{len(group):6}"
            for column in COLUMNS:
                errors = [cells[column] for cells in group if column in cells]
                worst = math.nan if any(math.isnan(e) for e in errors) else max(errors, default=None)
                line += f"{'':>10}" if worst is None else f"{worst:10.1e}" if worst else f"{'0':>10}"
            print(line + f"{sum(cells.get('weights', 0) for cells in group):10}")
        for cells in self.rows:
            for column, reason in cells["row"].without.items():
                print(f"{cells['name']}, {column}: {reason}")
        if any("generated" in cells for cells in self.rows):
            print(f"texts that GPT-2 goes on with as in Python: {sum(cells.get('generated', 0) for cells in self.rows)}")
        for failure in self.failures:
            print(f"failed: {failure}")
        print(f"{len(self.failures)} failures in {len(self.rows)} cases" if self.failures
              else f"{len(self.rows)} cases of {len({cells['row'].method for cells in self.rows})} methods agree")


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_PEFT_TOOL"))
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--only", default="")
    parser.add_argument("--cases", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tool:
        parser.error("--tool or PEFT_PEFT_TOOL must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}", flush=True)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the models are too small for more
    peft.tuners.boft.layer._FBD_CUDA = Blocks
    peft.tuners.loha.layer.make_weight_cp = hadamard_product
    comparison = Comparison(arguments.tool, arguments.seed, arguments.only)
    comparison.run()
    comparison.report(arguments.cases)
    return 1 if comparison.failures or not comparison.rows else 0


if __name__ == "__main__":
    sys.exit(main())
