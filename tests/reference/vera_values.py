"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_vera.cpp.

python3 vera_values.py needs torch and peft; as lycoris_values.py.
"""

import sys

import peft
import torch

from lora_values import fill
from lycoris_values import flat, layer_case, run


def config(**settings):
    return lambda: peft.VeraConfig(r=3, target_modules=["layer"], **settings)


def numbers():
    values = layer_case("linear", lambda: torch.nn.Linear(4, 3), config(), fill([2, 4], 5))
    settings = config(init_weights=False, projection_prng_key=7, d_initial=0.5)
    bare = torch.nn.Linear(4, 3, bias=False)
    return values | layer_case("random start", lambda: bare, settings, fill([2, 4], 5))


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.b = torch.nn.Linear(2, 5)

    def forward(self, x):
        return self.a(x), self.b(x[:, :2])


def shared(dtype=torch.float32):
    model = Two().to(dtype)
    return peft.get_peft_model(model, peft.VeraConfig(r=3, target_modules=["a", "b"], projection_prng_key=11))


def projections():
    buffers = dict(shared().named_buffers())
    rounded = dict(shared(torch.bfloat16).named_buffers())
    assert {b.dtype for b in rounded.values()} == {torch.float32}
    values = {}
    for name in ["vera_A", "vera_B"]:
        values[name] = flat([buffers[f"base_model.model.a.{name}.default"]])
        values[f"{name} of a bfloat16 base"] = flat([rounded[f"base_model.model.a.{name}.default"]])
    return values


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[1:],
            [
                ("test_vera.cpp", "VeRA equals Hugging Face's numbers", numbers()),
                ("test_vera.cpp", "VeRA draws its shared matrices as Hugging Face does", projections()),
            ],
        )
    )
