"""peft-glue on a tiny model and tiny data in GLUE's layout: the table, what is skipped, resuming, wrong input."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_glue import make_data
from tiny_model import make_family, make_model

PROGRAM = os.environ.get("PEFT_GLUE")
if not PROGRAM or not os.access(PROGRAM, os.X_OK):
    print("skipped: PEFT_GLUE names no program")
    sys.exit(77)


def run(*arguments):
    return subprocess.run([PROGRAM, *map(str, arguments), "--threads", "1"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=300)


def good(*arguments):
    done = run(*arguments)
    assert done.returncode == 0, f"exit {done.returncode} of {arguments}\n{done.stderr}"
    return done


def bad(*arguments, says):
    done = run(*arguments)
    assert done.returncode in (1, 2), f"exit {done.returncode} of {arguments}\n{done.stderr}"
    for text in says:
        assert text in done.stderr, f"'{text}' is not in\n{done.stderr}"


def test_table_and_resume(folder, model, data):
    out = folder / "out"
    arguments = ["--data", data, "--model", model, "--out", out, "--seeds", 2, "--batch-size", 8, "--epochs", 2,
                 "--method", "head", "--method", "lora:rank=2,lr=1e-2", "--method", "increlora:target_rank=2,lr=1e-2"]
    first = good(*arguments)
    for absent in ["SST-2", "MRPC", "QQP", "MNLI", "QNLI", "WNLI"]:
        assert f"{absent}: skipped" in first.stderr, first.stderr
    for column in ["CoLA Matthews", "STS-B Pearson", "STS-B Spearman", "RTE accuracy", "average", "±"]:
        assert column in first.stdout, first.stdout
    assert (out / "table.txt").read_text() == first.stdout
    assert (out / "table.md").read_text().startswith("| method |")
    with open(out / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * 2 * (1 + 2 + 1)
    assert all(line["best_step"] and int(line["trained_with_head"]) > 0 for line in table)
    heads = {line["task"]: line for line in table if line["method"] == "head"}
    pooler = 16 * 16 + 16
    assert heads["STS-B"]["trained_with_head"] == str(pooler + 17), heads
    assert heads["RTE"]["trained_with_head"] == str(pooler + 34), heads
    assert all(line["trained"] == "0" for line in heads.values())
    cells = sorted((out / "cells").rglob("*.json"))
    assert len(cells) == 3 * 3 * 2
    cell = json.loads((out / "cells" / "CoLA" / "lora-0.json").read_text())
    steps = [point["step"] for point in cell["result"]["curve"]]
    assert steps == [5, 10], steps  # every epoch
    assert (out / "best" / "CoLA" / "lora-0" / "adapter_config.json").exists()

    # What is finished stays; what is not is run again, and comes out the same.
    kept, lost = cells[0], out / "cells" / "RTE" / "increlora-1.json"
    before, result = kept.stat().st_mtime_ns, json.loads(lost.read_text())["result"]
    lost.unlink()
    again = good(*arguments)
    assert again.stderr.count(" of 18: ") == 1, again.stderr
    assert kept.stat().st_mtime_ns == before
    repeated = json.loads(lost.read_text())["result"]
    assert repeated["curve"] == result["curve"] and repeated["last_loss"] == result["last_loss"]
    assert (good(*arguments, "--report")).stdout == (out / "table.txt").read_text()

    # Settings that differ are an error, and nothing is trained.
    bad(*arguments, "--max-length", 16, says=["CoLA/head-0.json", "recipe.max_length was 128", "but is 16 now"])
    bad(*[16 if x == 8 else x for x in arguments], says=["recipe.batch_size was 8"])
    (data / "RTE" / "dev.tsv").write_text((data / "RTE" / "dev.tsv").read_text() + "99\ta\tb\tentailment\n")
    bad(*arguments, says=["RTE/head-0.json", "data was"])
    make_data(data)
    other = make_model(folder / "other", seed=2)
    bad(*[other if x == model else x for x in arguments], says=["CoLA/head-0.json", "model was"])


def test_eval_every_and_rows(folder, model, data):
    out = folder / "often"
    good("--data", data, "--model", model, "--out", out, "--seeds", 1, "--batch-size", 8, "--epochs", 1, "--task",
         "cola", "--method", "bitfit", "--rows", "CoLA=33", "--eval-every", 2, "--no-best")
    cell = json.loads((out / "cells" / "CoLA" / "bitfit-0.json").read_text())
    assert [point["step"] for point in cell["result"]["curve"]] == [2, 4, 5]
    assert not (out / "best").exists()


def test_stop(folder, model, data):
    """SIGTERM reaches the process that trains, and nothing is left running."""
    done = subprocess.Popen([PROGRAM, "--data", data, "--model", model, "--out", folder / "stopped", "--seeds", "1",
                             "--epochs", "1000000", "--task", "CoLA", "--method", "lora", "--threads", "1",
                             "--eval-every", "1"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)
    adapter = folder / "stopped" / "best" / "CoLA" / "lora-0" / "adapter_config.json"
    while not adapter.exists():
        assert done.poll() is None, done.stdout.read()
        time.sleep(0.05)
    done.terminate()
    said = done.communicate(timeout=300)[0]  # returns when all who hold the pipe have ended
    assert done.returncode == 128 + signal.SIGTERM and "was stopped" in said, (done.returncode, said)
    assert not list((folder / "stopped").rglob("lora-0.json"))


def test_other_family(folder, data):
    """RoBERTa's head has two layers, and its positions begin after that of padding."""
    model = make_model(folder / "roberta", positions=41)
    settings = json.loads((folder / "roberta" / "config.json").read_text())
    (folder / "roberta" / "config.json").write_text(
        json.dumps(settings | {"model_type": "roberta", "architectures": ["RobertaModel"]}))
    out = folder / "of_roberta"
    arguments = ["--data", data, "--model", model, "--out", out, "--seeds", 1, "--batch-size", 8, "--epochs", 1,
                 "--task", "RTE", "--method", "head", "--method", "lora"]
    good(*arguments)
    for method in ["head", "lora"]:
        cell = json.loads((out / "cells" / "RTE" / f"{method}-0.json").read_text())
        assert cell["result"]["head_weights"] == 16 * 16 + 16 + 2 * 16 + 2, cell
        assert cell["settings"]["recipe"]["max_length"] == 40, cell
    bad(*arguments, "--max-length", 41, says=["--max-length must be at most 40"])


def test_heads_are_not_adapted(folder, data):
    """Targets that find layers of the head leave it to the copy that trains whole, so that Python can read the file."""
    for family, head in [("roberta", ["classifier"]), ("deberta-v2", ["pooler", "classifier"])]:
        model = make_family(folder / f"{family}-3", family, labels=2)
        out = folder / f"of_{family}"
        good("--data", data, "--model", model, "--out", out, "--seeds", 1, "--batch-size", 8, "--epochs", 2, "--task",
             "RTE", "--method", "adalora", "--method", "bitfit:terms=[query]", "--method", "ln_tuning")
        settings = json.loads((out / "best" / "RTE" / "adalora-0" / "adapter_config.json").read_text())
        assert settings["peft_type"] == "ADALORA", settings
        assert all(any(name.startswith(path) for name in settings["modules_to_save"]) for path in head), settings
        cell = json.loads((out / "cells" / "RTE" / "bitfit-0.json").read_text())
        assert cell["result"]["other_weights"] == 2 * 16, cell


def test_wrong_input(folder, model, data):
    out = folder / "never"
    common = ["--model", model, "--out", out, "--method", "head", "--seeds", 1]
    wrong = folder / "wrong"
    make_data(wrong)
    (wrong / "QNLI").mkdir()
    for split in ["train", "dev"]:
        (wrong / "QNLI" / f"{split}.tsv").write_text((wrong / "RTE" / f"{split}.tsv").read_text())
    bad("--data", wrong, *common, "--task", "QNLI",
        says=["QNLI/train.tsv", "expected the columns of QNLI (index, question, sentence, label)",
              "found index, sentence1, sentence2, label, those of RTE and WNLI"])
    (wrong / "WNLI").mkdir()
    for split in ["train", "dev"]:
        (wrong / "WNLI" / f"{split}.tsv").write_text((wrong / "RTE" / f"{split}.tsv").read_text())
    bad("--data", wrong, *common, "--task", "WNLI", says=["label must be one of WNLI's (0, 1), but got"])
    (wrong / "CoLA" / "dev.tsv").write_text("gj04\t1\t\ta cat\ngj04\t1\t\ta dog\n")
    bad("--data", wrong, *common, "--task", "CoLA",
        says=["CoLA/dev.tsv: Matthews is undefined on this data", "every row is of class 1"])
    lines = (wrong / "STS-B" / "dev.tsv").read_text().splitlines()
    same = [line.rsplit("\t", 1)[0] + "\t2.5" for line in lines[1:]]
    (wrong / "STS-B" / "dev.tsv").write_text("\n".join(lines[:1] + same) + "\n")
    bad("--data", wrong, *common, "--task", "STS-B", says=["Pearson is undefined on this data", "2.5"])
    bad("--data", wrong, *common, "--task", "MNLI,QQP", says=["has none of the tasks", "MNLI: skipped"])
    bad("--data", folder / "nowhere", *common, says=["--data: there is no folder"])
    bad("--data", data, *common, "--task", "COLLA", says=["no task 'COLLA'; nearest: 'CoLA'"])
    bad("--data", data, "--model", model, "--out", out, "--method", "loro", says=["no method 'loro'"])
    bad("--data", data, *common, "--preset", "published", says=["no published recipe of head"])
    make_data(wrong)
    for split in ["train", "dev"]:
        (wrong / "WNLI" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n1\tc\td\t1\n")
    bad("--data", wrong, "--model", model, "--out", out, "--preset", "published", "--method", "lora", "--task", "WNLI",
        says=["WNLI lora: skipped: it has no published recipe", "no method has a published recipe"])
    python = ["--data", data, "--model", model, "--out", out, "--peer", sys.executable]
    bad(*python, "--method", "lora:dropout=0.1", says=["--peer needs methods without dropout"])
    bad(*python, "--method", "lora:lora_plus=16", says=["--peer needs methods with one rate"])
    bad(*python, "--preset", "published", "--method", "lora", "--task", "CoLA", says=["without dropout"])
    other = make_model(folder / "gpt2")
    settings = json.loads((folder / "gpt2" / "config.json").read_text())
    (folder / "gpt2" / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    bad("--data", data, "--model", other, "--out", out, "--method", "head", "--task", "RTE", says=["gpt2"])
    (folder / "gpt2" / "config.json").write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] - 1}))
    bad("--data", data, "--model", other, "--out", out, "--method", "head", "--task", "RTE", says=["has 74 tokens, but the model only 73"])
    bad("--data", data, *common, "--rows", "RTE=0", says=["--rows", "RTE=0"])
    three = make_model(folder / "three", labels=3)
    bad("--data", data, "--model", three, "--out", out, "--method", "head", "--seeds", 1, "--task", "RTE",
        says=["classifier.weight"])
    assert not out.exists(), list(out.rglob("*"))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    model = make_model(folder / "model")
    data = make_data(folder / "data")
    test_table_and_resume(folder, model, data)
    test_eval_every_and_rows(folder, model, data)
    test_stop(folder, model, data)
    test_other_family(folder, data)
    test_heads_are_not_adapted(folder, data)
    test_wrong_input(folder, model, data)
print("peft-glue: passed")
