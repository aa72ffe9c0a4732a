"""peft-survey on a tiny model: its rows, its counts by hand, its files, its words for wrong input.

    PEFT_SURVEY=build/examples/peft-survey python3 tests/finetune/test_survey.py [PATTERN]

Needs Python's own library only. Nothing here looks at a time: a busy machine must not fail a test.
"""

import csv
import functools
import json
import os
import subprocess
import sys
import tempfile

from run_tests import check, run_tests, tests_of
from tiny_model import VOCABULARY, make_family, make_model

PROGRAM = os.environ.get("PEFT_SURVEY")

WIDTH, INNER, LAYERS, POSITIONS, LABELS = 32, 64, 2, 130, 3
# What fits no model this small by default.
CHANGED = {"compacter": "compacter:reduction_factor=8", "compacter++": "compacter++:reduction_factor=8",
           "rand_uniform": "rand_uniform:count=500", "hifi": "hifi:heads=1"}


def run(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=900)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def good(*arguments):
    done = run(*arguments)
    check(done.returncode == 0, f"exit {done.returncode} of {arguments}\n{done.stderr[-3000:]}")
    return done


def bad(*arguments):
    done = run(*arguments)
    check(done.returncode != 0, f"{arguments} must be refused")
    return done.stderr + done.stdout


def model_in(root):
    folder = os.path.join(root, "model")
    if not os.path.exists(folder):
        make_model(folder, hidden=WIDTH, intermediate=INNER, layers=LAYERS, positions=POSITIONS, labels=LABELS)
    return folder


def survey(root, *methods, model=None):
    """({method without keys: row}, folder, what was printed)"""
    out = os.path.join(root, str(len(os.listdir(root))))
    done = good(model or model_in(root), "--methods", *methods, "--batch", 2, "--length", 8, "--repeat", 1, "--out", out)
    with open(os.path.join(out, "survey.json"), encoding="utf-8") as file:
        rows = json.load(file)["methods"]
    check([row["method"] for row in rows] == list(methods), "a row for each method, in their order")
    return {row["method"].split(":")[0]: row for row in rows}, out, done.stdout


def hand_counts():
    """{method: (trains, changed or None, rank or None)}; rank "full": the largest, "vectors": no matrix."""
    d, f, n = WIDTH, INNER, LAYERS
    square = 2 * n  # matrices of query and value
    block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    words = len(VOCABULARY) + POSITIONS + 2
    base = words * d + 2 * d + n * block + d * d + d
    bottleneck = lambda m: 2 * d * m + m + d
    return {
        "lora": (square * 2 * 8 * d, square * d * d, 8),
        "adalora": (square * 12 * (2 * d + 1), None, None),
        "increlora": (square * 8 * (2 * d + 1), None, None),
        "dora": (square * (2 * 8 * d + d), square * d * d, "full"),
        "loha": (square * 4 * 8 * d, square * d * d, "full"),
        "vera": (square * (256 + d), square * d * d, "full"),
        "oft": (square * 32 * 31 // 2, square * d * d, "full"),
        "houlsby": (2 * n * bottleneck(d // 16), None, None),
        "pfeiffer": (n * bottleneck(d // 16), None, None),
        "parallel": (n * bottleneck(d // 2), None, None),
        "scaled_parallel": (n * (bottleneck(d // 2) + 1), None, None),
        "adapter_plus": (n * (bottleneck(1) + d), None, None),
        "fusion": (n * (3 * d * d + 2 * d), None, None),
        "prompt_tuning": (20 * d, None, None),
        "p_tuning": (20 * d + 3 * (d * d + d), None, None),
        "prefix": (20 * 2 * n * d, None, None),
        "trainable_tokens": (10 * d, 10 * d, 10),
        "ia3": (n * (3 * d + f), n * (3 * d * d + d * f + 2 * d), "full"),
        "ln_tuning": ((2 * n + 1) * 2 * d, (2 * n + 1) * 2 * d, "vectors"),
        "head": (LABELS * (d + 1), LABELS * (d + 1), "full"),
        "bitfit": (n * (7 * d + f) + 2 * d, n * (7 * d + f) + 2 * d, "vectors"),
        "top_layers": (block, block, "full"),
        "hifi": (n * 3 * (d // 2) * (d + 1), n * 3 * (d // 2) * (d + 1), d // 2),
        "full": (base, base, "full"),
    }


def test_every_method(root):
    names = [CHANGED.get(name.split(":")[0], name) for name in good("--list").stdout.split()]
    check(len(names) > 30, f"every method of peft-finetune: {names}")
    rows, out, printed = survey(root, *names)
    for name, row in rows.items():
        check(row["problem"] == "" and row["note"] == "", f"{name}: {row['problem']}{row['note']}")
        check(name in printed, f"the table names {name}")
        check(row["blocks"] == LAYERS, f"{name}: {row['blocks']} blocks")
        passed = {"head": 0, "top_layers": 1}.get(name, LAYERS)
        check(row["blocks_passed"] == passed, f"{name}: backward runs through {row['blocks_passed']} blocks")
        # Values, gradients and two moments of what trains.
        check(row["peak_bytes"] >= 16 * row["trainable"], f"{name}: {row['peak_bytes']} bytes")
        check(row["peak_bytes"] > row["kept_bytes"] > 0, f"{name}: the graph is a part of the peak")
        check(row["storage_bytes"] > 300, f"{name}: {row['storage_bytes']} bytes on disk")
        check((row["change"] is None) == (row["after_merging"] is None), f"{name}: merges or does not")
        if row["change"]:
            check(row["same_operations"], f"{name}: merged, it runs what the frozen model runs")
    for name, (trains, changed, rank) in hand_counts().items():
        row = rows[name]
        check(row["trainable"] == trains, f"{name}: {row['trainable']} train, by hand {trains}")
        if changed is None:
            continue
        change = row["change"]
        check(change["entries"] == changed, f"{name}: {change['entries']} change, by hand {changed}")
        if rank == "vectors":
            check(change["matrices"] == 0 and change["vectors"] > 0, f"{name}: {change}")
        elif rank == "full":
            check(change["full"] == change["matrices"] > 0, f"{name}: {change}")
        else:
            check(change["rank_least"] == change["rank_most"] == rank, f"{name}: {change}")
    learned = [rows[name]["change"] for name in ("adalora", "increlora")]
    check(learned[0]["rank_most"] <= 12 and learned[1]["rank_least"] >= 1, f"learned ranks: {learned}")
    check(rows["rand_uniform"]["change"]["entries"] == rows["rand_uniform"]["trainable"] <= 500, rows["rand_uniform"])
    check(rows["mam"]["change"] is None, "MAM does not merge")

    with open(os.path.join(out, "survey.csv"), encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    check([line["method"] for line in table] == names, "a line of the CSV for each method")
    for line in table:
        row = rows[line["method"].split(":")[0]]
        check(None not in line and None not in line.values(), f"as many fields as names: {line}")
        check(int(line["trainable"]) == row["trainable"] and int(line["storage_bytes"]) == row["storage_bytes"], line)
        check(line["changed"] == (str(row["change"]["entries"]) if row["change"] else ""), line)
    with open(os.path.join(out, "survey.md"), encoding="utf-8") as file:
        lines = [line for line in file.read().splitlines() if line.startswith("|")]
    check(len(lines) == len(names) + 2, f"{len(lines)} lines of Markdown")
    check(len({line.count("|") for line in lines}) == 1, "as many cells in each")


def test_other_families(root):
    """By default each method goes to the family's own layers, and never into the head."""
    names = ["lora", "adalora", "increlora", "ia3", "ln_tuning", "houlsby", "prefix", "unipelt", "top_layers", "full",
             "bitfit:terms=[query,intermediate]", "hifi:heads=1", "fish", "magnitude", "rand_row_col"]
    for family in ("roberta", "deberta-v2"):
        model = make_family(os.path.join(root, family), family, hidden=WIDTH, intermediate=INNER, layers=LAYERS)
        rows, _, _ = survey(root, *names, model=model)
        for name, row in rows.items():
            check(row["problem"] == "" and row["note"] == "", f"{family} {name}: {row['problem']}{row['note']}")
        for name, each in [("lora", 2), ("adalora", 6), ("ia3", 4), ("hifi", 3)]:
            matrices = rows[name]["change"]["matrices"]
            check(matrices == each * LAYERS, f"{family} {name}: {matrices} matrices change, by hand {each * LAYERS}")
        norms = 2 * LAYERS + (1 if family == "roberta" else 2)  # of the distances
        check(rows["ln_tuning"]["trainable"] == norms * 2 * WIDTH, f"{family}: {rows['ln_tuning']['trainable']}")
        biases = LAYERS * (WIDTH + INNER)  # DeBERTa's pooler belongs to the head
        check(rows["bitfit"]["trainable"] == biases, f"{family}: {rows['bitfit']['trainable']} biases, by hand {biases}")


def test_same_figures_again(root):
    figures = lambda row: {key: row[key] for key in ("storage_bytes", "peak_bytes", "kept_bytes", "trainable", "change")}
    alone = survey(root, "lora")[0]["lora"]
    after = survey(root, "full", "lora")[0]["lora"]
    check(figures(alone) == figures(after), f"{figures(alone)} alone, {figures(after)} after another")


def test_keys(root):
    rows, _, printed = survey(root, "lora:rank=4,targets=[query,intermediate.dense]", "ia3")
    change = rows["lora"]["change"]
    check(rows["lora"]["trainable"] == LAYERS * 4 * (3 * WIDTH + INNER), rows["lora"]["trainable"])
    check(change["rank_least"] == change["rank_most"] == 4, change)
    check("lora: as lora:rank=4" in printed, "what the keys were")


def test_unsuitable_methods_are_listed(root):
    rows, out, printed = survey(root, "hifi", "lora", "rand_uniform")
    check("heads must be at most the 2" in rows["hifi"]["problem"], rows["hifi"])
    check("count" in rows["rand_uniform"]["problem"] and rows["lora"]["problem"] == "", rows)
    check("hifi: not measured: " in printed, printed)
    with open(os.path.join(out, "survey.csv"), encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    check("heads" in table[0]["problem"] and table[1]["problem"] == "", table)


def test_published_counts(_):
    printed = good("--published").stdout
    ours = {"HAdapter, 32 channels": 1198848, "PAdapter, 64 channels": 1189632, "LoRA, rank 8": 1327104,
            "HAdapter, 16 channels": 608640, "PAdapter, 32 channels": 599424, "HAdapter, 8 channels": 313536,
            "PAdapter, 16 channels": 304320, "LoRA, rank 2": 331776, "BitFit": 102912}
    for name, count in ours.items():
        line = next(line for line in printed.splitlines() if line.startswith(name + " "))
        check(f" {count:,} ".replace(",", " ") in line, f"{name}, by hand {count}: {line}")
        check(line.endswith("no" if name in ("HAdapter, 32 channels", "PAdapter, 64 channels") else "yes"), line)
    for name in ("AdaLoRA, mean rank 8", "AdaLoRA, mean rank 2", "IncreLoRA, mean rank 8", "IncreLoRA, mean rank 2"):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        check(" to " in line and line.endswith("yes"), line)


def test_wrong_input(root):
    model = model_in(root)
    check("lora" in bad(model, "--methods", "lorra"), "the nearest method")
    check("rang" in bad(model, "--methods", "lora:rang=3"), "an unknown key")
    check("init" in bad(model, "--methods", "lora:init=eva"), "a start from data")
    check("fusion" in bad(model, "--methods", "fusion:key=false"), "keys of a fusion")
    check("no-model" in bad(os.path.join(root, "no-model")), "a folder that is not there")
    check("--batch" in bad(model, "--batch", 0), "no texts")
    check("130" in bad(model, "--length", 1000, "--methods", "lora"), "texts too long")
    check("model" in bad(), "no model")
    other = make_model(os.path.join(root, "other-family"))
    with open(os.path.join(other, "config.json"), encoding="utf-8") as file:
        settings = json.load(file)
    with open(os.path.join(other, "config.json"), "w", encoding="utf-8") as file:
        json.dump(settings | {"model_type": "t5"}, file)
    check("t5" in bad(other, "--methods", "lora"), "a folder of another family")


def main():
    if not PROGRAM or not os.access(PROGRAM, os.X_OK):
        print("skipped: PEFT_SURVEY names no program")
        return 77
    with tempfile.TemporaryDirectory() as root:
        return run_tests([(name, functools.partial(test, root)) for name, test in tests_of(globals())], at_once=1)


if __name__ == "__main__":
    sys.exit(main())
