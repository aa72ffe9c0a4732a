"""Compares every family of encoders, for every task, with transformers, live, on random tiny configurations.

    python tests/reference/compare_encoders.py [--tool build/tests/encoder-tool] [--encoder DIR…] [--count 2] [--seed N]
                                               [--only bert]

--tool is by default the environment's PEFT_ENCODER_TOOL, --encoder PEFT_ENCODER or PEFT_MINILM, --seed random. Of every
family and kind --count configurations (sizes, heads, layers, activation, token types, labels, kind of problem, epsilon,
padding; one file or shards) get random weights, are saved by transformers, opened by load(), and run random batches on
both sides, padded and not. Hidden states, pooler output, logits, loss and sentence embedding must agree within 1e-5 of
the largest value. A missing head must be drawn alike, and what we write from a model's config alone must be the same
model to transformers.

Exit status 0 only when nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-5
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_10", "relu", "relu2", "relu6", "silu", "swish",
               "tanh", "sigmoid", "mish", "quick_gelu", "hardswish", "leaky_relu", "linear"]
PROBLEMS = [None, "regression", "single_label_classification", "multi_label_classification"]
TASKS = {"texts": "ForSequenceClassification", "tokens": "ForTokenClassification", "spans": "ForQuestionAnswering",
         "words": "ForMaskedLM"}


class Failure(Exception):
    pass


def stack_config(rng, name, pads, **more):
    heads = rng.choice([1, 2, 3, 4, 5])
    vocabulary = rng.randrange(20, 200)
    return getattr(transformers, f"{name}Config")(**{**dict(
        vocab_size=vocabulary, hidden_size=heads * rng.choice([2, 4, 7, 8, 16]), num_hidden_layers=rng.randrange(1, 5),
        num_attention_heads=heads, intermediate_size=rng.randrange(5, 80), hidden_act=rng.choice(ACTIVATIONS),
        max_position_embeddings=rng.randrange(12, 40), type_vocab_size=rng.randrange(1, 4),
        layer_norm_eps=rng.choice([1e-12, 1e-8, 1e-5, 1e-3]), hidden_dropout_prob=rng.choice([0.0, 0.1]),
        attention_probs_dropout_prob=rng.choice([0.0, 0.1]), classifier_dropout=rng.choice([None, 0.0, 0.3]),
        initializer_range=rng.choice([0.02, 0.05, 0.1]), pad_token_id=rng.choice(pads),
        tie_word_embeddings=rng.random() < 0.8), **more})


def deberta_config(rng):
    heads = rng.choice([1, 2, 3, 4])
    hidden, words = heads * rng.choice([2, 4, 8, 12]), rng.random() < 0.3
    more = {"embedding_size": rng.randrange(3, 24)} if words else {"legacy": rng.random() < 0.5}
    if rng.random() < 0.4:
        more.update(conv_kernel_size=rng.choice([1, 3, 5]), conv_act=rng.choice(ACTIVATIONS),
                    conv_groups=rng.choice([groups for groups in range(1, hidden + 1) if hidden % groups == 0]))
    if rng.random() < 0.7:
        more["position_buckets"] = rng.choice([2, 3, 4, 6, 8, 9, 16])
    if rng.random() < 0.5:
        more["attention_head_size"] = hidden // heads
    return transformers.DebertaV2Config(
        vocab_size=rng.randrange(20, 200), hidden_size=hidden, num_hidden_layers=rng.randrange(1, 4),
        num_attention_heads=heads, intermediate_size=rng.randrange(5, 60), hidden_act=rng.choice(ACTIVATIONS),
        max_position_embeddings=rng.randrange(12, 40), type_vocab_size=rng.choice([0, 0, 1, 3]),
        layer_norm_eps=rng.choice([1e-12, 1e-7, 1e-5]), initializer_range=rng.choice([0.02, 0.05, 0.1]),
        pad_token_id=rng.choice([0, 1, None]), relative_attention=rng.random() < 0.85,
        max_relative_positions=rng.choice([-1, -1, 0, 11, 25, 64]), position_biased_input=rng.random() < 0.5,
        pos_att_type=rng.choice([None, "p2c|c2p", "C2P | p2c", ["p2c", "c2p"], ["c2p"], "p2c", []]),
        share_att_key=rng.random() < 0.5, norm_rel_ebd=rng.choice(["layer_norm", "none"]),
        cls_dropout=rng.choice([None, 0.0, 0.3]), pooler_hidden_act=rng.choice(ACTIVATIONS), **more)


# name: what transformers' classes begin with; base: the encoder's name in a model with a head; kinds: beside TASKS
Family = collections.namedtuple("Family", "name base kinds config")
FAMILIES = {
    "bert": Family("Bert", "bert", ["encoder", "no_pooler", "pretraining"],
                   lambda rng: stack_config(rng, "Bert", [0, 1, None])),
    **{model_type: Family(name, "roberta", ["encoder", "no_pooler"],
                          lambda rng, name=name: stack_config(rng, name, [0, 1, 3]))
       for model_type, name in [("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert")]},
    "deberta-v2": Family("DebertaV2", "deberta", ["encoder"], deberta_config),
}


def random_config(rng, family, kind):
    config = family.config(rng)
    config.num_labels = 2 if "spans" in kind else rng.randrange(1, 7)
    config.problem_type = rng.choice(PROBLEMS)
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        config.problem_type = None
    return config


def transformers_class(family, kind):
    ends = {**TASKS, "encoder": "Model", "no_pooler": "Model", "pretraining": "ForPreTraining"}
    return getattr(transformers, family.name + ends[kind])


def random_model(family, kind, config):
    more = {"add_pooling_layer": False} if kind == "no_pooler" else {}
    model = transformers_class(family, "encoder" if kind.startswith("new_") else kind)(config, **more)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be mixed up
            parameter += config.initializer_range * torch.randn_like(parameter)
    return model.eval()


def random_labels(rng, config, rows):
    problem = config.problem_type
    if problem is None:
        problem = "regression" if config.num_labels == 1 else rng.choice(PROBLEMS[2:])
    if problem == "single_label_classification":
        labels = torch.randint(config.num_labels, (rows,))
        if rows > 1 and rng.random() < 0.3:
            labels[0] = -100
        return labels
    if problem == "regression" and config.num_labels == 1:
        return torch.randn(rows)
    return torch.rand(rows, config.num_labels)


def random_token_labels(rng, count, mask):
    labels = torch.randint(count, mask.shape).masked_fill(mask == 0, -100)
    return labels.masked_fill(torch.rand(mask.shape) < 0.2, -100) if rng.random() < 0.5 else labels


def add_labels(rng, batch, config, task, mask):
    rows, time = mask.shape
    if task == "texts":
        batch["labels"] = random_labels(rng, config, rows)
    elif task in ("tokens", "words"):
        batch["labels"] = random_token_labels(rng, config.vocab_size if task == "words" else config.num_labels, mask)
    elif task == "spans":
        batch["start_positions"] = torch.randint(-1, time + 2, (rows,))  # in the text and not
        batch["end_positions"] = torch.randint(-1, time + 2, (rows, 1))


def random_batches(rng, config, task, count=3):
    batches = []
    padding, counts_real = config.pad_token_id, config.model_type not in ("bert", "deberta-v2")
    longest = config.max_position_embeddings - (padding + 1 if counts_real else 0)
    if not getattr(config, "position_biased_input", True):
        longest = 60  # distances have no end
    for _ in range(count):
        rows, time = rng.randrange(1, 6), rng.randrange(1, min(longest, 60) + 1)
        mask = torch.ones(rows, time, dtype=torch.long)
        for row in range(1, rows):
            length = rng.randrange(1, time + 1)
            mask[row] = (torch.arange(time) < length if rng.random() < 0.8 else torch.arange(time) >= time - length)
        batch = {}
        if rng.random() < 0.8:
            batch["input_ids"] = torch.randint(config.vocab_size, (rows, time))
            if padding is not None and rng.random() < 0.7:
                batch["input_ids"].masked_fill_(mask == 0, padding)
        else:
            batch["inputs_embeds"] = torch.randn(rows, time, getattr(config, "embedding_size", config.hidden_size))
        if rng.random() < 0.85:
            batch["attention_mask"] = mask
        if rng.random() < 0.6:
            batch["token_type_ids"] = torch.randint(max(config.type_vocab_size, 1), (rows, time))
        if rng.random() < 0.3:
            batch["position_ids"] = torch.randint(config.max_position_embeddings, (rows, time))
        if rng.random() < 0.7:
            add_labels(rng, batch, config, task, mask)
        batches.append(batch)
    return batches


def expected(family, model, batch):
    encoder = getattr(model, family.base, model)
    encoder_batch = {key: value for key, value in batch.items() if key != "labels" and not key.endswith("_positions")}
    with torch.no_grad():
        output = encoder(**encoder_batch, output_hidden_states=True)
        values = {"last_hidden_state": output.last_hidden_state}
        if getattr(output, "pooler_output", None) is not None:
            values["pooler_output"] = output.pooler_output
        for i, state in enumerate(output.hidden_states):
            values[f"hidden_states.{i}"] = state
        hidden = output.last_hidden_state
        mask = batch.get("attention_mask", torch.ones(hidden.shape[:2])).unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        values["embedding"] = torch.nn.functional.normalize(pooled, dim=1)
        if encoder is not model:
            problem = model.config.problem_type
            output = model(**batch)
            model.config.problem_type = problem  # forward fixes it to the first batch's
            values.update({key: output[key] for key in ["logits", "start_logits", "end_logits", "loss"] if key in output})
            if "logits" in values and values["logits"].dim() == 1:
                values["logits"] = values["logits"].unsqueeze(1)  # as DeBERTa gives a regression's, if asked for its loss
    return values


class Comparison:
    def __init__(self, scratch):
        self.scratch, self.jobs, self.cases = scratch, [], []
        self.worst, self.tried, self.failures = collections.defaultdict(float), collections.Counter(), 0

    def add(self, title, family, folder, model, batches, job):
        """What the tool will run, and what it must give."""
        i = len(self.jobs)
        save_file({f"b{n}.{key}": value.contiguous() for n, batch in enumerate(batches) for key, value in batch.items()},
                  f"{self.scratch}/inputs{i}.safetensors")
        theirs = {f"b{n}.{key}": value for n, batch in enumerate(batches)
                  for key, value in expected(family, model, batch).items()}
        self.jobs.append({"model": folder, "inputs": f"{self.scratch}/inputs{i}.safetensors",
                          "outputs": f"{self.scratch}/outputs{i}.safetensors", **job})
        self.cases.append((title, family, model, batches, theirs))

    def add_random(self, rng, model_type, kind, i):
        family, folder = FAMILIES[model_type], f"{self.scratch}/{model_type}-{kind}-{i}"
        config, new = random_config(rng, family, kind), kind.startswith("new_")
        task = kind.removeprefix("new_")
        model = random_model(family, kind, config)
        model.save_pretrained(folder, **({"max_shard_size": "10KB"} if rng.random() < 0.3 else {}))
        self.tried["in shards"] += os.path.exists(f"{folder}/model.safetensors.index.json")
        job = {"save": f"{folder}-ours"}
        if new:
            torch.manual_seed(i)
            model = transformers_class(family, task).from_pretrained(
                folder, num_labels=config.num_labels, problem_type=config.problem_type).eval()
            job = {"task": task, "seed": i, **({"labels": config.num_labels} if task in ("texts", "tokens") else {})}
        elif kind == "pretraining":
            model, task, job = getattr(model, family.base), "encoder", {"task": "encoder"}
        elif kind == "no_pooler":
            task = "encoder"
        batches = random_batches(rng, config, task)
        self.tried[f"{model_type} {kind}"] += 1
        self.add(f"{model_type}, {kind}, {i}\n{config.to_json_string(use_diff=False)}", family, folder, model, batches, job)

    def run(self, tool):
        with open(f"{self.scratch}/jobs.json", "w") as file:
            json.dump(self.jobs, file)
        done = subprocess.run([tool, f"{self.scratch}/jobs.json"], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0 or len(answers) != len(self.jobs):
            raise RuntimeError(f"the tool ended with {done.returncode} after {len(answers)} jobs: {done.stderr[-2000:]}")
        for answer, job, (title, family, model, batches, theirs) in zip(answers, self.jobs, self.cases):
            try:
                if "error" in answer:
                    raise Failure(answer["error"][:2000])
                self.compare(load_file(job["outputs"]), theirs)
                if "save" in job:
                    self.compare_written(family, job["save"], model, batches, theirs)
            except Failure as failure:
                self.failures += 1
                print(f"{failure}\n{title}")

    def compare(self, ours, theirs):
        if set(ours) != set(theirs):
            raise Failure(f"other outputs: {sorted(set(ours) ^ set(theirs))}")
        for name, value in theirs.items():
            if ours[name].shape != value.shape:
                raise Failure(f"{name}: {tuple(ours[name].shape)}, expected {tuple(value.shape)}")
            if value.isnan().all() and ours[name].isnan().all():
                continue  # a batch in which every label is ignored
            error = float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-6))
            kind = name.split(".")[1]
            self.worst[kind] = max(self.worst[kind], error)
            if not error <= TOLERANCE:
                raise Failure(f"{name}: relative error {error:.3g}")

    def compare_written(self, family, folder, model, batches, theirs):
        again, said = type(model).from_pretrained(folder, output_loading_info=True)
        if said["missing_keys"] and not (hasattr(again, "pooler") and again.pooler and not model.pooler):
            raise Failure(f"transformers misses {said['missing_keys']} in what we wrote")
        if said["unexpected_keys"]:
            raise Failure(f"transformers does not know {said['unexpected_keys']} in what we wrote")
        if hasattr(again, "pooler") and model.pooler is None:
            again.pooler = None
        self.compare({f"b{n}.{key}": value for n, batch in enumerate(batches)
                      for key, value in expected(family, again.eval(), batch).items()}, theirs)
        self.tried["written from their config"] += 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_ENCODER_TOOL"))
    parser.add_argument("--encoder", nargs="*", default=list(filter(None, [
        os.environ.get("PEFT_ENCODER") or os.environ.get("PEFT_MINILM")])))
    parser.add_argument("--count", type=int, default=2, help="configurations of each family and kind")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--only", help="one family")
    arguments = parser.parse_args()
    if not arguments.tool:
        parser.error("--tool or PEFT_ENCODER_TOOL must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the models are too small for more

    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(scratch)
        for model_type, family in FAMILIES.items():
            kinds = [*TASKS, *(f"new_{task}" for task in TASKS), *family.kinds]
            for i in range(arguments.count * len(kinds) if arguments.only in (None, model_type) else 0):
                comparison.add_random(rng, model_type, kinds[i % len(kinds)], i)
        for folder in arguments.encoder:
            model = transformers.AutoModel.from_pretrained(folder).eval()
            comparison.tried["real encoder"] += 1
            comparison.add(folder, FAMILIES[model.config.model_type], folder, model,
                           random_batches(rng, model.config, "encoder", count=6), {"task": "encoder"})
        comparison.run(arguments.tool)

    print("tried: " + ", ".join(f"{count} {kind}" for kind, count in comparison.tried.items()))
    print("largest relative errors: " + ", ".join(f"{kind} {error:.2g}" for kind, error in sorted(comparison.worst.items())))
    print(f"{comparison.failures} failures" if comparison.failures else "all agree")
    return 1 if comparison.failures or not comparison.worst else 0


if __name__ == "__main__":
    sys.exit(main())
