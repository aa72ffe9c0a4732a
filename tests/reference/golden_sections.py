"""First 20 losses of head, BitFit and full on the ten-section task against recorded ones.

usage: golden_sections.py PROGRAM ENCODER DATA GOLDEN.json
DATA holds sections_train.tsv of `peft-make-data --task sections`; GOLDEN.json has for each method its "lr" and
"losses". The recorded rows are one day's package index: first_batch_labels tells whether this one has them too.
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import time

MASK = (1 << 64) - 1


def mix(h):
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = ((h ^ (h >> 33)) * factor) & MASK
    return h ^ (h >> 33)


def row_hash(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return mix(h)


def first_labels(rows, classes, batch):
    """Labels of the first batch of epoch 0 with seed 0."""
    rows = sorted(rows, key=lambda row: mix(row_hash(row[1]) ^ mix(1)))
    return [classes.index(label) for label, _ in rows[:batch]]


def losses_of(program, arguments, log, count):
    """The first losses of a run, which is stopped after them."""
    run = subprocess.Popen([program, *arguments, "--log", log], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    losses = []
    while len(losses) < count:
        time.sleep(0.5)
        ended = run.poll() is not None
        text = log.read_text() if log.exists() else ""
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        losses = [line["loss"] for line in lines if "task_loss" in line]
        if ended and len(losses) < count:
            sys.exit(run.stderr.read().decode())
    run.kill()
    run.wait()
    return losses[:count]


program, encoder, data, golden = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), json.load(open(sys.argv[4]))
lines = (data / "sections_train.tsv").read_text(encoding="utf-8").split("\n")[1:]
rows = [line.split("\t", 1) for line in lines if line][: golden["n"]]
if first_labels(rows, golden["classes"], golden["batch"]) != golden["first_batch_labels"]:
    print("skipped: this machine's package index is not the recorded one")
    sys.exit(77)
failed = False
with tempfile.TemporaryDirectory() as scratch:
    for method in ("head", "bitfit", "full"):
        rate = golden[method]["lr"] or golden["hlr"]
        arguments = ["train", "--model", encoder, "--train", data / "sections_train.tsv", "--train-rows", golden["n"],
                     "--method", method, "--epochs", golden["epochs"], "--batch-size", golden["batch"],
                     "--max-length", 48, "--lr", rate, "--head-lr", golden["hlr"], "--warmup", 15, "--clip", 0,
                     "--pooling", "mean", "--out", f"{scratch}/{method}"]
        log = pathlib.Path(scratch) / f"{method}.jsonl"
        recorded = golden[method]["losses"]
        losses = losses_of(program, [str(argument) for argument in arguments], log, len(recorded))
        largest = max(abs(ours - theirs) for ours, theirs in zip(losses, recorded))
        failed = failed or largest > 1e-4
        print(f"{method}: largest difference of {len(recorded)} losses {largest:.1e}")
sys.exit(1 if failed else 0)
