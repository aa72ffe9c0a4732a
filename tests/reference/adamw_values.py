"""Prints the reference values of tests/train/: python3 adamw_values.py (needs torch and transformers).

Updates: the AdamW of transformers before release 5, written out in double precision from its own description
(transformers/optimization.py of 4.x): moments, update with epsilon added to the root of the uncorrected second
moment, then decay of the updated weight. Beside it torch.optim.AdamW on the same gradients.
Schedules: transformers' functions, rates of an optimizer with two groups.
"""

import math

import torch
import transformers

VALUES = [0.5, -1.25, 2.0, 0.125]
SETTINGS = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)


def gradient(step, index):
    return math.sin(1.0 + step * 0.7 + index * 1.3) * (index + 1) * 0.1


def transformers_form(steps):
    beta1, beta2 = SETTINGS["betas"]
    p = torch.tensor(VALUES, dtype=torch.float64)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, steps + 1):
        g = torch.tensor([gradient(step, i) for i in range(len(VALUES))], dtype=torch.float64)
        m.mul_(beta1).add_(g, alpha=1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        size = SETTINGS["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        p.addcdiv_(m, v.sqrt().add_(SETTINGS["eps"]), value=-size)
        p.add_(p, alpha=-SETTINGS["lr"] * SETTINGS["weight_decay"])
    return p


def torch_form(steps):
    p = torch.nn.Parameter(torch.tensor(VALUES, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], **SETTINGS)
    for step in range(1, steps + 1):
        p.grad = torch.tensor([gradient(step, i) for i in range(len(VALUES))], dtype=torch.float64)
        optimizer.step()
    return p.detach()


def show(name, values):
    print(name, "{" + ", ".join(repr(float(v)) for v in values) + "}")


def rates(make):
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.3}, {"params": [b], "lr": 0.07}])
    schedule = make(optimizer)
    result = []
    for _ in range(12):
        result.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return result


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for steps in (1, 2, 20):
        show(f"transformers form, {steps} steps", transformers_form(steps))
        show(f"torch form, {steps} steps", torch_form(steps))
    schedules = {
        "constant, warmup 4": lambda o: transformers.get_constant_schedule_with_warmup(o, 4),
        "linear, warmup 3, total 10": lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 10),
        "linear, warmup 0, total 7": lambda o: transformers.get_linear_schedule_with_warmup(o, 0, 7),
        "cosine, warmup 3, total 10": lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, 10),
        "cosine, warmup 2, total 10, cycles 1.25": lambda o: transformers.get_cosine_schedule_with_warmup(o, 2, 10, 1.25),
    }
    for name, make in schedules.items():
        values = rates(make)
        show(name + ", group 0", [v[0] for v in values])
        show(name + ", group 1", [v[1] for v in values])


if __name__ == "__main__":
    main()
