"""Every method of peft-finetune: it trains on a tiny model, its saved adapter computes what the trained model did, and
merged it computes the same again.

    PEFT_FINETUNE=build/examples/peft-finetune python3 tests/finetune/test_methods.py [METHOD]

The methods are those the program names itself. Needs Python's own library only.
"""

import functools
import json
import os
import re
import sys
import tempfile
import xml.dom.minidom

import tiny_model as tiny
from run_tests import check, run_tests, tests_of

# Keys without a default.
KEYS = {"multitask_prompt": "virtual_tokens=4,rank=2", "trainable_tokens": "indices=[5,6,7]", "rand_uniform": "count=300", "hifi": "heads=1",
        "prompt_tuning": "virtual_tokens=4", "p_tuning": "virtual_tokens=4",
        "prefix": "length=4", "p_tuning_v2": "length=4",
        "compacter": "reduction_factor=2,phm_dim=2", "compacter++": "reduction_factor=2,phm_dim=2"}
# Methods that no weights can stand for.
UNMERGEABLE = {"prompt_tuning", "p_tuning", "prefix", "p_tuning_v2", "houlsby", "pfeiffer", "parallel", "scaled_parallel",
               "adapter_plus", "compacter", "compacter++", "mam", "unipelt", "multitask_prompt", "fusion"}
# Ways to start or train a method that are more than a number.
VARIANTS = [f"lora:rank=4,init={init}" for init in ("pissa", "pissa_niter", "olora", "orthogonal", "mica", "loftq", "eva",
                                                    "corda", "lora_ga")]
VARIANTS += ["bitfit:terms=[query,intermediate]", "top_layers:k=2", "fish:training=false,ratio=0.01,examples=5",
             "magnitude:smallest=true,per_layer=true,ratio=0.1", "hifi:heads=1,per_layer=false,energy=0.5,whole_outputs=true",
             "rand_uniform:count=200,targets=[query,word_embeddings]"]
VARIANTS += ["lora:lora_plus=4", "dora:init=pissa,rank=4,lora_plus=4", "lora:lora_plus=4,bias=lora_only"]
VARIANTS += ["prompt_tuning:virtual_tokens=3,init=vocabulary", "p_tuning:virtual_tokens=3,encoder=lstm",
             "prefix:length=3,projection=true,hidden_width=5,activation=relu", "p_tuning_v2:length=3,projection=true"]
VARIANTS += ["houlsby:size=3,gating=true,ln_before=true,ln_after=true,non_linearity=gelu", "pfeiffer:places=both,leave_out=[0]",
             "parallel:scaling=2,dropout=0.1,reduction_factor=1.5", "adapter_plus:stochastic_depth=0.2",
             "mam:length=3,size=2", "unipelt:length=3,rank=2,targets=[query]"]


def methods(place):
    """The names in the error for a method that does not exist."""
    done = tiny.run("train", "--model", place.model, "--inputs", place.inputs, "--method", "nonesuch", "--out",
                    f"{place.root}/nonesuch")
    return re.search(r"there are (.*)", done.stderr)[1].split(", ")


class Place:
    def __init__(self, root):
        self.root = root
        self.model = tiny.make_model(f"{root}/model", labels=3)
        self.inputs = tiny.write_batches(f"{root}/inputs.safetensors", 3, tiny.config())
        self.train = tiny.write_tsv(f"{root}/train.tsv", tiny.rows(40))
        self.base = logits(self, "base", "--model", self.model)
        fused = [f"{root}/{name}" for name in ("fused_a", "fused_b")]
        for seed, folder in enumerate(fused):
            tiny.good("train", "--model", self.model, "--inputs", self.inputs, "--steps", 2, "--method", "houlsby:lr=0.05",
                      "--seed", seed, "--out", folder)
        self.keys = {**KEYS, "fusion": f"adapters=[{','.join(fused)}]"}

    def log(self, path):
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def logits(place, name, *arguments):
    out = f"{place.root}/{name}.safetensors"
    tiny.good("predict", *arguments, "--inputs", place.inputs, "--out", out)
    return tiny.read_safetensors(out)


def test_method(place, method):
    name = re.sub("[^a-z_0-9]", "_", method)
    out = f"{place.root}/{name}"
    if method in place.keys:
        method += ":" + place.keys[method]
    method += ("," if ":" in method else ":") + "lr=0.05"
    tiny.good("train", "--model", place.model, "--inputs", place.inputs, "--test", place.inputs, "--steps", 3,
              "--method", method, "--log", f"{out}.jsonl", "--out", out)
    lines = place.log(f"{out}.jsonl")
    check([line["step"] for line in lines if "task_loss" in line] == [1, 2, 3], lines)
    evaluated = lines[-1]["loss"]

    saved = logits(place, f"{name}_saved", "--model", place.model, "--adapter", out)
    losses = [tiny.numbers(saved[f"b{i}.loss"])[0] for i in range(3)]
    check(abs(sum(losses) / 3 - evaluated) < 1e-5, f"the saved adapter's loss is {sum(losses) / 3}, trained {evaluated}")
    moved = max(tiny.largest_difference(saved[f"b{i}.logits"], place.base[f"b{i}.logits"]) for i in range(3))
    check(moved > 1e-3, f"three steps moved the logits by {moved}")

    merge = ["merge", "--model", place.model, "--adapter", out, "--out", f"{out}_merged"]
    if method.split(":")[0] in UNMERGEABLE:
        done = tiny.run(*merge)
        why = "not the same for all rows and tokens" if method.startswith("fusion") else "cannot be merged"
        check(done.returncode == 1 and why in done.stderr, (done.returncode, done.stderr))
        return
    tiny.good(*merge)
    alone = logits(place, f"{name}_alone", "--model", f"{out}_merged")
    for i in range(3):
        apart = tiny.largest_difference(alone[f"b{i}.logits"], saved[f"b{i}.logits"])
        check(apart < 2e-5, f"merged and adapted logits are {apart} apart")


def ranks_over_training(place, method, first, last):
    """The ranks that `train` shows: as a table on standard output, as a picture, and after `--resume` the same."""
    name = method.split(":")[0] + "_ranks"
    arguments = ["train", "--model", place.model, "--train", place.train, "--method", method, "--targets",
                 "query,value,output.dense", "--steps", 30, "--batch-size", 4, "--checkpoint-every", 10]
    out = f"{place.root}/{name}"
    done = tiny.good(*arguments, "--log", f"{out}.jsonl", "--out", out)
    lines = [line.split() for line in done.stdout.splitlines()]
    # query, value and two matrices named output.dense in each of two layers
    check(lines[0][-11:] == [str(3 * i) for i in range(11)] and len(lines) == 2 + 8 + 1, done.stdout)
    sums = [int(word) for word in lines[-1][1:]]
    check(lines[-1][0] == "sum" and (sums[0], sums[-1]) == (first, last), done.stdout)
    check(all(sum(int(line[-11 + i]) for line in lines[2:-1]) == sums[i] for i in range(11)), done.stdout)
    picture = xml.dom.minidom.parse(f"{out}/ranks.svg")
    titles = [node.firstChild.data for node in picture.getElementsByTagName("title")]
    check(any("rank" in title and "step" in title for title in titles), titles)
    for line in place.log(f"{out}.jsonl"):
        check("penalty" in line and abs(line["task_loss"] + line["penalty"] - line["loss"]) < 1e-12, line)
        check(line["penalty"] > 0, line)
    return done.stdout


def test_ranks_of_adalora(place):
    # 8 matrices of rank 4, then of 2 in the mean.
    ranks_over_training(place, "adalora:init_rank=4,target_rank=2,tinit=3,tfinal=6,delta_t=2,lr=0.02", 32, 16)


def test_ranks_of_increlora(place):
    # 8 matrices of rank 1, then of 3 in the mean.
    ranks_over_training(place, "increlora:rank=1,target_rank=3,incre_rank_num=1,top_h=4,init_warmup=4,incre_interval=3,"
                        "reg_orth_coef=0.1,lr=0.02", 8, 24)


def test_schedules_of_ranks_that_do_not_end(place):
    """Ranks that do not reach their target within the run are said to."""
    common = ["train", "--model", place.model, "--inputs", place.inputs, "--steps", 3]
    for name, method in [("adalora", "adalora:total_step=100,tinit=10,tfinal=20"),
                         ("increlora", "increlora:target_rank=8,init_warmup=0,incre_interval=2")]:
        done = tiny.good(*common, "--method", method, "--out", f"{place.root}/unending_{name}")
        check("note: " in done.stderr and "target" in done.stderr, done.stderr)


def test_compare_shows_ranks(place):
    out = f"{place.root}/compared"
    done = tiny.good("compare", "--model", place.model, "--inputs", place.inputs, "--test", place.inputs, "--steps", 3,
                     "--method", "lora:rank=2", "--method", "adalora:init_rank=4,target_rank=2", "--out", out)
    check("rank at step" in done.stdout and "adalora:init_rank=4" in done.stdout, done.stdout)
    check(os.path.exists(f"{out}/adalora/ranks.svg") and not os.path.exists(f"{out}/lora/ranks.svg"), os.listdir(out))
    tiny.good("compare", "--model", place.model, "--inputs", place.inputs, "--test", place.inputs, "--steps", 3,
              "--method", "lora:rank=2", "--out", out, "--overwrite")


def main():
    tiny.program()
    with tempfile.TemporaryDirectory() as root:
        place = Place(root)
        jobs = [(name, functools.partial(test_method, place, name)) for name in methods(place) + VARIANTS]
        jobs += [(name, functools.partial(test, place)) for name, test in tests_of(globals()) if test is not test_method]
        return run_tests(jobs)


if __name__ == "__main__":
    sys.exit(main())
