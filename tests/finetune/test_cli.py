"""The way through peft-finetune that a user goes: train, predict, merge, info, tokenize, compare, stop and go on.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_cli.py [PATTERN]

PATTERN: only the tests whose name holds it. Needs Python's own library only.
"""

import csv
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.dom.minidom

import tiny_model as tiny
from run_tests import check, run_tests, tests_of


class Place:
    """What the tests share: a base without a head, one with, data, and an adapter of each kind."""

    def __init__(self, root):
        self.root = root
        self.model = tiny.make_model(f"{root}/model")
        self.headed = tiny.make_model(f"{root}/headed", labels=3)
        self.train = tiny.write_tsv(f"{root}/train.tsv", tiny.rows(60))
        self.test = tiny.write_tsv(f"{root}/test.tsv", tiny.rows(30, seed=2))
        self.inputs = tiny.write_batches(f"{root}/inputs.safetensors", 3, tiny.config())
        self.lora = self.fit("lora", "--method", "lora:rank=4,alpha=8,lr=0.02", "--targets", "query,value,dense",
                             "--test", self.test)
        self.mean = self.fit("mean", "--method", "lora:rank=2,targets=[query,output.dense]", "--pooling", "mean",
                             "--test", self.test)

    def fit(self, name, *arguments, model=None):
        out = f"{self.root}/{name}"
        tiny.good("train", "--model", model or self.model, "--train", self.train, "--epochs", 2, "--batch-size", 8,
                  "--lr", 0.01, "--log", f"{out}.jsonl", "--out", out, *arguments)
        return out

    def log(self, name):
        with open(f"{self.root}/{name}.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def near(a, b, tolerance, what):
    check(abs(a - b) <= tolerance, f"{what}: {a} and {b}")


def folders_agree(place, tolerance, *folders):
    """`predict --inputs` of several (model, adapter) gives the same tensors."""
    results = []
    for i, (model, adapter) in enumerate(folders):
        out = f"{place.root}/agree{i}.safetensors"
        tiny.good("predict", "--model", model, *(["--adapter", adapter] if adapter else []), "--inputs", place.inputs,
                  "--hidden", "--embed", "--out", out)
        results.append(tiny.read_safetensors(out))
        os.remove(out)
    for result in results[1:]:
        check(set(result) == set(results[0]), f"other outputs: {sorted(set(result) ^ set(results[0]))}")
        for name, value in result.items():
            largest = max(map(abs, tiny.numbers(results[0][name])))
            near(tiny.largest_difference(value, results[0][name]) / largest, 0, tolerance, f"{folders}: {name}")
    return results[0]


def test_what_a_run_leaves(place):
    for out, prefix, pooled in [(place.lora, "base_model.model.bert.", False),
                                (place.mean, "base_model.model.encoder.", True)]:
        for folder in (out, f"{out}/best"):
            names = set(os.listdir(folder))
            check({"adapter_config.json", "adapter_model.safetensors", "peft_finetune.json"} <= names,
                  f"{folder}: {names}")
            check(("head.safetensors" in names) == pooled, f"{folder}: {names}")
            check("checkpoint" not in names, "the checkpoint outlives the run")
            with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
                settings = json.load(file)
            check(settings["peft_type"] == "LORA", settings)
            check(not {"labels", "pooling", "max_length"} & set(settings), "what is ours is in adapter_config.json")
            with open(f"{folder}/peft_finetune.json", encoding="utf-8") as file:
                ours = json.load(file)
            check(ours["labels"] == ["bird", "cat", "dog"], ours)
            keys = tiny.read_safetensors(f"{folder}/adapter_model.safetensors")
            lora = [key for key in keys if ".lora_" in key]
            check(lora and all(key.startswith(prefix) for key in lora), sorted(keys))
            check(any("classifier" in key for key in keys) != pooled, sorted(keys))
    head = tiny.read_safetensors(f"{place.mean}/head.safetensors")
    check({name: value[1] for name, value in head.items()} == {"weight": [3, 16], "bias": [3]}, list(head))


def test_log(place):
    lines = place.log("lora")
    steps = [line for line in lines if "task_loss" in line]
    evaluations = [line for line in lines if "task_loss" not in line]
    check([line["step"] for line in steps] == list(range(1, 17)), "60 rows in batches of 8, twice, are 16 steps")
    check(all(line["loss"] == line["task_loss"] and math.isfinite(line["loss"]) for line in steps), steps)
    check([line["step"] for line in evaluations] == [8, 16], evaluations)
    check(all(0 <= line["accuracy"] <= 1 for line in evaluations), evaluations)
    check(steps[0]["lr"] > steps[-1]["lr"] > 0, "the linear schedule falls to 0 behind the last step")
    check(steps[0]["lr"] <= 0.02, "lr= of the method counts before --lr")
    check(sum(line["loss"] for line in steps[-4:]) < sum(line["loss"] for line in steps[:4]), "the loss must fall")


def predictions(done):
    """The lines of `predict`: (label, probability) each."""
    found = []
    for line in done.stdout.splitlines():
        match = re.match(r"(\S+)\s+([0-9.eE+-]+)\s?%?", line)
        if match and match[1] in ("cat", "dog", "bird"):
            found.append((match[1], float(match[2])))
    return found


def test_predict_in_words(place):
    done = tiny.good("predict", "--model", place.model, "--adapter", place.lora, "--text", "the red cat")
    check(any(label in done.stdout for label in ("cat", "dog", "bird")), done.stdout)
    for adapter in (place.lora, place.mean):
        from_data = tiny.good("predict", "--model", place.model, "--adapter", adapter, "--data", place.test)
        found = predictions(from_data)
        check(len(found) == 30, f"{len(found)} predictions of 30 rows:\n{from_data.stdout[:600]}")
        out = f"{place.root}/words.txt"
        tiny.good("predict", "--model", place.model, "--adapter", adapter, "--data", place.test, "--out", out)
        with open(out, encoding="utf-8") as file:
            check(len(file.read().splitlines()) >= 30, "as many lines in --out")
        os.remove(out)


def test_merge(place):
    for name, adapter in [("lora", place.lora), ("mean", place.mean)]:
        merged = f"{place.root}/merged_{name}"
        tiny.good("merge", "--model", place.model, "--adapter", adapter, "--out", merged)
        check({"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(merged)), os.listdir(merged))
        base, after = (tiny.read_safetensors(f"{folder}/model.safetensors") for folder in (place.model, merged))
        kept = {key.removeprefix("bert.") for key in after}
        check(set(base) <= kept and set(after) - {"classifier.weight", "classifier.bias"} <= set(base) | {
            "bert." + key for key in base}, f"names: {sorted(set(base) ^ set(after))}")
        check(any(base[key][2] != after.get(key, after.get("bert." + key))[2] for key in base), "nothing was merged")
        with open(f"{merged}/config.json", encoding="utf-8") as file:
            labels = json.load(file)["id2label"]
        check([labels[str(i)] for i in range(3)] == ["bird", "cat", "dog"], labels)
        outputs = folders_agree(place, 1e-5, (place.model, adapter), (merged, None))
        check({"b0.logits", "b0.loss", "b0.last_hidden_state", "b0.embedding"} <= set(outputs), sorted(outputs))
        adapted = tiny.good("predict", "--model", place.model, "--adapter", adapter, "--data", place.test)
        alone = tiny.good("predict", "--model", merged, "--data", place.test)
        pairs = list(zip(predictions(adapted), predictions(alone), strict=True))
        check(pairs and all(a[0] == b[0] and abs(a[1] - b[1]) < 0.011 for a, b in pairs), pairs)


def test_merge_of_selective_methods(place):
    for method in ("bitfit", "full", "head"):
        for pooling in ("cls", "mean"):
            name = f"{method}_{pooling}"
            adapter = place.fit(name, "--method", method, "--pooling", pooling)
            merged = f"{place.root}/merged_{name}"
            tiny.good("merge", "--model", place.model, "--adapter", adapter, "--out", merged)
            folders_agree(place, 1e-5, (place.model, adapter), (merged, None))


def test_outputs(place):
    """A folder without a task head gives no logits, one with gives them, and the embedding has length 1."""
    out = f"{place.root}/outputs.safetensors"
    tiny.good("predict", "--model", place.model, "--inputs", place.inputs, "--hidden", "--embed", "--out", out)
    without = tiny.read_safetensors(out)
    check(set(without) == {f"b{i}.{name}" for i in range(3)
                           for name in ("last_hidden_state", "pooler_output", "embedding")}, sorted(without))
    embedding = tiny.numbers(without["b0.embedding"])
    check(without["b0.embedding"][1] == [4, 16], without["b0.embedding"][1])
    for row in range(4):
        near(sum(x * x for x in embedding[16 * row:16 * row + 16]), 1, 1e-5, "length of an embedding")
    os.remove(out)
    tiny.good("predict", "--model", place.headed, "--inputs", place.inputs, "--out", out)
    outputs = tiny.read_safetensors(out)
    check(set(outputs) == {f"b{i}.{name}" for i in range(3) for name in ("logits", "loss")}, sorted(outputs))
    check(outputs["b0.loss"][1] == [], "the loss is a scalar")
    logits, labels = (tiny.numbers(value) for value in (outputs["b0.logits"],
                                                        tiny.read_safetensors(place.inputs)["b0.labels"]))
    losses = [math.log(sum(math.exp(x) for x in logits[3 * i:3 * i + 3])) - logits[3 * i + labels[i]] for i in range(4)]
    near(sum(losses) / 4, tiny.numbers(outputs["b0.loss"])[0], 1e-5, "loss")
    os.remove(out)


def test_ignored_labels_and_bare_names(place):
    batches = tiny.read_safetensors(place.inputs)
    one = {name[3:]: value for name, value in batches.items() if name.startswith("b0.")}
    labels = tiny.numbers(one["labels"])
    results = []
    for changed in (labels, [labels[0], -100, labels[2], -100]):
        one["labels"] = tiny.tensor([4], changed, "I64")
        tiny.write_safetensors(f"{place.root}/one.safetensors", one)
        out = f"{place.root}/bare.safetensors"
        tiny.good("predict", "--model", place.headed, "--inputs", f"{place.root}/one.safetensors", "--out", out)
        results.append(tiny.read_safetensors(out))
        os.remove(out)
    check(set(results[0]) == {"logits", "loss"}, sorted(results[0]))
    check(results[0]["logits"] == results[1]["logits"], "labels change no logits")
    logits = tiny.numbers(results[0]["logits"])
    losses = [math.log(sum(math.exp(x) for x in logits[3 * i:3 * i + 3])) - logits[3 * i + labels[i]] for i in (0, 2)]
    near(sum(losses) / 2, tiny.numbers(results[1]["loss"])[0], 1e-5, "loss over what is not ignored")


def test_text_and_inputs_train_alike(place):
    """`--no-shuffle` takes the rows in their order, and a batch is padded to its longest row: the same batches built
    here give the same log, to the last digit."""
    ids = {token: i for i, token in enumerate(tiny.VOCABULARY)}
    classes = {"bird": 0, "cat": 1, "dog": 2}
    table = tiny.rows(60)
    for pairs in (False, True):
        rows = tiny.rows(24, seed=5, pairs=True) if pairs else table[:24]
        path = tiny.write_tsv(f"{place.root}/alike{pairs}.tsv", rows, pairs=pairs)
        tensors = {}
        for i in range(3):
            batch = rows[8 * i:8 * i + 8]
            encoded, types = [], []
            for row in batch:
                first, second = row[1].split(), row[2].split() if pairs else []
                encoded.append([ids["[CLS]"], *[ids[w] for w in first], ids["[SEP]"],
                                *([ids[w] for w in second] + [ids["[SEP]"]] if pairs else [])])
                types.append([0] * (len(first) + 2) + [1] * (len(second) + 1 if pairs else 0))
            width = max(map(len, encoded))
            flat = lambda lists: [x for row in lists for x in row + [0] * (width - len(row))]
            tensors[f"b{i}.input_ids"] = tiny.tensor([8, width], flat(encoded), "I64")
            tensors[f"b{i}.attention_mask"] = tiny.tensor([8, width], flat([[1] * len(row) for row in encoded]), "I64")
            if pairs:
                tensors[f"b{i}.token_type_ids"] = tiny.tensor([8, width], flat(types), "I64")
            tensors[f"b{i}.labels"] = tiny.tensor([8], [classes[row[0]] for row in batch], "I64")
        inputs = f"{place.root}/alike{pairs}.safetensors"
        tiny.write_safetensors(inputs, tensors)
        common = ["train", "--model", place.model, "--method", "lora:rank=2", "--targets", "query", "--lr", "0.01"]
        logs = {}
        for name, data in [("text", ["--train", path, "--epochs", 1, "--batch-size", 8, "--no-shuffle"]),
                           ("inputs", ["--inputs", inputs]), ("shuffled", ["--train", path, "--epochs", 1,
                                                                           "--batch-size", 8])]:
            out = f"{place.root}/alike_{pairs}_{name}"
            tiny.good(*common, *data, "--log", f"{out}.jsonl", "--out", out)
            check(not os.path.exists(f"{out}/best"), "best/ without an evaluation")
            with open(f"{out}.jsonl", encoding="utf-8") as file:
                logs[name] = file.read()
        check(logs["text"] == logs["inputs"], f"text:\n{logs['text']}inputs:\n{logs['inputs']}")
        check(logs["text"] != logs["shuffled"], "without --no-shuffle the order is another")


def test_steps_and_passes_over_inputs(place):
    common = ["train", "--model", place.headed, "--method", "head", "--inputs", place.inputs]
    for more, steps in [([], 3), (["--steps", "2"], 2), (["--epochs", "2"], 6), (["--steps", "5"], 5)]:
        out = f"{place.root}/steps_{steps}"
        tiny.good(*common, *more, "--log", f"{out}.jsonl", "--out", out)
        with open(f"{out}.jsonl", encoding="utf-8") as file:
            check(len(file.readlines()) == steps, f"{more}: {steps} steps")
    accumulated = f"{place.root}/accumulated"
    tiny.good(*common, "--epochs", "2", "--accumulate", "3", "--log", f"{accumulated}.jsonl", "--out", accumulated)
    with open(f"{accumulated}.jsonl", encoding="utf-8") as file:
        check(len(file.readlines()) == 2, "three batches a step")


def test_repeats_itself(place):
    """The same seed gives the same bytes, another one does not."""
    common = ["--method", "lora:rank=2,dropout=0.1", "--targets", "query", "--dropout", "0.1"]
    files = []
    for name, seed in [("once", 7), ("twice", 7), ("other", 8)]:
        out = place.fit(f"repeat_{name}", *common, "--seed", seed)
        with open(f"{out}/adapter_model.safetensors", "rb") as file:
            files.append(file.read())
    check(files[0] == files[1], "the same seed, other bytes")
    check(files[0] != files[2], "another seed, the same bytes")


def test_trains_on_from_an_adapter(place):
    out = place.fit("onward", "--init-adapter", place.lora)
    first = place.log("onward")[0]["loss"]
    with open(f"{out}/adapter_config.json", encoding="utf-8") as file:
        settings = json.load(file)
    check(settings["r"] == 4 and settings["lora_alpha"] == 8, settings)
    check(first < place.log("lora")[0]["loss"], "it starts where the other ended")


def test_other_labels_for_a_trained_head(place):
    """A head that goes on with other labels, or with its own in another order of rows, is no secret."""
    renamed = tiny.write_tsv(f"{place.root}/renamed.tsv", [("new " + label, text) for label, text in tiny.rows(20)])
    common = ["train", "--model", place.model, "--steps", 1]
    for adapter in (place.lora, place.mean):
        out = f"{place.root}/relabelled_{os.path.basename(adapter)}"
        done = tiny.good(*common, "--init-adapter", adapter, "--train", renamed, "--out", out)
        check("note: " in done.stderr and "bird, cat, dog" in done.stderr and "new bird, new cat" in done.stderr, done.stderr)
        done = tiny.good(*common, "--init-adapter", adapter, "--train", place.train, "--out", out, "--overwrite")
        check("trained for the labels" not in done.stderr, done.stderr)


def test_best_is_the_best(place):
    evaluations = [line for line in place.log("lora") if "task_loss" not in line]
    with open(f"{place.lora}/best/peft_finetune.json", encoding="utf-8") as file:
        best = json.load(file)
    top = max(line["accuracy"] for line in evaluations)
    check(best["step"] == next(line["step"] for line in evaluations if line["accuracy"] == top), best)


def test_overwrite(place):
    out = place.fit("overwritten", "--method", "head")
    arguments = ["train", "--model", place.model, "--train", place.train, "--method", "head", "--steps", 1, "--out", out]
    check(tiny.run(*arguments).returncode != 0, "an existing folder is no place to write")
    tiny.good(*arguments, "--overwrite")


def test_info(place):
    done = tiny.good("info", "--model", place.model, "--adapter", place.lora)
    # query, value, and dense of attention, feed-forward up and down: rank times (in + out), in two layers; the pooler
    # is a dense layer too.
    lora = 2 * 4 * (32 + 32 + 32 + 48 + 48) + 4 * 32
    head = 3 * 16 + 3
    numbers = re.sub(r"(?<=\d)[ ,'_](?=\d{3})", "", done.stdout)
    check(str(lora + head) in numbers, f"{lora} + {head} parameters:\n{done.stdout}")
    check("query" in done.stdout and "lora" in done.stdout.lower(), done.stdout)
    base = sum(len(value[2]) // 4 for value in tiny.read_safetensors(f"{place.model}/model.safetensors").values())
    done = tiny.good("info", "--model", place.model)
    check(str(base) in re.sub(r"(?<=\d)[ ,'_](?=\d{3})", "", done.stdout), f"{base} parameters:\n{done.stdout}")


def test_tokenize(place):
    ids = {token: i for i, token in enumerate(tiny.VOCABULARY)}
    cat = [ids["[CLS]"], ids["the"], ids["cat"], ids["##s"], ids["[SEP]"]]
    done = tiny.good("tokenize", "--model", place.model, "--text", "The cats")
    check([int(word) for word in done.stdout.split()] == cat, done.stdout)
    done = tiny.good("tokenize", "--model", place.model, "--data", place.test)
    check(len(done.stdout.splitlines()) == 30, "a line a text")
    # A text may stand in brackets, with a comma in it.
    done = tiny.good("tokenize", "--model", place.model, "--text", "[MASK]", "--text", "[the, cats]")
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    check(len(lines) == 2 and lines[0] == [ids["[CLS]"], ids["[MASK]"], ids["[SEP]"]], done.stdout)


def test_whole_numbers(place):
    done = tiny.good("train", "--model", place.model, "--train", place.train, "--method", "head", "--steps", "010",
                     "--out", f"{place.root}/ten")
    check(" 10 steps" in done.stderr, done.stderr)


def test_pairs_in_a_file(place):
    out = f"{place.root}/pairs.tsv"
    tiny.good("predict", "--model", place.model, "--adapter", place.lora, "--text", "the cat\tthe dog", "--out", out)
    with open(out, encoding="utf-8") as file:
        lines = [line.split("\t") for line in file.read().splitlines()]
    check(lines[0] == ["label", "probability", "text_a", "text_b"] and lines[1][2:] == ["the cat", "the dog"], lines)


def test_compare(place):
    out = f"{place.root}/compared"
    done = tiny.good("compare", "--model", place.model, "--train", place.train, "--test", place.test, "--method", "head",
                     "--method", "bitfit:lr=0.02", "--method", "lora:rank=2,targets=[query,value],lr=0.01", "--epochs", 2,
                     "--batch-size", 8, "--out", out)
    lines = done.stdout.splitlines()
    for method in ("head", "bitfit", "lora"):
        check(any(line.startswith(method) and "%" in line for line in lines), done.stdout)
    tables = [os.path.join(at, name) for at, _, names in os.walk(out) for name in names if name.endswith(".csv")]
    pictures = [os.path.join(at, name) for at, _, names in os.walk(out) for name in names if name.endswith(".svg")]
    check(len(tables) == 1 and len(pictures) == 1, f"{tables} {pictures}")
    with open(tables[0], encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(io.StringIO(file.read())))
    check([row["method"].split(":")[0] for row in table] == ["head", "bitfit", "lora"], table)
    head = 3 * 16 + 3
    check([int(row["trainable"]) for row in table][::2] == [head, head + 2 * 2 * 2 * 32], table)
    check(all(0 < float(row["accuracy"]) <= 1 and float(row["seconds_per_step"]) > 0 and int(row["adapter_bytes"]) > 0
              and int(row["peak_bytes"]) > 0 for row in table), table)
    picture = xml.dom.minidom.parse(pictures[0])
    check(len(picture.getElementsByTagName("polyline")) == 6, "a line for each method in two panels")


def test_stop_and_go_on(place):
    """Ctrl-C writes a checkpoint and says how to resume; resumed, the run ends with the bytes of an undisturbed one."""
    common = ["train", "--model", place.model, "--train", place.train, "--method", "lora:rank=2,dropout=0.1", "--targets",
              "query", "--steps", "60", "--batch-size", "4", "--threads", "1"]
    tiny.good(*common, "--out", f"{place.root}/undisturbed")
    out, log = f"{place.root}/stopped", f"{place.root}/stopped.jsonl"
    arguments = [*common, "--log", log, "--out", out]
    process = subprocess.Popen([tiny.program(), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if os.path.exists(log) and os.path.getsize(log) > 200:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    message = message.decode()
    check(process.returncode not in (0, -signal.SIGINT), f"exit {process.returncode}: {message}")
    check("--resume" in message, message)
    check(os.path.isdir(f"{out}/checkpoint"), "no checkpoint")
    check(not os.path.exists(f"{out}/adapter_model.safetensors"), "an adapter under its final name")
    tiny.good(*arguments, "--resume")
    with open(f"{out}/adapter_model.safetensors", "rb") as file, \
            open(f"{place.root}/undisturbed/adapter_model.safetensors", "rb") as other:
        check(file.read() == other.read(), "other bytes than undisturbed")


def test_resume_of_nothing(place):
    """Where nothing was begun, --resume begins, and says so: a script may always pass it."""
    out = f"{place.root}/begun"
    arguments = ["train", "--model", place.model, "--train", place.train, "--method", "head", "--steps", 2, "--out", out,
                 "--resume"]
    check("beginning" in tiny.good(*arguments).stderr, "it must say that it starts from the beginning")
    with open(f"{out}/adapter_model.safetensors", "rb") as file:
        first = file.read()
    tiny.good(*arguments)  # a finished run stays as it is
    with open(f"{out}/adapter_model.safetensors", "rb") as file:
        check(file.read() == first, "a finished run was changed")


def test_plain_lines_where_there_is_no_terminal(place):
    done = tiny.good("train", "--model", place.model, "--train", place.train, "--method", "head", "--epochs", 4,
                     "--batch-size", 4, "--out", f"{place.root}/plain")
    check("\r" not in done.stderr and "\x1b" not in done.stderr, repr(done.stderr[:300]))
    check("loss" in done.stderr and "60/60" in done.stderr, done.stderr)


def test_short_model(place):
    """Fewer positions than the usual length are no error where nobody asked for a length."""
    model = tiny.make_model(f"{place.root}/short", positions=24)
    out = place.fit("short_run", "--method", "head", model=model)
    tiny.good("predict", "--model", model, "--adapter", out, "--text", "the red cat " * 20)


def test_help(place):
    done = tiny.good("--help")
    for command in ("train", "predict", "compare", "merge", "info", "tokenize"):
        check(command in done.stdout, done.stdout)
        own = tiny.good(command, "--help").stdout
        check("--model" in own, own)


def main():
    tiny.program()
    with tempfile.TemporaryDirectory() as root:
        place = Place(root)
        return run_tests([(name, functools.partial(test, place)) for name, test in tests_of(globals())], at_once=1)


if __name__ == "__main__":
    sys.exit(main())
