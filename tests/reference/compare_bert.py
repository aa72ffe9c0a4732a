"""Compares our BERT with transformers', live, on random tiny configurations and on a real encoder.

    python tests/reference/compare_bert.py [--tool build/tests/bert-tool] [--encoder DIR] [--count 64] [--seed N]

--tool is by default the environment's PEFT_BERT_TOOL, --encoder PEFT_ENCODER or PEFT_MINILM, --seed random. Every
configuration (sizes, heads, layers, activation, token types, labels, kind of problem, epsilon; encoder with or without
pooler, classifiers of texts and of tokens, pre-training heads; one file or shards) gets random weights, is saved by
transformers, and runs random padded batches on both sides. Hidden states, pooler output, logits, loss and sentence
embedding must agree within 1e-5 of the largest value. A missing head must be drawn alike.

Exit status 0 only when nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import collections
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
KINDS = ["texts", "tokens", "encoder", "no_pooler", "pretraining", "masked_lm", "new_text_head", "new_token_head"]
HEADS = {"texts": transformers.BertForSequenceClassification, "tokens": transformers.BertForTokenClassification}
PROBLEMS = [None, "regression", "single_label_classification", "multi_label_classification"]


class Failure(Exception):
    pass


def random_config(rng):
    heads = rng.choice([1, 2, 3, 4, 5])
    labels = rng.randrange(1, 7)
    problem = rng.choice(PROBLEMS)
    if problem == "single_label_classification" and labels == 1:
        problem = None
    return transformers.BertConfig(
        vocab_size=rng.randrange(20, 200), hidden_size=heads * rng.choice([2, 4, 7, 8, 16]),
        num_hidden_layers=rng.randrange(1, 5), num_attention_heads=heads, intermediate_size=rng.randrange(5, 80),
        hidden_act=rng.choice(ACTIVATIONS), max_position_embeddings=rng.randrange(12, 40),
        type_vocab_size=rng.randrange(1, 4), layer_norm_eps=rng.choice([1e-12, 1e-8, 1e-5, 1e-3]),
        hidden_dropout_prob=rng.choice([0.0, 0.1]), attention_probs_dropout_prob=rng.choice([0.0, 0.1]),
        classifier_dropout=rng.choice([None, 0.0, 0.3]), initializer_range=rng.choice([0.02, 0.05, 0.1]),
        pad_token_id=rng.choice([0, 1, None]), num_labels=labels, problem_type=problem,
    )


def random_model(kind, config):
    classes = {**HEADS, "pretraining": transformers.BertForPreTraining, "masked_lm": transformers.BertForMaskedLM}
    model = (transformers.BertModel(config, add_pooling_layer=kind != "no_pooler") if kind not in classes
             else classes[kind](config))
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


def random_token_labels(rng, config, mask):
    labels = torch.randint(config.num_labels, mask.shape).masked_fill(mask == 0, -100)
    return labels.masked_fill(torch.rand(mask.shape) < 0.2, -100) if rng.random() < 0.5 else labels


def random_batches(rng, config, head, width, count=3):
    batches = []
    for _ in range(count):
        rows, time = rng.randrange(1, 6), rng.randrange(1, min(config.max_position_embeddings, 40) + 1)
        mask = torch.ones(rows, time, dtype=torch.long)
        for row in range(1, rows):
            length = rng.randrange(1, time + 1)
            mask[row] = (torch.arange(time) < length if rng.random() < 0.8 else torch.arange(time) >= time - length)
        batch = {}
        if rng.random() < 0.8:
            batch["input_ids"] = torch.randint(config.vocab_size, (rows, time))
        else:
            batch["inputs_embeds"] = torch.randn(rows, time, width)
        if rng.random() < 0.85:
            batch["attention_mask"] = mask
        if rng.random() < 0.6:
            batch["token_type_ids"] = torch.randint(config.type_vocab_size, (rows, time))
        if rng.random() < 0.3:
            batch["position_ids"] = torch.randint(config.max_position_embeddings, (rows, time))
        if head != "encoder" and rng.random() < 0.7:
            batch["labels"] = (random_labels(rng, config, rows) if head == "texts"
                               else random_token_labels(rng, config, mask))
        batches.append(batch)
    return batches


def expected(model, batch):
    encoder = getattr(model, "bert", model)
    encoder_batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        output = encoder(**encoder_batch, output_hidden_states=True)
        values = {"last_hidden_state": output.last_hidden_state}
        if output.pooler_output is not None:
            values["pooler_output"] = output.pooler_output
        for i, state in enumerate(output.hidden_states):
            values[f"hidden_states.{i}"] = state
        hidden = output.last_hidden_state
        mask = batch.get("attention_mask", torch.ones(hidden.shape[:2])).unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        values["embedding"] = torch.nn.functional.normalize(pooled, dim=1)
        if isinstance(model, tuple(HEADS.values())):
            problem = model.config.problem_type
            output = model(**batch)
            model.config.problem_type = problem  # forward fixes it to the first batch's
            values["logits"] = output.logits
            if output.loss is not None:
                values["loss"] = output.loss
    return values


def compare(tool, head, folder, model, batches, worst, scratch, extra=()):
    save_file({f"b{i}.{key}": value.contiguous() for i, batch in enumerate(batches) for key, value in batch.items()},
              f"{scratch}/inputs.safetensors")
    done = subprocess.run([tool, head, folder, f"{scratch}/inputs.safetensors", f"{scratch}/outputs.safetensors", *extra],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"the tool ended with {done.returncode}: {done.stderr.strip()[:2000]}")
    ours = load_file(f"{scratch}/outputs.safetensors")
    theirs = {f"b{i}.{key}": value for i, batch in enumerate(batches) for key, value in expected(model, batch).items()}
    if set(ours) != set(theirs):
        raise Failure(f"other outputs: {sorted(set(ours) ^ set(theirs))}")
    for name, value in theirs.items():
        if ours[name].shape != value.shape:
            raise Failure(f"{name}: {tuple(ours[name].shape)}, expected {tuple(value.shape)}")
        if value.isnan().all() and ours[name].isnan().all():
            continue  # a batch in which every label is ignored
        error = float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-6))
        kind = name.split(".")[1]
        worst[kind] = max(worst[kind], error)
        if not error <= TOLERANCE:
            raise Failure(f"{name}: relative error {error:.3g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_BERT_TOOL"))
    parser.add_argument("--encoder", default=os.environ.get("PEFT_ENCODER") or os.environ.get("PEFT_MINILM"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    if not arguments.tool:
        parser.error("--tool or PEFT_BERT_TOOL must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)

    worst, failures, tried = collections.defaultdict(float), 0, collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(arguments.count):
            config, kind = random_config(rng), KINDS[i % len(KINDS)]
            folder, extra = f"{scratch}/{i}", ()
            model = random_model(kind, config)
            sharded = rng.random() < 0.3
            model.save_pretrained(folder, **({"max_shard_size": "10KB"} if sharded else {}))
            head = {"new_text_head": "texts", "new_token_head": "tokens"}.get(kind, kind if kind in HEADS else "encoder")
            if kind.startswith("new_"):
                torch.manual_seed(i)
                model = HEADS[head].from_pretrained(
                    folder, num_labels=config.num_labels, problem_type=config.problem_type).eval()
                extra = (str(config.num_labels), str(i))
            elif kind in ("pretraining", "masked_lm"):
                model = model.bert
            batches = random_batches(rng, config, head, config.hidden_size)
            tried[kind] += 1
            tried["sharded"] += os.path.exists(f"{folder}/model.safetensors.index.json")
            try:
                compare(arguments.tool, head, folder, model, batches, worst, scratch, extra)
            except Failure as failure:
                failures += 1
                print(f"configuration {i} ({kind}): {failure}\n{config.to_json_string(use_diff=False)}")
        if arguments.encoder:
            model = transformers.BertModel.from_pretrained(arguments.encoder).eval()
            batches = random_batches(rng, model.config, "encoder", model.config.hidden_size, count=6)
            tried["real encoder"] += 1
            try:
                compare(arguments.tool, "encoder", arguments.encoder, model, batches, worst, scratch)
            except Failure as failure:
                failures += 1
                print(f"{arguments.encoder}: {failure}")

    print("tried: " + ", ".join(f"{count} {kind}" for kind, count in tried.items()))
    print("largest relative errors: " + ", ".join(f"{kind} {error:.2g}" for kind, error in sorted(worst.items())))
    print(f"{failures} failures" if failures else "all agree")
    return 1 if failures or not worst else 0


if __name__ == "__main__":
    sys.exit(main())
