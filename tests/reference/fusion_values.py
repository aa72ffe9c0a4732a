"""Values for tests/methods/test_fusion.cpp: AdapterHub's fusion of two bottleneck adapters, in its variants.

Needs adapters 1.3.0. Model and fill are those of composition_values.py.
"""
import torch
from adapters import DynamicAdapterFusionConfig, StaticAdapterFusionConfig
from adapters.composition import Fuse
from composition_values import IDS, KINDS, MASK, model_with

VARIANTS = {
    "static": StaticAdapterFusionConfig(),
    "query before norm": DynamicAdapterFusionConfig(query_before_ln=True),
    "residual before": DynamicAdapterFusionConfig(residual_before=True),
    "value after softmax": DynamicAdapterFusionConfig(value_before_softmax=False),
    "temperature": DynamicAdapterFusionConfig(temperature=True),
    "value alone": DynamicAdapterFusionConfig(query=False, key=False),
}


def sums(logits):
    at = torch.arange(logits.numel(), dtype=torch.float64)
    return ", ".join(f"{(logits.flatten() * f(at)).sum().item():.12g}" for f in (torch.sin, torch.cos))


def main():
    for name, config in VARIANTS.items():
        model = model_with(KINDS["pfeiffer"], config)
        model.active_adapters = Fuse("a", "b")
        with torch.no_grad():
            for _ in range(3):
                logits = model(IDS, attention_mask=MASK).logits
        print(f'    {{"{name}", {{{sums(logits)}}}}},')

    model = model_with(KINDS["pfeiffer"], "dynamic", fill_fusion=False).float()
    fusion = model.bert.encoder.layer[1].output.adapter_fusion_layer["a,b"]
    for tensor in (fusion.query.weight, fusion.key.weight, fusion.value.weight):
        print("start", ", ".join(f"{x:.9g}" for x in tensor.flatten()[:3].tolist()))

    model = model_with(KINDS["pfeiffer"])
    model.train_adapter_fusion(Fuse("a", "b"))
    model.eval()
    loss = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 2, 1])).loss
    penalty = model.bert.get_fusion_regularization_loss()
    print(f"loss {loss.item():.12g} penalty {penalty.item():.12g}")
    (loss + penalty).backward()
    fusion = model.bert.encoder.layer[0].output.adapter_fusion_layer["a,b"]
    for tensor in (fusion.query.weight, fusion.key.bias, fusion.value.weight):
        print(f"gradient {sums(tensor.grad)}")
    print(sorted({name.split(".")[-2] for name, t in model.named_parameters() if t.requires_grad}))


main()
