"""Compares peft-glue's training with that of its Python peer, live, on tiny models of every family.

    python tests/reference/compare_glue.py [--program build/examples/peft-glue] [--seed N]

--program is by default the environment's PEFT_GLUE, --seed random. Over a task of classes and a regression: head, LoRA
and AdaLoRA begin at the same loss within 1e-5 and end at the same within 1e-3, with as many weights that train, the same
evaluations and a line in the table of pairs. More seeds are run where two programs differ, which is made so by a Python
that answers with other logits.

Exit status 0 only when nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import json
import os
import random
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "finetune"))
from tiny_glue import make_data
from tiny_model import make_family, make_model

# Threads that wait in a loop take the time of those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import peft
    import torch
    import transformers
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def run(program, data, model, out, python, *more):
    done = subprocess.run([program, "--data", data, "--model", model, "--out", out, "--peer", python, "--batch-size",
                           "8", "--epochs", "2", "--threads", "1", "--no-best", *more], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    return done


def compare_cells(out, name):
    compared = 0
    for theirs in sorted((out / "cells").rglob("python-*.json")):
        a = json.loads((theirs.parent / theirs.name.removeprefix("python-")).read_text())["result"]
        b = json.loads(theirs.read_text())["result"]
        title = f"{name} {theirs.parent.name} {theirs.stem}"
        for key, tolerance in [("first_loss", 1e-5), ("last_loss", 1e-3)]:
            difference = abs(a[key] - b[key]) / max(1.0, abs(b[key]))
            print(f"{title}: {key} {a[key]:.6f}, Python {b[key]:.6f}: {difference:.1e}")
            assert difference < tolerance, title
        for key in ("head_weights", "other_weights", "steps"):
            assert a[key] == b[key], f"{title}: {key} {a[key]}, Python {b[key]}"
        assert [point["step"] for point in a["curve"]] == [point["step"] for point in b["curve"]], title
        compared += 1
    return compared


def compare(program, folder, seed):
    data = make_data(folder / "data")
    models = {"bert": make_model(folder / "bert"), "roberta": make_family(folder / "roberta", "roberta", labels=2),
              "deberta-v2": make_family(folder / "deberta", "deberta-v2", labels=2)}
    for name, model in models.items():
        # Of a folder that has a head of two, a regression would be another model.
        tasks = "CoLA,STS-B" if name == "bert" else "CoLA"
        methods = [argument for method in ("head", "lora:rank=2", "adalora:init_rank=3,target_rank=2")
                   for argument in ("--method", method)]
        done = run(program, data, model, folder / f"of-{name}", sys.executable, "--task", tasks, *methods, "--seeds", "1",
                   "--first-seed", str(seed), "--more-seeds", "0")
        assert compare_cells(folder / f"of-{name}", name) == 3 * len(tasks.split(",")), name
        for task in tasks.split(","):
            assert f"{task}, lora" in done.stdout and "verdict" in done.stdout, done.stdout

    other = folder / "other-python"
    other.write_text(f'''#!/bin/sh
"{sys.executable}" "$@" || exit
exec "{sys.executable}" - "$2" <<'PY'
import glob, sys, torch
from safetensors.torch import load_file, save_file
for path in glob.glob(sys.argv[1] + "/logits.safetensors"):
    save_file({{name: -value.contiguous() for name, value in load_file(path).items()}}, path)
PY
''')
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    done = run(program, data, models["bert"], folder / "differ", str(other), "--task", "STS-B", "--method", "lora:rank=2",
               "--seeds", "2", "--more-seeds", "1")
    assert "2 cells more, of 1 more seeds, where the two programs differ" in done.stderr, done.stderr
    assert len(list((folder / "differ" / "cells").rglob("*.json"))) == 6 and "differ" in done.stdout, done.stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=os.environ.get("PEFT_GLUE"))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    if not arguments.program:
        parser.error("--program or PEFT_GLUE must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, peft {peft.__version__}, "
          f"transformers {transformers.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.program, Path(folder), arguments.seed)
    print("peft-glue and its peer: passed")


main()
