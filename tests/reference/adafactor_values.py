"""Prints the reference values of tests/train/test_adafactor.cpp: python3 adafactor_values.py (needs torch and
transformers).

A matrix and a vector after 1, 2 and 30 steps of transformers' Adafactor in double precision, on gradients made up
from sines; and, for comparison only, the matrix after 30 steps of torch.optim.Adafactor.
"""

import math

import torch
from transformers.optimization import Adafactor

SETTINGS = {
    "defaults": {},
    "warmup_init": dict(warmup_init=True),
    "external rate": dict(lr=0.02, relative_step=False, scale_parameter=False),
    "scaled rate": dict(lr=0.02, relative_step=False, clip_threshold=0.7, decay_rate=-0.6),
    "momentum and decay": dict(beta1=0.9, weight_decay=0.1, eps=(1e-20, 0.5)),
}


def sines(shape, *numbers):
    count = math.prod(shape)
    phase = sum(number * factor for number, factor in zip(numbers, (0.7, 2.1)))
    values = [math.sin(1.0 + phase + 1.3 * k) * (0.1 + 0.05 * k) for k in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def run(make, steps):
    matrix = torch.nn.Parameter(sines((3, 4), 5))
    vector = torch.nn.Parameter(sines((5,), 9))
    optimizer = make([matrix, vector])
    for step in range(1, steps + 1):
        matrix.grad, vector.grad = sines((3, 4), step, 1), sines((5,), step, 2)
        optimizer.step()
    return torch.cat([matrix.detach().flatten(), vector.detach()])


def show(name, values):
    print(name + ":\n{" + ", ".join(repr(float(value)) for value in values) + "}")


def main():
    for name, settings in SETTINGS.items():
        for steps in (1, 2, 30):
            show(f"{name}, {steps} steps", run(lambda p: Adafactor(p, **settings), steps))
    show("torch.optim.Adafactor, 30 steps", run(lambda p: torch.optim.Adafactor(p, weight_decay=0), 30))


if __name__ == "__main__":
    main()
