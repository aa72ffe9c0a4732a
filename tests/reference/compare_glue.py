"""Compares peft-glue's training with that of its Python peer, live, on tiny models of every family.

    python tests/reference/compare_glue.py [--program build/examples/peft-glue] [--seed N]

--program is by default the environment's PEFT_GLUE, --seed random. Over a task of classes and a regression: head, LoRA
and AdaLoRA begin at the same loss within 1e-5 and end at the same within 1e-3, with as many weights that train, the same
evaluations and a line in the table of pairs. More seeds are run where two programs differ, which is made so by a Python
that answers with other logits. The adapter of a best evaluation, opened by Python PEFT, gives the cell's score.

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
    import scipy.stats
    import torch
    import transformers
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def run(program, data, model, out, *more):
    done = subprocess.run([program, "--data", data, "--model", model, "--out", out, "--batch-size", "8", "--threads", "1",
                           *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=600)
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


def score(task, model, tokenizer, file):
    """The task's score on a dev.tsv, and whether the predictions are all alike."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[task == "STS-B":]]
    texts = [(row[-3], row[-2]) if task == "STS-B" else (row[3],) for row in rows]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(*text, return_tensors="pt", return_token_type_ids=len(text) == 2)).logits
                            for text in texts])
    if task == "STS-B":
        found, wanted = logits[:, 0].double().numpy(), [float(row[-1]) for row in rows]
        values = [scipy.stats.pearsonr(found, wanted)[0], scipy.stats.spearmanr(found, wanted)[0]]
        return sum(values) / 2, False
    found, wanted = logits.argmax(1).double(), torch.tensor([float(row[1]) for row in rows]).double()
    alike = bool((found == found[0]).all())
    return 0.0 if alike else torch.corrcoef(torch.stack([found, wanted]))[0, 1].item(), alike


def compare_best(data, base, out):
    """Every adapter in `out/best`, opened by Python PEFT, gives its cell's score."""
    compared = 0
    for folder in sorted(out.glob("best/*/*")):
        task = folder.parent.name
        cell = json.loads((out / "cells" / task / f"{folder.name}.json").read_text())["result"]
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{base}/tokenizer.json")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1 + (task == "CoLA"))
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        value, alike = score(task, model, tokenizer, data / task / "dev.tsv")
        print(f"{out.name} {task} {folder.name}: score {cell['score']:.6f}, opened by Python {value:.6f}")
        assert abs(value - cell["score"]) < 1e-4 and not alike, folder
        compared += 1
    return compared


def compare(program, folder, seed):
    data = make_data(folder / "data")
    models = {"bert": make_model(folder / "bert"), "roberta": make_family(folder / "roberta", "roberta", labels=2),
              "deberta-v2": make_family(folder / "deberta", "deberta-v2", labels=2)}
    peer = ("--peer", sys.executable, "--epochs", "2")
    for name, model in models.items():
        # Of a folder that has a head of two, a regression would be another model.
        tasks = "CoLA,STS-B" if name == "bert" else "CoLA"
        methods = [argument for method in ("head", "lora:rank=2", "adalora:init_rank=3,target_rank=2")
                   for argument in ("--method", method)]
        done = run(program, data, model, folder / f"of-{name}", *peer, "--task", tasks, *methods, "--seeds", "1",
                   "--first-seed", str(seed), "--more-seeds", "0", "--no-best")
        assert compare_cells(folder / f"of-{name}", name) == 3 * len(tasks.split(",")), name
        for task in tasks.split(","):
            assert f"{task}, lora" in done.stdout and "verdict" in done.stdout, done.stdout
        # With rates at which these models learn the task, so that not all predictions are alike.
        run(program, data, model, folder / f"best-{name}", "--task", "CoLA", "--method", "lora:rank=2,lr=2e-2",
            "--epochs", "12", "--seeds", "1")
        assert compare_best(data, model, folder / f"best-{name}") == 1, name
    run(program, data, models["bert"], folder / "best-regression", "--task", "STS-B", *methods[2:], "--epochs", "2",
        "--seeds", "1")
    assert compare_best(data, models["bert"], folder / "best-regression") == 2

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
    done = run(program, data, models["bert"], folder / "differ", "--peer", other, "--task", "STS-B", "--method",
               "lora:rank=2", "--epochs", "2", "--seeds", "2", "--more-seeds", "1", "--no-best")
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
