"""Every wrong input to peft-finetune: it must end with an error that its first line says, naming the file, key or
option at fault; nothing may be left at --out, and nothing half-written anywhere.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_wrong_input.py [PATTERN]

PATTERN: only the cases whose name holds it. Needs Python's own library only.
"""

import concurrent.futures
import ctypes
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile

import tiny_model as tiny

# What LibTorch's errors and the C++ runtime add for developers.
INTERNALS = ["Exception raised from", "frame #", "terminate called", "what():", "Aborted", "Segmentation", ".cpp:", ".h:",
             "c10::", "std::", "stack trace", "0x0000"]


def files_below(folder):
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)


def copied(source, target, without=()):
    shutil.copytree(source, target)
    for name in without:
        os.remove(os.path.join(target, name))
    return target


def edited_json(path, **changes):
    with open(path, encoding="utf-8") as file:
        value = json.load(file)
    for key, change in changes.items():
        value[key] = change
    tiny.write_json(path, value)


def edited_tensors(path, change):
    tensors = tiny.read_safetensors(path)
    change(tensors)
    tiny.write_safetensors(path, tensors)


def text_file(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return path


class Cases:
    """The cases, each with a folder of its own for what it writes."""

    def __init__(self, root):
        self.root = root
        self.cases = []
        self.model = tiny.make_model(f"{root}/model")
        self.headed = tiny.make_model(f"{root}/headed", labels=3)
        self.wider = tiny.make_model(f"{root}/wider", hidden=24, intermediate=48)
        self.train = tiny.write_tsv(f"{root}/train.tsv", tiny.rows(24))
        self.inputs = tiny.write_batches(f"{root}/inputs.safetensors", 2, tiny.config())
        self.adapter = f"{root}/adapter"
        tiny.good("train", "--model", self.model, "--train", self.train, "--method", "lora:rank=2,alpha=4", "--targets",
                  "query,value", "--steps", 2, "--batch-size", 4, "--out", self.adapter)

    def folder(self, name):
        path = f"{self.root}/cases/{name.replace(' ', '_').replace('/', '_')}"
        os.makedirs(path, exist_ok=True)
        return path

    def add(self, name, arguments, *culprits, anywhere=(), nowhere=(), **options):
        """culprits: what the first line must hold; anywhere: what the whole message must; nowhere: what it must not.
        OUT at the beginning of an argument is a path that does not exist and must not exist afterwards."""
        self.cases.append((name, arguments, culprits, anywhere, nowhere, options))

    def train_with(self, name, *culprits, model=None, train=None, method="lora:rank=2", targets="query", extra=(),
                   anywhere=(), **options):
        self.add(name, ["train", "--model", model or self.model, "--train", train or self.train, "--method", method,
                        *(["--targets", targets] if targets else []), "--steps", "2", "--batch-size", "4",
                        "--out", "OUT", *extra], *culprits, anywhere=anywhere, **options)

    def predict_with(self, name, *culprits, model=None, adapter=None, extra=("--text", "red cat"), **options):
        self.add(name, ["predict", "--model", model or self.model, *(["--adapter", adapter] if adapter else []),
                        *extra, "--out", "OUT"], *culprits, **options)

    def check(self, case):
        """A list of what is wrong."""
        name, arguments, culprits, anywhere, nowhere, options = case
        folder = self.folder("run " + name)
        out = f"{folder}/out"
        before = files_below(self.root + "/cases/" + os.path.basename(folder))
        arguments = [out + a[3:] if a == "OUT" or a.startswith("OUT/") else a for a in arguments]
        done = tiny.run(*arguments, **options)
        problems = message_problems(done, culprits, anywhere)
        problems += [f"the message holds '{text}'" for text in nowhere if text in done.stderr]
        if os.path.lexists(out):
            problems.append("something is left at --out: " + " ".join(files_below(out) or [out]))
        elif files_below(folder) != before:
            problems.append("left behind: " + " ".join(files_below(folder)))
        return problems


def message_problems(done, culprits, anywhere=()):
    problems = []
    if not 0 < done.returncode < 126:
        problems.append(f"exit status {done.returncode}")
    lines = done.stderr.splitlines()
    # Notes and progress, which have no such beginning, are no part of the message.
    errors = [i for i, line in enumerate(lines) if line.startswith("peft-finetune: ")]
    first = lines[errors[0]] if errors else lines[0] if lines else ""
    for culprit in culprits:
        if str(culprit) not in first:
            problems.append(f"the first line lacks '{culprit}'")
    for text in anywhere:
        if str(text) not in done.stderr:
            problems.append(f"the message lacks '{text}'")
    for text in INTERNALS:
        if text in done.stderr:
            problems.append(f"the message holds '{text}'")
    if problems:
        problems.append("stderr: " + done.stderr[:1500])
    return problems


def add_data_cases(cases):
    def tsv(name, content):
        return text_file(f"{cases.folder('data')}/{name}.tsv", content)

    head = b"label\ttext\n"
    for name, content, *culprits in [
        ("no tab", head + b"cat\ta cat\ndog a dog\n", ":3", "tab"),
        ("one class only", head + b"cat\ta cat\ncat\tred cat\n", "class", "cat"),
        ("empty text", head + b"cat\ta cat\ndog\t\n", ":3", "empty"),
        ("blank text", head + b"cat\ta cat\ndog\t  \n", ":3", "empty"),
        ("empty label", head + b"cat\ta cat\n\ta dog\n", ":3", "label"),
        ("invalid UTF-8", head + b"cat\ta cat\ndog\ta \xff dog\n", ":3", "UTF-8"),
        ("surrogate in UTF-8", head + b"cat\ta \xed\xa0\x80 cat\ndog\ta dog\n", ":2", "UTF-8"),
        ("too many columns", head + b"cat\ta cat\tmore\ndog\ta dog\n", ":2", "columns"),
        ("no header", b"cat\ta cat\ndog\ta dog\n", ":1", "header"),
        ("header only", head, "rows"),
        ("nothing in the file", b"", ":1"),
    ]:
        path = tsv(name.replace(" ", "_"), content)
        cases.train_with(f"data: {name}", path, *culprits, train=path)
    cases.train_with("data: no such file", cases.root + "/none.tsv", train=cases.root + "/none.tsv")
    cases.train_with("data: a folder", cases.root, train=cases.root)
    strange = tsv("strange_label", head + b"cat\ta cat\nhorse\ta red one\n")
    cases.train_with("data: test label that was never trained", f"{strange}:3", "horse", extra=["--test", strange])
    bad_test = tsv("bad_test", head + b"cat a cat\n")
    cases.train_with("data: test file without a tab", f"{bad_test}:2", extra=["--test", bad_test])
    pairs = tiny.write_tsv(f"{cases.folder('data')}/pairs.tsv", tiny.rows(4, pairs=True), pairs=True)
    cases.train_with("data: test file with pairs", pairs, extra=["--test", pairs])
    cases.predict_with("data: predict without a tab", f"{bad_test}:2", adapter=cases.adapter,
                       extra=["--data", bad_test])
    cases.predict_with("data: empty --text", "--text", adapter=cases.adapter, extra=["--text", ""])
    for name, *texts in [("one and two texts", "red cat", "red\tcat"), ("half a pair", "red\t "),
                         ("three texts", "red\tcat\tdog"), ("a line's end, with --out", "red\ncat")]:
        cases.predict_with(f"data: --text of {name}", "--text", adapter=cases.adapter,
                           extra=[word for text in texts for word in ("--text", text)])
    cases.predict_with("data: --text in invalid UTF-8", "UTF-8", adapter=cases.adapter,
                       extra=["--text", os.fsdecode(b"a \xff cat")])


def add_option_cases(cases):
    methods = ["lora", "bitfit", "head", "full"]
    cases.train_with("method: unknown", "lorra", method="lorra:rank=2", anywhere=methods)
    cases.train_with("method: unknown key", "rnak", method="lora:rnak=2", anywhere=["rank", "alpha", "dropout"])
    cases.train_with("method: rank 0", "rank", "0", method="lora:rank=0")
    cases.train_with("method: rank below 0", "rank", "-3", method="lora:rank=-3")
    cases.train_with("method: rank in words", "rank", "eight", method="lora:rank=eight")
    cases.train_with("method: rank too large for an integer", "rank", method="lora:rank=99999999999999999999")
    cases.train_with("method: dropout above 1", "dropout", method="lora:rank=2,dropout=1.5")
    cases.train_with("method: alpha in words", "alpha", "much", method="lora:rank=2,alpha=much")
    cases.train_with("method: key without a value", "rank", method="lora:rank")
    cases.train_with("method: key twice", "rank", method="lora:rank=2,rank=3")
    cases.train_with("method: bracket left open", "[query", method="lora:rank=2,targets=[query", targets=None)
    cases.train_with("method: rate in words", "lr", method="lora:rank=2,lr=fast")
    cases.train_with("method: rate below 0", "lr", method="lora:rank=2,lr=-1")
    cases.train_with("method: empty", "--method", method="")
    cases.train_with("method: AdaLoRA without time to mask", "total_step", "tinit + tfinal", "2",
                     method="adalora:tinit=1,tfinal=1")
    cases.train_with("method: AdaLoRA's target above its start", "target_rank", "init_rank", "5",
                     method="adalora:init_rank=4,target_rank=5")
    cases.train_with("method: AdaLoRA masks every 0 steps", "delta_t", method="adalora:delta_t=0")
    cases.train_with("method: AdaLoRA's decay of 1", "beta2", method="adalora:beta2=1")
    cases.train_with("method: a start of another name", "init", "pisa", "pissa", method="lora:init=pisa")
    cases.train_with("method: an odd rank for an orthogonal start", "rank", "even", method="lora:rank=3,init=orthogonal",
                     anywhere=["query"])
    cases.train_with("method: LoRA-GA without gradients", "lora_ga", "--pooling mean", method="lora:rank=2,init=lora_ga",
                     extra=["--pooling", "mean"])
    cases.train_with("method: no batches to start from", "init_batches", method="lora:init=corda,init_batches=0")
    cases.train_with("method: LoRA+ below 1", "lora_plus", "0.5", method="lora:lora_plus=0.5")
    cases.train_with("method: DoRA with LoRA's bias", "lora_bias", method="dora:lora_bias=true")
    cases.train_with("method: OFT with both sizes", "block", method="oft:block_size=4,blocks=4")
    cases.train_with("method: BOFT's blocks do not divide", "block_size", "3", method="boft:block_size=3",
                     anywhere=["query"])
    cases.train_with("method: no tokens to train", "indices", method="trainable_tokens", targets="word_embeddings")
    cases.train_with("method: tokens outside the vocabulary", "9999", method="trainable_tokens:indices=[5,9999]",
                     targets="word_embeddings", anywhere=["word_embeddings"])
    cases.train_with("method: LoHa's dropout of 1", "rank_dropout", method="loha:rank_dropout=1")
    cases.train_with("method: IncreLoRA's target below its start", "target_rank", "rank",
                     method="increlora:rank=4,target_rank=2")
    cases.train_with("method: IncreLoRA on embeddings", "IncreLoRA", "linear", method="increlora:target_rank=2",
                     targets="word_embeddings", anywhere=["word_embeddings"])
    for name, method, *culprits in [("mask of nothing", "fish:ratio=0", "ratio", "0"),
                                    ("mask of more than all", "magnitude:ratio=1.5", "ratio", "1.5"),
                                    ("mask of less than an entry", "fish:ratio=1e-9", "ratio", "1e-09"),
                                    ("more random entries than there are", "rand_uniform:count=99999999", "count"),
                                    ("no examples", "fish:examples=0", "examples", "0"),
                                    ("more heads than there are", "hifi:heads=9,targets=[query]", "heads", "9"),
                                    ("HiFi beside no attention", "hifi:heads=1,targets=[intermediate.dense]", "attention"),
                                    ("HiFi's damping", "hifi:damping=1", "damping", "1"),
                                    ("more layers than there are", "top_layers:k=9", "k", "9"),
                                    ("no layers", "top_layers:k=0", "k", "0"),
                                    ("BitFit's terms", "bitfit:terms=[qery]", "qery", "intermediate"),
                                    ("BitFit's biases and terms", "bitfit:terms=[query],biases=[key]", "terms")]:
        cases.train_with(f"method: {name}", *culprits, method=method, targets=None)
    cases.train_with("method: FISH without gradients", "fish", "--pooling cls", method="fish", targets=None,
                     extra=["--pooling", "mean"])
    cases.train_with("target: matches nothing", "qery", targets="qery", anywhere=["query"])
    cases.train_with("target: one of two matches nothing", "valeu", targets="query,valeu", anywhere=["value"])
    cases.train_with("target: not a layer to adapt", "dropout", targets="dropout")
    cases.train_with("target: of a method without any", "--targets", "houlsby", method="houlsby")
    cases.train_with("method: BitFit's biases and targets", "targets", method="bitfit:biases=[query],targets=[key]",
                     targets=None)
    cases.add("target: empty", ["train", "--model", cases.model, "--train", cases.train, "--method", "lora:rank=2",
                                "--targets", "", "--out", "OUT"], "target")
    for option, value in [("--batch-size", "0"), ("--batch-size", "x"), ("--steps", "-1"), ("--epochs", "-2"),
                          ("--lr", "fast"), ("--lr", "nan"), ("--lr", "-1"), ("--head-lr", "inf"), ("--warmup", "-1"),
                          ("--schedule", "steep"), ("--pooling", "max"), ("--dtype", "float12"), ("--device", "abacus"),
                          ("--accumulate", "0"), ("--dropout", "1.5"), ("--max-length", "0"), ("--max-length", "1"),
                          ("--max-length", "131"), ("--threads", "0"), ("--weight-decay", "-0.1"), ("--clip", "-1"),
                          ("--checkpoint-every", "-5"), ("--seed", "x"), ("--seed", "-1"),
                          ("--seed", "99999999999999999999"), ("--train-rows", "0")]:
        # Twice the same option would be an error of its own.
        given = {"--steps": "2", "--batch-size": "4"}
        given.pop(option, None)
        if option == "--epochs":
            given.pop("--steps")
        plain = [word for pair in given.items() for word in pair]
        cases.add(f"option: {option} {value}", ["train", "--model", cases.model, "--train", cases.train, "--method",
                                                "head", "--out", "OUT", *plain, option, value],
                  option.lstrip("-") if option != "--max-length" else "length")
    cases.add("option: schedules are listed", ["train", "--model", cases.model, "--train", cases.train, "--method",
                                               "head", "--out", "OUT", "--schedule", "steep"], "steep",
              anywhere=["constant", "linear", "cosine"])
    cases.train_with("option: unknown", "--epoks", extra=["--epoks", "2"])
    cases.add("option: unknown command", ["trian", "--model", cases.model], "trian", "train")
    cases.add("option: no command", [], "command")
    for missing in ["--model", "--train", "--method", "--out"]:
        arguments = ["train", "--model", cases.model, "--train", cases.train, "--method", "head", "--out", "OUT"]
        at = arguments.index(missing)
        cases.add(f"option: no {missing}", arguments[:at] + arguments[at + 2:], missing)
    cases.predict_with("option: predict without a text", "--text", "--data", "--inputs", adapter=cases.adapter, extra=[])
    cases.add("option: compare with one wrong method",
              ["compare", "--model", cases.model, "--train", cases.train, "--test", cases.train, "--method", "head",
               "--method", "lorra", "--steps", "2", "--out", "OUT"], "lorra", anywhere=methods)
    for pooling in ("cls", "mean"):
        cases.add(f"option: compare with methods that do not fit the model, {pooling}",
                  ["compare", "--model", cases.model, "--train", cases.train, "--test", cases.train, "--method", "lora",
                   "--method", "lora:targets=[qery]", "--method", "bitfit:biases=[valeu]", "--steps", "2", "--pooling",
                   pooling, "--out", "OUT"], "--method lora:targets=[qery]", "qery", "query",
                  anywhere=["--method bitfit:biases=[valeu]", "value"], nowhere=["method 1 of 3"])
    cases.add("option: a log in --out", ["train", "--model", cases.model, "--train", cases.train, "--method", "head",
                                         "--steps", "2", "--out", "OUT", "--log", "OUT/log.jsonl"], "--log")
    cases.add("option: merge without an adapter", ["merge", "--model", cases.model, "--out", "OUT"], "--adapter")


def add_model_cases(cases):
    def broken(name, change, *culprits, source=None, anywhere=(), train=None):
        folder = copied(source or cases.model, f"{cases.folder('models')}/{name.replace(' ', '_')}")
        change(folder)
        cases.train_with(f"model: {name}", *culprits, model=folder, anywhere=anywhere, train=train)

    def cut(file, size):
        return lambda folder: os.truncate(f"{folder}/{file}", size)

    def tensors(change):
        return lambda folder: edited_tensors(f"{folder}/model.safetensors", change)

    def settings(**changes):
        return lambda folder: edited_json(f"{folder}/config.json", **changes)

    cases.train_with("model: no such folder", cases.root + "/nowhere", model=cases.root + "/nowhere")
    cases.train_with("model: a file", cases.train, model=cases.train)
    for file in ["config.json", "model.safetensors", "tokenizer.json"]:
        broken(f"no {file}", lambda folder, file=file: os.remove(f"{folder}/{file}"), file)
        broken(f"{file} cut short", cut(file, 100), file)
        broken(f"{file} empty", cut(file, 0), file)
    size = os.path.getsize(f"{cases.model}/model.safetensors")
    broken("model.safetensors without its last byte", cut("model.safetensors", size - 1), "model.safetensors")
    broken("model.safetensors with a huge header",
           lambda folder: text_file(f"{folder}/model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors")
    broken("a number in words", settings(hidden_size="wide"), "config.json", "hidden_size")
    broken("heads that do not divide", settings(num_attention_heads=3), "config.json", "hidden_size")
    broken("sizes of another model", settings(intermediate_size=33), "model.safetensors",
           anywhere=["intermediate.dense.weight"])
    broken("another kind of model", settings(model_type="gpt9"), "config.json", "model_type")
    broken("unknown activation", settings(hidden_act="gleu"), "config.json", "hidden_act", anywhere=["gelu"])
    broken("config.json is a list", lambda folder: tiny.write_json(f"{folder}/config.json", []), "config.json")
    broken("tensor missing", tensors(lambda t: t.pop("encoder.layer.1.output.dense.weight")), "model.safetensors",
           "encoder.layer.1.output.dense.weight")
    broken("tensor unexpected", tensors(lambda t: t.update(stranger=tiny.tensor([1], [0]))), "model.safetensors",
           "stranger")
    broken("tensor of another shape", tensors(lambda t: t.update({"pooler.dense.bias": tiny.tensor([15], [0.0] * 15)})),
           "model.safetensors", "pooler.dense.bias")
    broken("tensor of another dtype",
           tensors(lambda t: t.update({"pooler.dense.bias": tiny.tensor([16], [0] * 16, "I64")})), "model.safetensors",
           "pooler.dense.bias")
    broken("fewer words than the config says", settings(vocab_size=80), "model.safetensors", "word_embeddings")

    def bigger_tokenizer(folder):
        value = tiny.tokenizer()
        value["model"]["vocab"]["zebra"] = len(tiny.VOCABULARY)
        tiny.write_json(f"{folder}/tokenizer.json", value)
    zebra = tiny.write_tsv(f"{cases.folder('models')}/zebra.tsv", [("cat", "a cat"), ("dog", "a zebra")])
    broken("tokenizer of another model", bigger_tokenizer, "tokens, but the model only", train=zebra)

    def unknown_tokenizer(folder):
        value = tiny.tokenizer()
        value["model"]["type"] = "WordLevel"
        tiny.write_json(f"{folder}/tokenizer.json", value)
    broken("unknown kind of tokenizer", unknown_tokenizer, "tokenizer.json", "WordLevel")
    broken("other labels than the data", lambda folder: None, "label", source=tiny.make_model(
        f"{cases.folder('models')}/five_labels", labels=5))


def add_adapter_cases(cases):
    def broken(name, change, *culprits, anywhere=()):
        folder = copied(cases.adapter, f"{cases.folder('adapters')}/{name.replace(' ', '_')}")
        change(folder)
        cases.predict_with(f"adapter: {name}", *culprits, adapter=folder, anywhere=anywhere)

    def settings(**changes):
        return lambda folder: edited_json(f"{folder}/adapter_config.json", **changes)

    def tensors(change):
        return lambda folder: edited_tensors(f"{folder}/adapter_model.safetensors", change)

    cases.predict_with("adapter: no such folder", "nowhere", adapter=cases.root + "/nowhere")
    cases.predict_with("adapter: a folder without an adapter", cases.model, adapter=cases.model)
    cases.predict_with("adapter: for another base", "adapter_model.safetensors", model=cases.wider,
                       adapter=cases.adapter)
    cases.add("adapter: for another base, merged", ["merge", "--model", cases.wider, "--adapter", cases.adapter, "--out",
                                                    "OUT"], "adapter_model.safetensors")
    cases.add("adapter: for another base, trained on", ["train", "--model", cases.wider, "--train", cases.train,
                                                        "--init-adapter", cases.adapter, "--out", "OUT"],
              "adapter_model.safetensors")
    cases.train_with("adapter: trained on with another rank", "rank", extra=["--init-adapter", cases.adapter])
    onward = ["train", "--model", cases.model, "--train", cases.train, "--init-adapter", cases.adapter]
    cases.add("adapter: targets beside it", [*onward, "--targets", "query", "--out", "OUT"], "--targets")
    cases.add("adapter: another pooling than its own", [*onward, "--pooling", "mean", "--out", "OUT"], "--pooling mean")
    cases.add("adapter: for another base, info", ["info", "--model", cases.wider, "--adapter", cases.adapter],
              "adapter_model.safetensors")
    for key, value in [("r", -1), ("r", 0), ("r", "eight"), ("r", 2.5), ("lora_alpha", "much"), ("lora_dropout", 2),
                       ("target_modules", 5), ("target_modules", ["qery"]), ("peft_type", "LOAR"), ("peft_type", None),
                       ("bias", "some"), ("use_rslora", "yes"), ("rank_pattern", [1]), ("modules_to_save", 3)]:
        word = value if isinstance(value, str) else None
        broken(f"{key} {json.dumps(value)}".replace('"', ""), settings(**{key: value}), "adapter_config.json",
               word or ("qery" if isinstance(value, list) and value == ["qery"] else key))
    broken("two bad values", settings(r=-1, lora_alpha="much"), "adapter_config.json", anywhere=["'r'", "lora_alpha"])
    for file in ["adapter_config.json", "adapter_model.safetensors"]:
        broken(f"no {file}", lambda folder, file=file: os.remove(f"{folder}/{file}"), file)
        broken(f"{file} cut short", lambda folder, file=file: os.truncate(f"{folder}/{file}", 60), file)
    a_factor = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    broken("tensor missing", tensors(lambda t: t.pop(a_factor)), "adapter_model.safetensors", anywhere=["query.lora_A"])
    broken("tensor unexpected", tensors(lambda t: t.update(stranger=tiny.tensor([1], [0]))),
           "adapter_model.safetensors", anywhere=["stranger"])
    broken("tensor of another shape", tensors(lambda t: t.update({a_factor: tiny.tensor([2, 8], [0.0] * 16)})),
           "adapter_model.safetensors", anywhere=["query.lora_A"])
    broken("tensor of another dtype", tensors(lambda t: t.update({a_factor: tiny.tensor([2, 16], [0] * 32, "I64")})),
           "adapter_model.safetensors", anywhere=["query.lora_A"])
    broken("head missing", tensors(lambda t: [t.pop(k) for k in list(t) if "classifier" in k]),
           "adapter_model.safetensors", anywhere=["classifier"])
    broken("settings cut short", lambda folder: os.truncate(f"{folder}/peft_finetune.json", 10), "peft_finetune.json")
    broken("settings with another pooling", lambda folder: edited_json(f"{folder}/peft_finetune.json", pooling="max"),
           "peft_finetune.json", "pooling")


def add_several_cases(cases):
    """Adapters that work together: prompts that vote, tasks that share a prompt, bottlenecks that are fused."""
    def fit(name, method, *arguments, model=None, train=None):
        out = f"{cases.folder('several')}/{name}"
        tiny.good("train", "--model", model or cases.model, "--train", train or cases.train, "--method", method, "--steps",
                  "2", "--batch-size", "4", "--out", out, *arguments)
        return out

    def table(name, rows):
        return tiny.write_tsv(f"{cases.folder('several')}/{name}.tsv", rows)

    horses = table("horses", [(label.replace("bird", "horse"), text) for label, text in tiny.rows(24)])
    short, long = (fit(f"prompt{n}", f"prompt_tuning:virtual_tokens={n}") for n in (3, 4))
    others = fit("horse_prompt", "prompt_tuning:virtual_tokens=3", train=horses)
    wide = fit("wide_prompt", "prompt_tuning:virtual_tokens=3", model=cases.wider)
    pooled = fit("pooled_prompt", "prompt_tuning:virtual_tokens=3", "--pooling", "mean")

    prompt = "prompt_tuning:virtual_tokens=3"
    cases.train_with("ensemble: of one", "--ensemble", "2", method=prompt, targets="", extra=["--ensemble", "1"])
    cases.train_with("ensemble: of LoRAs", "--ensemble", "lora", "prompt_tuning", extra=["--ensemble", "3"])
    cases.train_with("ensemble: longer than the model", "positions", "130", method="prompt_tuning:virtual_tokens=200",
                     targets="", extra=["--ensemble", "2"])
    cases.add("ensemble: of an adapter to go on from",
              ["train", "--model", cases.model, "--train", cases.train, "--init-adapter", short, "--ensemble", "2", "--out",
               "OUT"], "--ensemble", "--init-adapter")

    def vote(name, *culprits, folders, extra=("--text", "red cat")):
        adapters = [word for folder in folders for word in ("--adapter", folder)]
        cases.predict_with(f"ensemble: {name}", *culprits, extra=[*adapters, *extra])

    vote("other lengths", long, "4", "3", folders=[short, long])
    vote("no prompt", cases.adapter, "has no prompt", folders=[short, cases.adapter])
    vote("no prompt first", cases.adapter, "has no prompt", folders=[cases.adapter, short])
    vote("other labels", others, short, "horse", "bird", folders=[short, others])
    vote("other pooling", pooled, "mean", "cls", folders=[short, pooled])
    vote("another model's", wide, folders=[short, wide])
    vote("twice", short, "twice", folders=[short, long, short])
    vote("no such folder", cases.root + "/none", folders=[short, cases.root + "/none"])
    vote("ready batches", "--inputs", folders=[short, others], extra=["--inputs", cases.inputs])

    several = "multitask_prompt:virtual_tokens=3,rank=2"
    two = fit("two_tasks", several, "--train", cases.train)

    def tasks(name, *culprits, method=several, extra=(), **options):
        cases.train_with(f"tasks: {name}", *culprits, method=method, targets="", extra=extra, **options)

    tasks("other labels", horses, cases.train, "bird", "horse", extra=["--train", horses])
    tasks("one test file", "--test", "2", "1", extra=["--train", cases.train, "--test", cases.train])
    tasks("test files without tasks", "--test", "1", "2", extra=["--test", cases.train, "--test", cases.train])
    pairs = tiny.write_tsv(f"{cases.folder('several')}/pairs.tsv", tiny.rows(24, pairs=True), pairs=True)
    tasks("pairs", pairs, "two", extra=["--train", pairs])
    tasks("another method", "--train", "multitask_prompt", "prompt_tuning", method=prompt, extra=["--train", cases.train])
    tasks("an ensemble", "--ensemble", "--train", extra=["--train", cases.train, "--ensemble", "2"])
    source = f"multitask_prompt:source={two},init="
    tasks("source without init", "source", "init", method=f"multitask_prompt:source={two}")
    tasks("init without source", "source", "init", method="multitask_prompt:init=average_source_tasks")
    tasks("task of none", "source_task", method=source + "average_source_tasks,source_task=0")
    tasks("task there is not", "source_task", "0 to 1", "2", method=source + "exact_source_task,source_task=2")
    tasks("several from one", "tasks", "2", method=source + "exact_source_task", extra=["--train", cases.train])
    tasks("another length", "prompt_embeddings", method=source + "only_source_shared,virtual_tokens=5")
    tasks("another method's source", "prompt_embeddings",
          method=f"multitask_prompt:source={cases.adapter},init=only_source_shared")
    tasks("another model's source", "prompt_embeddings", method=f"multitask_prompt:source={wide},init=only_source_shared")
    tasks("no such source", "/none", method=f"multitask_prompt:source={cases.root}/none,init=only_source_shared")
    cases.predict_with("tasks: none chosen", "--task", two, "2", adapter=two)
    cases.predict_with("tasks: chosen beyond", "--task", "0 to 1", "2", adapter=two,
                       extra=["--text", "cat", "--task", "2"])
    cases.predict_with("tasks: chosen of none", "--task", "1", adapter=short, extra=["--text", "cat", "--task", "1"])

    one, wide_bottleneck = (fit(name, "pfeiffer:reduction_factor=4", model=model)
                            for name, model in (("bottleneck", None), ("wide_bottleneck", cases.wider)))

    def fused(name, *culprits, folders, keys="", **options):
        cases.train_with(f"fusion: {name}", "fusion", *culprits, method=f"fusion:adapters=[{','.join(folders)}]{keys}",
                         targets="", **options)

    cases.train_with("fusion: of nothing", "adapters", "two", method="fusion", targets="")
    fused("of one", "adapters", "two", "1", folders=[one])
    fused("no such folder", "/none", folders=[one, cases.root + "/none"])
    fused("of a LoRA", cases.adapter, "AdapterHub", folders=[one, cases.adapter])
    fused("of another model's", wide_bottleneck, folders=[one, wide_bottleneck])
    fused("of nothing projected", "query, key and value", folders=[one, one],
          keys=",query=false,key=false,value=false")
    fused("dropout of 1", "dropout", "1", folders=[one, one], keys=",dropout=1")
    whole = fit("fusion", f"fusion:adapters=[{one},{one}]")
    broken = copied(whole, f"{cases.folder('several')}/without")
    shutil.rmtree(f"{broken}/adapters/bottleneck-2")
    cases.predict_with("fusion: an adapter is missing", "bottleneck-2", adapter=broken)
    broken = copied(whole, f"{cases.folder('several')}/cut")
    os.truncate(f"{broken}/model_adapter_fusion.safetensors", 60)
    cases.predict_with("fusion: cut short", "model_adapter_fusion.safetensors", adapter=broken)
    broken = copied(whole, f"{cases.folder('several')}/headless", without=["model_head.safetensors"])
    cases.predict_with("fusion: no head", "model_head.safetensors", adapter=broken)


def add_inputs_cases(cases):
    def inputs(name, change, *culprits, command="train"):
        path = f"{cases.folder('inputs')}/{name.replace(' ', '_')}.safetensors"
        shutil.copy(cases.inputs, path)
        change(path)
        arguments = {"train": ["train", "--model", cases.model, "--method", "head", "--inputs", path, "--out", "OUT"],
                     "predict": ["predict", "--model", cases.headed, "--inputs", path, "--out", "OUT"]}[command]
        cases.add(f"inputs: {name} ({command})", arguments, os.path.basename(path), *culprits)

    def tensors(change):
        return lambda path: edited_tensors(path, change)

    def without(key):
        return tensors(lambda t: t.pop(key))

    inputs("cut short", lambda path: os.truncate(path, 90))
    inputs("text", lambda path: text_file(path, "label\ttext\n"))
    inputs("no ids", without("b1.input_ids"), "b1", "input_ids")
    inputs("no labels", without("b1.labels"), "b1", "labels")

    def gap(t):
        for key in [k for k in t if k.startswith("b1.")]:
            t["b2." + key[3:]] = t.pop(key)
    inputs("a gap", tensors(gap), "b1")
    for command in ["train", "predict"]:
        size = 4 * tiny.read_safetensors(cases.inputs)["b0.input_ids"][1][1]
        shape = [4, size // 4]
        inputs("id outside the vocabulary", tensors(lambda t: t.update(
            {"b0.input_ids": tiny.tensor(shape, [9999] * size, "I64")})), "b0", "input_ids", command=command)
        inputs("negative id", tensors(lambda t: t.update(
            {"b0.input_ids": tiny.tensor(shape, [-1] * size, "I64")})), "b0", "input_ids", command=command)
        inputs("ids as fractions", tensors(lambda t: t.update(
            {"b0.input_ids": tiny.tensor(shape, [1.5] * size)})), "b0", "input_ids", command=command)
        inputs("mask of another shape", tensors(lambda t: t.update(
            {"b0.attention_mask": tiny.tensor([4, 1], [1] * 4, "I64")})), "b0", "attention_mask", command=command)
        inputs("label outside the classes", tensors(lambda t: t.update(
            {"b0.labels": tiny.tensor([4], [0, 1, -5, 0], "I64")})), "b0", "labels", command=command)
        inputs("labels of another length", tensors(lambda t: t.update(
            {"b0.labels": tiny.tensor([3], [0, 1, 2], "I64")})), "b0", "labels", command=command)
        inputs("type outside the types", tensors(lambda t: t.update(
            {"b0.token_type_ids": tiny.tensor(shape, [2] * size, "I64")})), "b0", "token_type_ids", command=command)
        inputs("position outside the positions", tensors(lambda t: t.update(
            {"b0.position_ids": tiny.tensor(shape, [130] * size, "I64")})), "b0", "position_ids", command=command)
        inputs("unknown name", tensors(lambda t: t.update({"b0.inptu_ids": tiny.tensor([1], [1], "I64")})),
               "inptu_ids", command=command)
        inputs("longer than the model", tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith("b0")] and None or
                                                t.update({"b0.input_ids": tiny.tensor([1, 131], [6] * 131, "I64"),
                                                          "b0.labels": tiny.tensor([1], [0], "I64")})), "b0", "130",
               command=command)


# --- what needs more than one line -------------------------------------------------------------------------------

def without_privileges():
    """In the child: file permissions count for root too."""
    prctl_drop_bounding, dac_override, dac_read_search = 24, 1, 2
    libc = ctypes.CDLL(None)
    for capability in (dac_override, dac_read_search):
        libc.prctl(prctl_drop_bounding, capability, 0, 0, 0)


def existing_output(cases):
    problems = []
    for command in (["train", "--model", cases.model, "--train", cases.train, "--method", "head", "--steps", "2"],
                    ["merge", "--model", cases.model, "--adapter", cases.adapter]):
        out = f"{cases.folder('existing ' + command[0])}/out"
        os.makedirs(out)
        text_file(f"{out}/thesis.txt", "years of work")
        done = tiny.run(*command, "--out", out)
        problems += message_problems(done, [out], ["overwrite"])
        if files_below(out) != [f"{out}/thesis.txt"]:
            problems.append("the folder's content has changed: " + " ".join(files_below(out)))
    file = text_file(f"{cases.folder('existing')}/file", "years of work")
    done = tiny.run("train", "--model", cases.model, "--train", cases.train, "--method", "head", "--steps", "2", "--out",
                    file, "--overwrite")
    problems += message_problems(done, [file])
    if not os.path.isfile(file):
        problems.append("--overwrite replaced a file")
    return problems


def read_only_output(cases):
    parent = cases.folder("read only")
    os.chmod(parent, 0o555)
    problems = []
    try:
        probe = subprocess.run([sys.executable, "-c", f"open({parent + '/probe'!r}, 'w')"], capture_output=True,
                               preexec_fn=without_privileges if os.getuid() == 0 else None)
        if probe.returncode == 0:
            return ["cannot be tried: this user may write into folders without the right to"]
        for command, culprit in [
            (["train", "--model", cases.model, "--train", cases.train, "--method", "head", "--steps", "2", "--out"], "out"),
            (["merge", "--model", cases.model, "--adapter", cases.adapter, "--out"], "out"),
            (["predict", "--model", cases.model, "--adapter", cases.adapter, "--text", "cat", "--out"], "out"),
        ]:
            done = tiny.run(*command, f"{parent}/{culprit}",
                            preexec_fn=without_privileges if os.getuid() == 0 else None)
            problems += message_problems(done, [f"{parent}/{culprit}", "ermission denied"])
            if os.listdir(parent):
                problems.append("left behind: " + " ".join(os.listdir(parent)))
    finally:
        os.chmod(parent, 0o755)
    return problems


def half_written(folder):
    """What of the files under their final names is not complete."""
    problems = []
    for path in files_below(folder):
        try:
            if path.endswith(".safetensors"):
                tiny.read_safetensors(path)
            elif path.endswith(".json"):
                with open(path, encoding="utf-8") as file:
                    json.load(file)
        except Exception as error:  # whatever it is, the file is not whole
            if ".tmp-" not in path:
                problems.append(f"half-written: {path}: {error!r}")
    return problems


def full_disk(cases):
    """Files are limited to so many bytes, and where a small disk can be mounted that is filled too."""
    problems = []
    train = ["train", "--model", cases.model, "--train", cases.train, "--method", "lora:rank=4", "--targets",
             "query,value", "--steps", "3", "--batch-size", "4", "--out"]
    merge = ["merge", "--model", cases.model, "--adapter", cases.adapter, "--out"]
    predict = ["predict", "--model", cases.headed, "--inputs", cases.inputs, "--hidden", "--out"]
    for command, extra, limit in [(train, [], 1024), (train, ["--checkpoint-every", "1"], 4096), (merge, [], 8192),
                                  (predict, [], 512)]:
        parent = cases.folder(f"full disk {command[0]} {limit}")
        out = f"{parent}/out"
        # Python ignores the signal that otherwise ends the program, and so does the child.
        done = tiny.run(*command, out, *extra, restore_signals=False,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        problems += message_problems(done, ["out", "too large"])
        problems += half_written(parent)
        if command is not train or not extra:
            if os.listdir(parent):
                problems.append("left behind: " + " ".join(files_below(parent)))
    disk = cases.folder("small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        print("  no small disk can be mounted here; only the limit on the size of files was tried")
        return problems
    try:
        for command in (train, merge, predict):
            done = tiny.run(*command, f"{disk}/out")
            problems += message_problems(done, ["out", "No space left"])
            if os.listdir(disk):
                problems.append("left behind: " + " ".join(files_below(disk)))
    finally:
        subprocess.run(["umount", disk], check=True)
    return problems


def nan_loss(cases):
    """Training stops where the loss is no number, and keeps the last good checkpoint."""
    problems = []
    parent = cases.folder("nan")
    # Each step makes the weights 1e16 times as large, until they overflow.
    done = tiny.run("train", "--model", cases.model, "--train", cases.train, "--method", "full", "--lr", "1e8",
                    "--weight-decay", "1e8", "--steps", "20", "--batch-size", "4", "--schedule", "constant", "--clip", "0",
                    "--checkpoint-every", "1", "--out", f"{parent}/out")
    problems += message_problems(done, ["loss", "step"], ["checkpoint"])
    problems += half_written(parent)
    final = [path for path in files_below(parent) if os.path.basename(path) == "adapter_model.safetensors"]
    kept = [path for path in files_below(f"{parent}/out/checkpoint") if path.endswith(".safetensors")]
    if any("checkpoint" not in path for path in final):
        problems.append("an adapter is left under its final name: " + " ".join(final))
    if not kept:
        problems.append("no checkpoint is kept")
    for path in kept:
        for name, value in tiny.read_safetensors(path).items():
            if value[0] == "F32" and not all(map(math.isfinite, tiny.numbers(value))):
                problems.append(f"{path}: {name} is not finite")
    # A base that is no good from the first step on.
    model = copied(cases.model, f"{parent}/model")
    edited_tensors(f"{model}/model.safetensors", lambda t: t.update(
        {"embeddings.LayerNorm.bias": tiny.tensor([16], [math.nan] * 16)}))
    done = tiny.run("train", "--model", model, "--train", cases.train, "--method", "head", "--steps", "3", "--out",
                    f"{parent}/second")
    problems += message_problems(done, ["loss", "step 1"])
    if files_below(f"{parent}/second"):
        problems.append("left behind: " + " ".join(files_below(f"{parent}/second")))
    return problems


def other_arguments_on_resume(cases):
    """Only the same arguments may be resumed with, and what is there stays as it is."""
    out = f"{cases.folder('resume')}/out"
    arguments = ["train", "--model", cases.model, "--train", cases.train, "--method", "lora:rank=2", "--targets", "query",
                 "--steps", "20", "--batch-size", "4", "--checkpoint-every", "1", "--out", out]
    process = subprocess.Popen([tiny.program(), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not files_below(f"{out}/checkpoint"):
        pass
    process.kill()
    process.wait()
    if not files_below(f"{out}/checkpoint"):
        return ["there was no checkpoint in time"]
    before = {path: open(path, "rb").read() for path in files_below(f"{out}/checkpoint") if ".tmp-" not in path}
    problems = []
    for option, value in [("--method", "lora:rank=4"), ("--steps", "30"), ("--batch-size", "8"), ("--targets", "value")]:
        changed = list(arguments)
        changed[changed.index(option) + 1] = value
        done = tiny.run(*changed, "--resume")
        problems += message_problems(done, [option])
    done = tiny.run(*arguments, "--lr", "0.5", "--resume")
    problems += message_problems(done, ["--lr"])
    for path, content in before.items():
        if not os.path.exists(path) or open(path, "rb").read() != content:
            problems.append(f"{path} has changed")
    return problems


SPECIAL = [existing_output, read_only_output, full_disk, nan_loss, other_arguments_on_resume]


def main():
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    tiny.program()
    failures, count = 0, 0
    with tempfile.TemporaryDirectory() as root:
        cases = Cases(os.path.realpath(root))
        for add in (add_data_cases, add_option_cases, add_model_cases, add_adapter_cases, add_several_cases,
                    add_inputs_cases):
            add(cases)
        jobs = [(case[0], lambda case=case: cases.check(case)) for case in cases.cases]
        jobs += [(function.__name__.replace("_", " "), lambda function=function: function(cases)) for function in SPECIAL]
        jobs = [job for job in jobs if pattern in job[0]]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for (name, _), problems in zip(jobs, pool.map(lambda job: job[1](), jobs)):
                count += 1
                if problems:
                    failures += 1
                    print(f"FAILED {name}\n  " + "\n  ".join(problems).replace("\n", "\n  "), flush=True)
    print(f"{count} wrong inputs, {failures} failures")
    return 1 if failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
