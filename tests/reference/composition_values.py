"""Prints tests/model/composition_values.h: AdapterHub's compositions of bottleneck and LoRA adapters.

Needs adapters 1.3.0. For each kind of adapter and each composition two sums over the logits.
"""
import warnings

import torch
from adapters import DoubleSeqBnConfig, LoRAConfig, ParBnConfig, SeqBnConfig, init
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from transformers import BertConfig, BertForSequenceClassification

warnings.simplefilter("ignore")
A, B, C = "a", "b", "c"
IDS = torch.tensor([[5, 3, 19, 7], [1, 2, 0, 0], [4, 8, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
KINDS = {
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(reduction_factor=4),
    "lora": LoRAConfig(r=2, alpha=4),
}


def split(*children, first=1):
    return Split(*children, splits=[first, 4 - first])


def rows(*children, first=1):
    return BatchSplit(*children, batch_sizes=[first, 3 - first])


def average(*children):
    return Average(*children, weights=[0.25, 0.75])


ALL = [rows(A, B), average(A, B), Parallel(A, B), Stack(C, Parallel(A, B)), Stack(rows(A, B), C), Stack(C, average(A, B)),
       Parallel(Stack(A, B), C), Parallel(rows(A, B), C), Parallel(average(A, B), C),
       rows(Stack(A, B), C), rows(BatchSplit(A, B, batch_sizes=[1, 1]), C, first=2), rows(average(A, B), C),
       average(Stack(A, B), C), average(rows(A, B), C)]
BOTTLENECK = ALL + [Stack(A, B), Fuse(A, B), split(A, B), Stack(C, Fuse(A, B)), Stack(split(A, B), C),
                    Fuse(Stack(C, A), B), split(Split(A, B, splits=[1, 2]), C, first=3), split(Stack(A, B), C),
                    split(rows(A, B), C), split(average(A, B), C), rows(split(A, B), C), average(split(A, B), C)]


def wave(like, k, size):
    return (size * torch.sin(0.7 * torch.arange(like.numel(), dtype=torch.float64) + k)).reshape(like.shape)


def model_with(config, fusion="dynamic", fill_fusion=True):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        hidden_act="gelu_new", max_position_embeddings=10, layer_norm_eps=1e-6, num_labels=3)).double().eval()
    with torch.no_grad():
        for k, (name, tensor) in enumerate(model.named_parameters()):
            tensor.copy_(wave(tensor, k, 0.15) + name.endswith("LayerNorm.weight"))
    init(model)
    for name in (A, B, C):
        model.add_adapter(name, config=config)
    is_lora = isinstance(config, LoRAConfig)
    torch.manual_seed(3)
    if not is_lora:
        model.add_adapter_fusion([A, B], fusion)
    model.double().eval()
    with torch.no_grad():
        for number, name in enumerate((A, B, C)):
            own = [t for key, t in model.named_parameters() if f".{name}." in key]
            for k, tensor in enumerate(own):
                tensor.copy_(wave(tensor, k + 10 * number, 0.5))
        for k, tensor in enumerate(t for key, t in model.named_parameters() if fill_fusion and ".a,b." in key):
            tensor.copy_(wave(tensor, k + 100, 0.5))
    return model


def text(block):
    return block if isinstance(block, str) else f"{type(block).__name__}({', '.join(map(text, block))})"


def main():
    print("""// What tests/reference/composition_values.py prints.
#pragma once

#include <map>
#include <string>
#include <vector>

/// By kind of adapter and composition: the logits times sin(i), and times cos(i), summed.
inline const std::map<std::string, std::map<std::string, std::vector<double>>> composition_values{""")
    for kind, config in KINDS.items():
        model = model_with(config)
        print(f'    {{"{kind}",\n     {{')
        for block in ALL if kind == "lora" else BOTTLENECK:
            # Stacked there, a LoRA reads what the one below adds, a parallel adapter replaces the one below: ours
            # add both. A Parallel of parallel adapters fails there.
            stacks = "Stack" in text(block) and not isinstance(block, Fuse)
            if kind in ("lora", "parallel") and (stacks or (kind == "parallel" and "Parallel" in text(block))):
                continue
            model.active_adapters = block
            with torch.no_grad():
                logits = model(IDS, attention_mask=MASK).logits.flatten()
            at = torch.arange(logits.numel(), dtype=torch.float64)
            sums = [(logits * f(at)).sum().item() for f in (torch.sin, torch.cos)]
            print(f'         {{"{text(block)}", {{{sums[0]:.12g}, {sums[1]:.12g}}}}},')
        print("     }},")
    print("};")


if __name__ == "__main__":
    main()
