"""Ends a training run with `kill -9` at random moments, some of them inside the write of a checkpoint, resumes it, and
asks for the same bytes as of an undisturbed run: last adapter, best adapter, settings and log.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_kill_resume.py [--kills 20] [--seed N]

It prints the moments. Needs Python's own library only.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import tiny_model as tiny

METHODS = [  # every way in which state is kept: with a controller's random draws, heads inside and outside the model
    ["--method", "lora:rank=4,dropout=0.2", "--targets", "query,value", "--dropout", "0.1"],
    ["--method", "lora:rank=2", "--targets", "query", "--pooling", "mean", "--accumulate", "2"],
    ["--method", "bitfit", "--dropout", "0.1"],
    ["--method", "full", "--pooling", "mean", "--schedule", "cosine", "--warmup", "0.1"],
    ["--method", "adalora:init_rank=4,target_rank=2,delta_t=2", "--targets", "query,value,dense"],
    ["--method", "dora:rank=4,init=pissa,lora_plus=4", "--targets", "query,value", "--pooling", "mean"],
    ["--method", "increlora:target_rank=4,init_warmup=4,incre_interval=3,top_h=3,reg_orth_coef=0.1", "--targets",
     "query,value,dense", "--pooling", "mean"],
    ["--method", "p_tuning:virtual_tokens=4,encoder=lstm", "--pooling", "mean"],  # a network no adapter's file has
]
STEPS = 40


def temporary_files(folder):
    """What is being written at this moment: files and folders whose names say so."""
    found = []
    for at, folders, files in os.walk(folder):
        found += [os.path.join(at, name) for name in folders + files if ".tmp-" in name]
    return found


def kept(out):
    """The bytes that must be the same, by name. Only the names of the folders in the settings are others."""
    result = {}
    for at, folders, names in os.walk(out):
        folders[:] = [name for name in folders if name != "checkpoint"]
        for name in names:
            path = os.path.join(at, name)
            with open(path, "rb") as file:
                content = file.read()
            result[os.path.relpath(path, out)] = content.replace(os.path.dirname(out).encode(), b"FOLDER")
    return result


def logged(path):
    """The log's lines. A step that was done twice must not be in it twice."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def last_step(path):
    """The last whole line's step in a log that may end anywhere."""
    step = 0
    if os.path.exists(path):
        with open(path, "rb") as file:
            for line in file.read().split(b"\n")[:-1]:
                try:
                    step = json.loads(line).get("step", step)
                except ValueError:
                    pass
    return step


class Run:
    """One training run, whose arguments stay the same."""

    def __init__(self, folder, model, data, method):
        self.folder = folder
        os.makedirs(folder)
        self.out, self.log = f"{folder}/out", f"{folder}/log.jsonl"
        self.arguments = ["train", "--model", model, "--train", data, "--test", data, "--steps", str(STEPS),
                          "--batch-size", "4", "--lr", "0.01", "--checkpoint-every", "1", "--seed", "3", "--threads", "1",
                          "--log", self.log, "--out", self.out, *method]

    def start(self, *more):
        with open(f"{self.folder}/stderr.txt", "ab") as messages:
            return subprocess.Popen([tiny.program(), *self.arguments, *more], stdout=subprocess.DEVNULL, stderr=messages)

    def finish(self):
        """Goes on to the end, from the beginning where no checkpoint was written yet."""
        how = "resumed" if os.path.isdir(f"{self.out}/checkpoint") else "begun again, there was no checkpoint"
        return tiny.run(*self.arguments, "--resume"), how


def kill_at_time(run, more, rng, seconds):
    process = run.start(*more)
    moment = rng.uniform(0.0, seconds)
    try:
        process.wait(moment)
        return process, f"{moment:.3f} s (had ended before)"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return process, f"{moment:.3f} s"


def kill_in_write(run, more, rng):
    """Kills when a temporary name shows up, after a random number of checkpoints."""
    process = run.start(*more)
    skip, seen, count = rng.randrange(0, 15), set(temporary_files(run.folder)), 0
    while process.poll() is None:
        # One process uses the same names again: a write is new when its name was gone in between.
        now = set(temporary_files(run.folder))
        count += len(now - seen)
        seen = now
        if count > skip:
            time.sleep(rng.choice([0, 0, 0.0002, 0.0005, 0.001]))
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    return process, f"write {count}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    tiny.program()
    print(f"seed {arguments.seed}")
    rng = random.Random(arguments.seed)
    failures, inside = [], 0
    with tempfile.TemporaryDirectory() as root:
        model = tiny.make_model(f"{root}/model")
        data = tiny.write_tsv(f"{root}/train.tsv", tiny.rows(24))
        reference = {}
        for i, method in enumerate(METHODS):
            run = Run(f"{root}/reference{i}", model, data, method)
            start = time.monotonic()
            done = tiny.run(*run.arguments)
            seconds = time.monotonic() - start
            if done.returncode != 0:
                print(f"the undisturbed run failed: {done.stderr}")
                return 1
            reference[i] = (seconds, kept(run.out), logged(run.log))
            if "best/" not in " ".join(reference[i][1]):
                failures.append("the undisturbed run has no best/")
        print("an undisturbed run takes " + ", ".join(f"{seconds:.2f} s" for seconds, _, _ in reference.values()))

        kills = turn = 0
        while kills < arguments.kills:
            i = turn % len(METHODS)
            seconds, expected, expected_log = reference[i]
            run = Run(f"{root}/run{turn}", model, data, METHODS[i])
            more, moments = [], []
            for _ in range(rng.choice([1, 1, 2])):  # a resumed run may be killed too
                process, moment = (kill_in_write(run, more, rng) if (turn // len(METHODS) + turn) % 2
                                   else kill_at_time(run, more, rng, 0.9 * seconds))
                killed = process.returncode == -signal.SIGKILL
                kills += killed
                half = [os.path.relpath(path, run.folder) for path in temporary_files(run.folder)
                        if f".tmp-{process.pid}" in path]
                inside += killed and bool(half)
                moments.append(f"{moment}, step {last_step(run.log)}" + (f", inside the write of {half[0]}" if half else ""))
                if not killed:
                    break
                more = ["--resume"]
            if process.returncode == 0:
                how = "had ended by itself"
            else:
                done, how = run.finish()
                if done.returncode != 0:
                    failures.append(f"{how}: exit {done.returncode}: {done.stderr}")
            problems = [f"{os.path.relpath(path, run.folder)} (left)" for path in temporary_files(run.folder)]
            found = kept(run.out) if os.path.isdir(run.out) else {}
            for name in sorted(set(expected) | set(found)):
                if expected.get(name) != found.get(name):
                    problems.append(name if name in expected and name in found else
                                    f"{name} ({'missing' if name in expected else 'unexpected'})")
            if logged(run.log) != expected_log:
                problems.append("log.jsonl")
            print(f"{kills:3}  {METHODS[i][1][:24]:24} killed at " + "; then at ".join(moments) + f"; {how}: " +
                  ("differs: " + ", ".join(problems) if problems else "the same bytes"), flush=True)
            failures += problems
            turn += 1
    print(f"{kills} kills, {inside} inside a write, {len(failures)} failures")
    for failure in failures:
        print("FAILED " + failure)
    return 1 if failures or not inside else 0


if __name__ == "__main__":
    sys.exit(main())
