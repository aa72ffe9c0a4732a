"""Several adapters at work together in peft-finetune: prompts that vote, tasks that share a prompt, bottlenecks that
are fused.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_several.py [PATTERN]

PATTERN: only the tests whose name holds it. Needs Python's own library only.
"""

import collections
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import tiny_model as tiny
from run_tests import check, run_tests, tests_of


class Place:
    """What a test has: a base, and two tasks with the same labels."""

    def __init__(self, root):
        self.root = root
        self.model = tiny.make_model(f"{root}/model")
        other = {"cat": "dog", "dog": "bird", "bird": "cat"}
        self.train, self.test = [], []
        for task in (0, 1):
            for name, files, count, seed in (("train", self.train, 60, 1), ("test", self.test, 30, 2)):
                rows = tiny.rows(count, seed=seed + 10 * task)
                rows = [(other[label], text) for label, text in rows] if task else rows
                files.append(tiny.write_tsv(f"{root}/{name}{task}.tsv", rows))

    def command(self, *arguments):
        head = [] if "--lr" in arguments else ["--head-lr", 0.1]
        return ["train", "--model", self.model, "--epochs", 2, "--batch-size", 8, *head, *arguments]

    def fit(self, name, *arguments):
        out = f"{self.root}/{name}"
        self.said = tiny.good(*self.command(*arguments), "--out", out)
        return out

    def bottlenecks(self, pooling):
        """One trained on each task."""
        return [self.fit(name, "--train", self.train[task], "--method", "pfeiffer:reduction_factor=4,lr=0.02", "--pooling",
                         pooling) for task, name in enumerate(("first", "second"))]

    def predict(self, *arguments):
        """[(label, probability)] of the first test file, and what was said besides."""
        out = f"{self.root}/{time.monotonic_ns()}.tsv"
        done = tiny.good("predict", "--model", self.model, "--data", self.test[0], "--out", out, *arguments)
        with open(out, encoding="utf-8") as file:
            rows = [line.split("\t") for line in file.read().splitlines()[1:]]
        return [(row[0], float(row[1])) for row in rows], done.stderr


def tensors(folder, name="adapter_model.safetensors"):
    return tiny.read_safetensors(f"{folder}/{name}")


def same(a, b):
    return {name: value[2] for name, value in a.items()} == {name: value[2] for name, value in b.items()}


def table(text):
    """{first column: per cent} of a table; None where there is no number."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(\S+) +(?:([0-9.]+) %|(- .*))$", line)
        if match:
            found[match[1]] = float(match[2]) if match[2] else None
    return found


def accuracy(said):
    return float(re.search(r"as labelled \(([0-9.]+) %\)", said)[1])


def killed_and_resumed(place, name, arguments):
    """A run that was ended once it had a checkpoint, and went on."""
    out = f"{place.root}/{name}"
    command = [str(word) for word in place.command(*arguments, "--checkpoint-every", 1, "--out", out)]
    process = subprocess.Popen([tiny.program(), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not os.path.exists(f"{out}/checkpoint"):
        time.sleep(0.001)
    process.kill()
    process.wait()
    check(os.path.exists(f"{out}/checkpoint"), "there was no checkpoint in time")
    tiny.good(*command, "--resume")
    return out


# --- prompts that vote -------------------------------------------------------------------------------------------

def ensemble(place, name, method, pooling):
    common = ["--train", place.train[0], "--test", place.test[0], "--method", method, "--pooling", pooling]
    out = f"{place.root}/{name}"
    done = tiny.good(*place.command(*common), "--seed", 5, "--ensemble", 3, "--log", f"{out}.jsonl", "--out", out)
    folders = [f"{out}/{i}" for i in (1, 2, 3)]
    check(sorted(os.listdir(out)) == ["1", "2", "3"], os.listdir(out))
    for i, folder in enumerate(folders):
        with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
            check(json.load(file)["peft_type"] in ("PROMPT_TUNING", "P_TUNING"), folder)
        check(os.path.exists(f"{out}.jsonl.{i + 1}"), "each prompt has a log")
    alone = place.fit(f"{name}_alone", *common, "--seed", 6)
    check(same(tensors(alone), tensors(folders[1])), "the second prompt is that of the next seed")
    check(not same(tensors(folders[0]), tensors(folders[1])), "the prompts are one")

    members, said = zip(*(place.predict("--adapter", folder) for folder in folders))
    shown = table(done.stdout)
    right = [accuracy(text) for text in said]
    check([shown[folder] for folder in folders] == right, (shown, right))
    check(abs(shown["average"] - sum(right) / 3) < 0.011 and shown["best"] == max(right), shown)

    together, said = place.predict(*(word for folder in folders for word in ("--adapter", folder)))
    check(table(said) == shown and accuracy(said) == shown["ensemble"], said)
    whole = 0
    for (label, probability), *votes in zip(together, *members, strict=True):
        (most, count), *_ = collections.Counter(label for label, _ in votes).most_common()
        check(count == 1 or label == most, f"{votes} gave {label}")
        if count == 3:
            whole += 1
            check(abs(probability - sum(p for _, p in votes) / 3) < 3e-6, (probability, votes))
    check(whole > 0, "the prompts never agree")

    # What is finished stays, what is missing is trained as it was.
    before = tensors(folders[2])
    shutil.rmtree(folders[2])
    os.mkdir(f"{out}/.3.tmp-{2**30}@{socket.gethostname()}")  # as a killed run leaves it; no process has this number
    again = tiny.good(*place.command(*common), "--seed", 5, "--ensemble", 3, "--log", f"{out}.jsonl", "--out", out,
                      "--resume")
    check(same(tensors(folders[2]), before) and again.stdout == done.stdout, again.stderr)
    check(sorted(os.listdir(out)) == ["1", "2", "3"], os.listdir(out))


def test_ensemble_of_prompts(place):
    ensemble(place, "prompts", "prompt_tuning:virtual_tokens=3,init=vocabulary,lr=0.05", "cls")


def test_ensemble_with_pooled_heads(place):
    ensemble(place, "networks", "p_tuning:virtual_tokens=3,lr=0.05", "mean")


# --- tasks that share a prompt -----------------------------------------------------------------------------------

def multitask(place, pooling):
    both = [word for files, option in ((place.train, "--train"), (place.test, "--test")) for file in files
            for word in (option, file)]
    method = "multitask_prompt:virtual_tokens=4,rank=2,init=vocabulary,lr=0.05"
    name = f"tasks_{pooling}"
    source = place.fit(name, *both, "--method", method, "--pooling", pooling, "--test-rows", 20)
    shown = [float(x) for x in re.findall(r"task \d: ([0-9.]+) %", place.said.stderr)][-2:]
    learned = tensors(source)
    shapes = {key: value[1] for key, value in learned.items() if key.startswith("pr")}
    check(shapes == {"prompt_embeddings": [4, 16], "prefix_task_cols": [2, 4, 2], "prefix_task_rows": [2, 2, 16]}, shapes)
    with open(f"{source}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file)
    check((config["peft_type"], config["num_tasks"], config["num_ranks"]) == ("MULTITASK_PROMPT_TUNING", 2, 2), config)

    first = tiny.write_tsv(f"{place.root}/{name}.tsv", tiny.rows(30, seed=2)[:20])
    said = tiny.good("predict", "--model", place.model, "--adapter", source, "--task", 0, "--data", first).stderr
    check(accuracy(said) == shown[0], (said, shown))
    zero, one = (place.predict("--adapter", source, "--task", task)[0] for task in (0, 1))
    check(max(abs(a[1] - b[1]) for a, b in zip(zero, one)) > 1e-4, "the tasks' prompts are one")

    # A rate of 0 leaves the start that is taken over.
    split = {key: tiny.numbers(learned[key]) for key in shapes}
    halves = {key: (split[key][:len(split[key]) // 2], split[key][len(split[key]) // 2:])
              for key in ("prefix_task_cols", "prefix_task_rows")}
    for init, expected in (("exact_source_task,source_task=1", {key: value[1] for key, value in halves.items()}),
                           ("average_source_tasks", {key: [(a + b) / 2 for a, b in zip(*value)]
                                                     for key, value in halves.items()}),
                           ("only_source_shared", None)):
        target = place.fit(f"{name}_{init[:7]}", "--train", place.train[1], "--method",
                           f"multitask_prompt:source={source},init={init},lr=0", "--pooling", pooling)
        got = tensors(target)
        check(tiny.largest_difference(got["prompt_embeddings"], learned["prompt_embeddings"]) == 0, init)
        for key, value in halves.items():
            values = tiny.numbers(got[key])
            check(got[key][1] == [1, *shapes[key][1:]], got[key][1])
            wanted = expected[key] if expected else None
            near = max(abs(a - b) for a, b in zip(values, wanted or value[0])) < 1e-7
            check(near == (expected is not None), f"{init}: {key}")
    place.predict("--adapter", target)


def test_tasks_of_a_prompt(place):
    multitask(place, "cls")


def test_tasks_with_a_pooled_head(place):
    multitask(place, "mean")


# --- bottlenecks that are fused ----------------------------------------------------------------------------------

def fusion(place, pooling):
    adapters = place.bottlenecks(pooling)
    common = ["--train", place.train[0], "--test", place.test[0], "--pooling", pooling, "--method",
              f"fusion:adapters=[{','.join(adapters)}],lr=0.01"]
    out = place.fit(f"fusion_{pooling}", *common)
    shown = table(place.said.stdout)
    right = [accuracy(place.predict("--adapter", folder)[1]) for folder in (*adapters, out)]
    check([shown[folder] for folder in (*adapters, "fusion")] == right, (shown, right))

    with open(f"{out}/adapter_fusion_config.json", encoding="utf-8") as file:
        config = json.load(file)
    names = [os.path.basename(folder) for folder in adapters]
    check(config["adapter_names"] == names and config["name"] == ",".join(names), config)
    keys = tensors(out, "model_adapter_fusion.safetensors")
    check(len(keys) == 2 * 5 and all(f"adapter_fusion_layer.{config['name']}." in key for key in keys), sorted(keys))
    for name, folder in zip(names, adapters, strict=True):
        now = {key.replace(f"adapters.{name}.", "adapters.default."): value
               for key, value in tensors(f"{out}/adapters/{name}", "adapter.safetensors").items()}
        check(same(now, tensors(folder, "adapter.safetensors")), f"{name} is not what it was")
    head = ("model_head.safetensors", "classifier.") if pooling == "cls" else ("head.safetensors", "")
    check({key: value[1] for key, value in tensors(out, head[0]).items()} ==
          {head[1] + "weight": [3, 16], head[1] + "bias": [3]}, sorted(tensors(out, head[0])))

    # Going on at a rate of 0 from the folder changes nothing.
    again = place.fit(f"fusion_again_{pooling}", "--train", place.train[0], "--init-adapter", out, "--lr", 0)
    check(same(tensors(again, "model_adapter_fusion.safetensors"), keys) and
          same(tensors(again, head[0]), tensors(out, head[0])), again)
    trained = int(re.search(r"(\d[\d,]*) of", place.said.stderr)[1].replace(",", ""))
    check(trained == 2 * (3 * 16 * 16 + 2 * 16) + 3 * 17, f"{trained} weights train")
    check("first" in tiny.good("info", "--model", place.model, "--adapter", out).stdout, "info must name its parts")

    resumed = killed_and_resumed(place, f"fusion_resumed_{pooling}", common)
    for file in ("model_adapter_fusion.safetensors", head[0]):
        check(same(tensors(resumed, file), tensors(out, file)), f"{file} is another after --resume")


def test_fusion(place):
    fusion(place, "cls")


def test_fusion_with_a_pooled_head(place):
    fusion(place, "mean")


def test_compare_with_fusion(place):
    """A fusion beside its kind; adapters of other labels have no accuracy of their own."""
    rows = [("animal" if label == "cat" else "other", text) for label, text in tiny.rows(40, seed=3)]
    data = tiny.write_tsv(f"{place.root}/other.tsv", rows)
    adapters = place.bottlenecks("cls")
    method = f"fusion:adapters=[{','.join(adapters)}],temperature=true,query_before_ln=true,dropout=0.1"
    done = tiny.good("compare", "--model", place.model, "--train", data, "--test", data, "--epochs", 1, "--method", method,
                     "--method", "pfeiffer:reduction_factor=4", "--out", f"{place.root}/compared")
    check("fusion:" in done.stdout and os.path.exists(f"{place.root}/compared/fusion/adapters/first"), done.stdout)
    place.fit("fusion_other", "--train", data, "--test", data, "--method", method)
    shown = table(place.said.stdout)
    check([shown[folder] for folder in adapters] == [None, None] and shown["fusion"] >= 0, place.said.stdout)


def main():
    tiny.program()
    with tempfile.TemporaryDirectory() as root:

        def in_folder(name, test):
            folder = f"{root}/{name}"
            os.makedirs(folder)
            test(Place(folder))

        return run_tests([(name, functools.partial(in_folder, name, test)) for name, test in tests_of(globals())])


if __name__ == "__main__":
    sys.exit(main())
