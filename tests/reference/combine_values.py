"""Runs Hugging Face PEFT's add_weighted_adapter and checks or prints the numbers of tests/model/test_combine.cpp.

python3 combine_values.py [test_combine.cpp] needs torch and peft. Every list of numbers in the test case "combine
equals Hugging Face's add_weighted_adapter" must be one computed here, and the reverse. With --print they are printed
instead. Values are the changes of the weight by the new adapter: in double precision, those with random pruning in
float32 after manual_seed(5).
"""

import pathlib
import sys

import peft
import torch

from lora_values import One, compare, fill

TEST = pathlib.Path(__file__).resolve().parent.parent / "model" / "test_combine.cpp"
LAYERS = {
    "linear": lambda: torch.nn.Linear(4, 3),
    "embedding": lambda: torch.nn.Embedding(5, 3),
    "convolution": lambda: torch.nn.Conv2d(2, 3, 2),
}
PLAIN = ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
RANDOM = ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"]


def change(make, kind, **settings):
    """Of adapters a (r 2, alpha 3) and b (r 2, alpha 4), with weights 0.7 and -0.2."""
    torch.set_default_dtype(torch.float32 if kind in RANDOM else torch.float64)
    model = peft.get_peft_model(One(make()), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"]))
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, start in (("a", 3), ("b", 7)):
            if isinstance(layer.base_layer, torch.nn.Embedding):
                factors = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            else:
                factors = layer.lora_A[name].weight, layer.lora_B[name].weight
            for k, factor in enumerate(factors):
                factor.copy_(fill(factor.shape, start + k))
    torch.manual_seed(5)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "new", combination_type=kind, density=0.5, **settings)
    return layer.get_delta_weight("new")


def changes():
    values = {}
    for name, make in LAYERS.items():
        for kind in PLAIN if name == "linear" else ["linear", "svd", "ties_svd"]:
            values[f"{name}: {kind}"] = change(make, kind)
        for kind in RANDOM if name == "linear" else ["dare_linear", "dare_ties_svd"]:
            values[f"{name}: {kind}"] = change(make, kind)
    make = LAYERS["linear"]
    values["svd, rank 1"] = change(make, "svd", svd_rank=1)
    values["svd, clamped at 0.8"] = change(make, "svd", svd_clamp=0.8)
    values["ties, signs by frequency"] = change(make, "ties", majority_sign_method="frequency")
    return values


def main(arguments):
    torch.set_num_threads(1)
    if arguments == ["--print"]:
        for name, tensor in changes().items():
            print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))
        return 0
    source = pathlib.Path(arguments[0] if arguments else TEST).read_text()
    print(f"peft {peft.__version__}, torch {torch.__version__}")
    return 1 if compare(source, "combine equals Hugging Face's add_weighted_adapter", changes(), 2e-7) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
