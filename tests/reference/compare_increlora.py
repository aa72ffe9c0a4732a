"""Compares training with the author's IncreLoRA, live, step by step.

    python tests/reference/compare_increlora.py [--source DIR] [--tool build/tests/increlora-tool] [--only NAME] [--seed N]

--source is a checkout of github.com/FeiyuZhang98/IncreLoRA, by default the environment's PEFT_INCRELORA_SOURCE; --tool is
by default PEFT_INCRELORA_TOOL, --seed random. Both sides train the same nets from the same start and seed in float64. In
every step loss, scores, importance, ranks, chunks, the learning rate of every group and E must agree, at the end every
weight, within 1e-8 of the largest; the reserve's random draws are not given but must agree too.

Exit status 0 only when nothing differs; 77 where source, tool or Python's torch is missing.
"""

import argparse
import json
import os
import random
import subprocess
import sys

try:
    import torch
    from increlora_values import Author, golden, trace
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

TOLERANCE = 1e-8
# Options and optimizer beyond those of `golden`; uses, head, sizes and steps of the net.
CASES = {
    "the golden trace": dict(),
    "delta 2, both forms of growth": dict(incre_rank_num=2, target_rank=3, top_h=2, total=30, net="random"),
    "delta 4, published table, overshoot": dict(incre_rank_num=None, target_rank=8, top_h=2, total=40, net="random", layers=5),
    "no advance learning": dict(advance_learn=False, total=30, target_rank=3, net="random"),
    "no advance learning, delta 2, reached exactly": dict(advance_learn=False, incre_rank_num=2, top_h=1, total=30,
                                                          target_total_rank=9, net="random"),
    "one rate for all groups": dict(multi_lr=False, total=30, net="random"),
    "the former AdamW of transformers": dict(form="transformers", weight_decay=0.1, total=30, net="random"),
    "torch's AdamW with weight decay": dict(weight_decay=0.2, total=30, net="random", target_rank=3),
    "a trained head": dict(head=True, weight_decay=0.1, total=30, net="random", form="transformers"),
    "no clipping": dict(clip=0.0, total=30, net="random"),
    "clipping hard": dict(clip=0.01, total=30, net="random"),
    "no penalty": dict(reg_orth_coef=0.0, total=30, net="random"),
    "no penalty, wide betas": dict(reg_orth_coef=0.0, beta1=0.5, beta2=0.99, total=30, net="random", lr=0.02),
    "ties: all importances are zero at the first growth": dict(advance_learn=False, init_warmup=0, incre_interval=1, top_h=1,
                                                               target_rank=3, total=30, net="random"),
    "rank 3 at the start, alpha 0": dict(rank=3, alpha=0, target_rank=5, incre_rank_num=1, total=30, net="random"),
    "a layer used twice": dict(uses=[0, 1, 1, 2], total=30, net="random", reg_orth_coef=0.3),
    "dropout": dict(dropout=0.3, total=30, net="random"),
    "as published: warm-up = interval": dict(init_warmup=10, incre_interval=10, top_h=3, warmup=10, total=60, net="random",
                                             form="transformers", weight_decay=0.01, reg_orth_coef=0.3, alpha=32, lr=0.01,
                                             layers=4, incre_rank_num=1, target_rank=3),
    "interval 1, growth to the end": dict(init_warmup=0, incre_interval=1, top_h=2, total=30, target_rank=9, net="random"),
}


def make_job(case, seed):
    case = dict(case)
    net, head, uses, layers = (case.pop(key, absent) for key, absent in
                               [("net", "golden"), ("head", False), ("uses", None), ("layers", 3)])
    job = golden(**case)
    if net == "golden":
        return job
    torch.manual_seed(seed)
    rank, steps = job["options"]["rank"], job["optimizer"]["total"]
    widths = [4] + [random.randrange(3, 7) for _ in range(layers)] if uses is None else [4, 5, 5, 3]

    def layer(inputs, outputs):
        return dict(weight=(torch.randn(outputs, inputs) / 2).tolist(), bias=(torch.randn(outputs) / 5).tolist(),
                    A=(0.5 * torch.randn(rank, inputs)).tolist(), E=torch.zeros(rank, 1).tolist(),
                    B=(0.5 * torch.randn(outputs, rank)).tolist())

    job["layers"] = [layer(widths[i], widths[i + 1]) for i in range(layers)]
    job["uses"] = uses or list(range(layers))
    outputs = widths[-1]
    if head:
        job["head"] = {name: value for name, value in layer(widths[-1], 2).items() if name in ["weight", "bias"]}
        outputs = 2
    job["reserve"], job["seed"] = "draw", seed
    job["batches"] = [dict(x=torch.randn(6, 4).tolist(), target=torch.randn(6, outputs).tolist()) for _ in range(steps)]
    return job


def compare(ours, theirs, head, target):
    """The largest difference, relative to the largest value of its kind, and what the two disagree about first."""
    worst, first = 0.0, None
    if len(ours) != len(theirs):
        return float("inf"), f"{len(ours)} steps, expected {len(theirs)}"
    for t, (our, their) in enumerate(zip(ours, theirs)):
        if head:
            del their["rates"][1]  # his group without decay
        for key in their:
            if key == "score" and t and sum(theirs[t - 1]["rank"]) > target:
                continue  # after an overshoot nobody reads them, and ours are no longer taken
            a, b = our[key], their[key]
            if key in ["rank", "chunks"]:
                error = 0.0 if a == b else float("inf")
            else:
                pairs = ([(a[k], b[k]) for k in b] if isinstance(b, dict) else list(zip(a, b)) if key == "E" else
                         [(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b])])
                error = 0.0
                for x, y in pairs:
                    if len(x) != len(y):
                        error = float("inf")
                        break
                    x, y = torch.tensor(x), torch.tensor(y)
                    if y.numel():
                        scale = y.abs().max().clamp_min(1e-30 if key in ["score", "importance"] else 1e-3)
                        error = max(error, float((x - y).abs().max() / scale))
            worst = max(worst, error)
            if not error <= TOLERANCE and first is None:
                first = f"step {t}, {key}: {a}, expected {b}"
    return worst, first


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default=os.environ.get("PEFT_INCRELORA_SOURCE"))
    parser.add_argument("--tool", default=os.environ.get("PEFT_INCRELORA_TOOL"))
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    for name in ["source", "tool"]:
        if not getattr(arguments, name):
            print(f"skipped: neither --{name} nor PEFT_INCRELORA_{name.upper()} is given")
            return 77
    author = Author(arguments.source)
    torch.set_default_dtype(torch.float64)
    random.seed(arguments.seed)
    print(f"seed {arguments.seed}; torch {torch.__version__}", flush=True)
    jobs = {name: make_job(case, arguments.seed) for name, case in CASES.items() if arguments.only in name}
    done = subprocess.run([arguments.tool], input=json.dumps(list(jobs.values())), capture_output=True, text=True)
    if done.returncode != 0:
        print(f"the tool ended with {done.returncode}: {done.stderr[:2000]}")
        return 1
    failures, most = 0, 0.0
    for (name, job), ours in zip(jobs.items(), json.loads(done.stdout)):
        theirs = trace(author, job)
        target = job["options"]["target_total_rank"] or job["options"]["target_rank"] * len(job["layers"])
        reached = sum(theirs[-1]["rank"])
        worst, first = compare(ours, theirs, job["head"], target)
        most = max(most, worst)
        failures += first is not None
        print(f"{name}: {len(theirs)} steps, ranks {theirs[-1]['rank']} ({reached} of {target}), {len(theirs[-1]['rates'])} "
              f"groups: " + (f"FAILED: {first}" if first else f"agrees, largest difference {worst:.2g}"), flush=True)
    print(f"{len(jobs)} traces, {failures} failures, largest difference {most:.2g}")
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
