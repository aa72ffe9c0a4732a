"""peft-finetune combine: wrong input, of which nothing may be left at --out, and runs whose results are computed here.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_combine.py

Needs Python's own library only; tests/reference/compare_combine.py compares with Python PEFT.
"""

import json
import os
import random
import sys
import tempfile

import tiny_model as tiny

INTERNALS = ["Exception raised from", "frame #", "terminate called", ".cpp:", ".h:", "c10::", "std::"]


def adapter(folder, seed=0, rank=2, alpha=4, names=("query", "value"), width=4, change=None, **config):
    """A LoRA's folder as Python PEFT writes it."""
    rng = random.Random(seed)
    os.makedirs(folder)
    tensors = {}
    for name in names:
        for factor, shape in (("lora_A", [rank, width]), ("lora_B", [width, rank])):
            values = [rng.gauss(0, 1) for _ in range(shape[0] * shape[1])]
            tensors[f"base_model.model.layer.{name}.{factor}.weight"] = tiny.tensor(shape, values)
    if change:
        change(tensors)
    tiny.write_safetensors(f"{folder}/adapter_model.safetensors", tensors)
    tiny.write_json(f"{folder}/adapter_config.json",
                    {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(names), **config})
    return folder


def vectors(folder, values, **config):
    """An (IA)³'s folder, one vector on a layer's outputs."""
    os.makedirs(folder)
    key = "base_model.model.layer.value.ia3_l"
    tiny.write_safetensors(f"{folder}/adapter_model.safetensors", {key: tiny.tensor([len(values), 1], values)})
    tiny.write_json(f"{folder}/adapter_config.json", {"peft_type": "IA3", "target_modules": ["value"],
                                                      "feedforward_modules": [], **config})
    return folder


def matrix(value):
    rows, columns = value[1]
    flat = tiny.numbers(value)
    return [flat[i * columns:(i + 1) * columns] for i in range(rows)]


def change_of(folder, name, factor=None):
    """s B A of one layer, flat."""
    tensors = tiny.read_safetensors(f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file)
    A, B = (matrix(tensors[f"base_model.model.layer.{name}.{f}.weight"]) for f in ("lora_A", "lora_B"))
    s = config["lora_alpha"] / config["r"] if factor is None else factor
    return [s * sum(B[i][k] * A[k][j] for k in range(len(A))) for i in range(len(B)) for j in range(len(A[0]))]


def close(got, expected, tolerance=1e-5):
    assert len(got) == len(expected), (len(got), len(expected))
    worst = max(abs(a - b) for a, b in zip(got, expected))
    assert worst < tolerance, worst


def not_a_number(tensors):
    key = next(iter(tensors))
    tensors[key] = tiny.tensor(tensors[key][1], [float("nan")] * len(tiny.numbers(tensors[key])))


def wrong_inputs(root):
    a, b = adapter(f"{root}/a"), adapter(f"{root}/b", seed=1)
    rank3 = adapter(f"{root}/rank3", rank=3)
    wide = adapter(f"{root}/wide", width=6)
    shifted = adapter(f"{root}/shifted", names=("self.query",))
    nan = adapter(f"{root}/nan", change=not_a_number)
    damaged = adapter(f"{root}/damaged")
    with open(f"{damaged}/adapter_model.safetensors", "r+b") as file:
        file.truncate(40)
    dora = adapter(f"{root}/dora", use_dora=True)
    loha = adapter(f"{root}/loha", peft_type="LOHA")
    ia3 = vectors(f"{root}/ia3", [1.5, 0.5, 1, 2])
    missing = adapter(f"{root}/missing", change=lambda tensors: tensors.popitem())
    empty = os.path.join(root, "empty")
    os.makedirs(empty)
    linear = ["--type", "linear"]

    def case(arguments, *culprits):
        out = f"{root}/out"
        done = tiny.run("combine", *arguments, "--out", out)
        assert done.returncode not in (0, 77) and done.returncode > 0, (arguments, done.returncode, done.stderr)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
        for culprit in culprits:
            assert culprit in lines[0], (arguments, culprit, done.stderr)
        assert not any(text in done.stderr for text in INTERNALS), done.stderr
        assert not os.path.exists(out), arguments
        return 1

    both = ["--adapter", f"{a}:0.5", "--adapter", f"{b}:0.5"]
    count = case(linear, "--adapter")
    count += case(both, "--type")
    count += case(both + ["--type", "sum"], "--type", "sum")
    count += case(["--adapter", a, *linear], "--adapter", "DIR:WEIGHT", a)
    count += case(["--adapter", f"{a}:", *linear], "weight", a)
    for weight in ("half", "1x", "nan", "inf", "1e999"):
        count += case(["--adapter", f"{a}:{weight}", *linear], "must be a finite number", weight)
    count += case(["--adapter", f"{root}/nowhere:1", *linear], "--adapter", "nowhere")
    count += case(["--adapter", f"{empty}:1", *linear], "adapter_config.json")
    for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"):
        count += case(both + ["--type", kind], "--density must be given", kind)
    for density in ("0", "-0.5", "1.5", "nan", "much"):
        count += case(both + ["--type", "ties", "--density", density], "density")
    for rank in ("0", "-1", "two"):
        count += case(both + ["--type", "svd", "--rank", rank], "--rank")
    count += case(both + ["--type", "ties", "--density", "0.5", "--sign", "both"], "--sign")
    count += case(both + linear + ["--model", "m"], "--model")
    count += case(["--adapter", f"{a}:1", "--adapter", f"{rank3}:1", *linear], "one rank for 'linear'", a, rank3)
    count += case(["--adapter", f"{a}:1", "--adapter", f"{wide}:1", *linear], "layer.query", "4 → 4", "6 → 6")
    count += case(["--adapter", f"{a}:1", "--adapter", f"{nan}:1", *linear], "NaN", nan)
    count += case(["--adapter", f"{damaged}:1", *linear], "adapter_model.safetensors")
    count += case(["--adapter", f"{missing}:1", *linear], "adapter_model.safetensors", "missing")
    count += case(["--adapter", f"{a}:1", "--adapter", f"{shifted}:1", *linear], "adapter_model.safetensors")
    count += case(["--adapter", f"{dora}:1", *linear], dora, "DoRA")
    count += case(["--adapter", f"{loha}:1", *linear], loha, "LOHA")
    count += case(["--adapter", f"{a}:1", "--adapter", f"{ia3}:1", *linear], "of one method", a, ia3)
    count += case(["--adapter", f"{ia3}:1", "--adapter", f"{ia3}:1", "--type", "svd"], "(IA)³", "'svd'")
    count += case(both + linear + ["--head", ia3], "--head", ia3)
    for arguments, culprit in ((["--out", a], "not empty"), (["--out", a, "--overwrite"], "read from")):
        done = tiny.run("combine", *both, *linear, *arguments)
        assert done.returncode == 1 and culprit in done.stderr, done.stderr
        count += 1
    other = f"{root}/other"
    os.makedirs(other)
    with open(f"{other}/letter.txt", "w", encoding="utf-8") as file:
        file.write("mine")
    done = tiny.run("combine", *both, *linear, "--out", other, "--overwrite")
    assert done.returncode == 1 and "holds no adapter" in done.stderr, done.stderr
    assert os.listdir(other) == ["letter.txt"]
    print(f"{count + 1} wrong inputs")


def runs(root):
    a, b, rank3 = adapter(f"{root}/a"), adapter(f"{root}/b:1", seed=1, alpha=3), adapter(f"{root}/c", seed=2, rank=3)
    for kind in ("cat", "exact"):
        out = f"{root}/{kind}"
        tiny.good("combine", "--adapter", f"{a}:0.7", "--adapter", f"{b}:-0.2", "--adapter", f"{rank3}:1e-1", "--type", kind,
                  "--out", out)
        for name in ("query", "value"):
            expected = [0.7 * x - 0.2 * y + 0.1 * z for x, y, z in
                        zip(change_of(a, name), change_of(b, name), change_of(rank3, name))]
            close(change_of(out, name), expected)
        with open(f"{out}/adapter_config.json", encoding="utf-8") as file:
            config = json.load(file)
        assert config["r"] == config["lora_alpha"] == 7, config
        assert sorted(config["target_modules"]) == ["query", "value"], config
    done = tiny.good("combine", "--adapter", f"{a}:0.7", "--adapter", f"{rank3}:0.3", "--type", "svd", "--rank", 4, "--density",
                     0.5, "--out", f"{root}/svd")
    assert "--density is not used" in done.stderr, done.stderr
    close(change_of(f"{root}/svd", "query"), [0.7 * x + 0.3 * y for x, y in zip(change_of(a, "query"), change_of(rank3, "query"))])
    tiny.good("combine", "--adapter", f"{a}:-0.5", "--type", "ties", "--density", 0.5, "--out", f"{root}/minus")
    close(change_of(f"{root}/minus", "value"), [-0.5 * x for x in change_of(a, "value")])
    dare = ["combine", "--adapter", f"{a}:1", "--adapter", f"{b}:1", "--type", "dare_ties", "--density", 0.5, "--out"]
    files = []
    for out, seed in (("one", 1), ("two", 2), ("again", 1)):
        tiny.good(*dare, f"{root}/{out}", "--seed", seed)
        files.append(tiny.read_safetensors(f"{root}/{out}/adapter_model.safetensors"))
    assert files[0] == files[2] != files[1]
    tiny.good(*dare, f"{root}/one", "--overwrite", "--seed", 2)
    assert tiny.read_safetensors(f"{root}/one/adapter_model.safetensors") == files[1]

    first, second = vectors(f"{root}/l1", [1.5, 0.5, 1, 2]), vectors(f"{root}/l2", [2, 1, 0, -1])
    key = "base_model.model.layer.value.ia3_l"
    for kind, about in (("linear", 0), ("pem", 1)):
        tiny.good("combine", "--adapter", f"{first}:0.7", "--adapter", f"{second}:0.5", "--type", kind, "--out",
                  f"{root}/l_{kind}")
        got = tiny.numbers(tiny.read_safetensors(f"{root}/l_{kind}/adapter_model.safetensors")[key])
        close(got, [about + 0.7 * (x - about) + 0.5 * (y - about) for x, y in zip([1.5, 0.5, 1, 2], [2, 1, 0, -1])], 1e-6)
    print("results as computed")


def trained(root):
    """Adapters this program trained, with heads inside and outside the model, and biases alone."""
    model, data = tiny.make_model(f"{root}/model"), tiny.write_tsv(f"{root}/train.tsv", tiny.rows(24))
    texts = ["--text", "the red cat", "--model", model]
    common = ["train", "--model", model, "--train", data, "--steps", 3, "--batch-size", 4, "--lr", 0.05]
    for pooling in ("cls", "mean"):
        for i in (1, 2):
            tiny.good(*common, "--method", "lora:rank=2", "--targets", "query,value", "--pooling", pooling, "--seed", i, "--out",
                      f"{root}/{pooling}{i}")
        both = ["combine", "--adapter", f"{root}/{pooling}1:0.7", "--adapter", f"{root}/{pooling}2:0.3", "--type", "linear"]
        if pooling == "cls":
            done = tiny.run(*both, "--out", f"{root}/none")
            assert done.returncode == 1 and "'classifier'" in done.stderr and "--head" in done.stderr, done.stderr
            assert "cls1'" in done.stderr and not os.path.exists(f"{root}/none"), done.stderr
        else:
            done = tiny.good(*both, "--out", f"{root}/none")
            assert "no head" in done.stderr and "--head" in done.stderr, done.stderr
        tiny.good(*both, "--head", f"{root}/{pooling}2", "--out", f"{root}/{pooling}")
        labels = tiny.good("predict", *texts, "--adapter", f"{root}/{pooling}").stdout
        assert "%" in labels, labels
    for i in (1, 2):
        tiny.good(*common, "--method", "bitfit", "--pooling", "mean", "--seed", i, "--out", f"{root}/bitfit{i}")
    out = ["--type", "linear", "--head", f"{root}/bitfit1", "--out", f"{root}/bitfit"]
    done = tiny.run("combine", "--adapter", f"{root}/bitfit1:0.7", "--adapter", f"{root}/bitfit2:0.7", *out)
    assert done.returncode == 1 and "must add up to 1" in done.stderr, done.stderr
    tiny.good("combine", "--adapter", f"{root}/bitfit1:0.75", "--adapter", f"{root}/bitfit2:0.25", *out)
    files = [tiny.read_safetensors(f"{root}/{name}/adapter_model.safetensors") for name in ("bitfit1", "bitfit2", "bitfit")]
    for key in files[2]:
        first, second, sum_ = (tiny.numbers(file[key]) for file in files)
        close(sum_, [0.75 * x + 0.25 * y for x, y in zip(first, second)], 1e-6)
    tiny.good("predict", *texts, "--adapter", f"{root}/bitfit")
    print("trained adapters combine and predict")


def main():
    tiny.program()
    with tempfile.TemporaryDirectory() as root:
        for part in (wrong_inputs, runs, trained):
            os.makedirs(f"{root}/{part.__name__}")
            part(f"{root}/{part.__name__}")


if __name__ == "__main__":
    sys.exit(main())
