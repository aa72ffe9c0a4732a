"""Compares our GPT-2 with transformers', live, on random tiny models and on random LoRAs of PEFT's.

    python tests/reference/compare_gpt2.py [--tool build/tests/gpt2-tool] [--count 40] [--prompts 50] [--seed N]

--tool is by default the environment's PEFT_GPT2_TOOL, --seed random. Every model (sizes, heads, layers, activation,
scaling, ties; with or without head, base prefix, a head of its own, buffers of older versions, shards) gets random
weights and is saved by transformers. On both sides it runs random batches padded on either side, whole and in chunks
through the cache, and goes on with random prompts padded on the left: greedily, with and without the cache, and by
sampling from the same seed. Some carry a LoRA or trained tokens that Python wrote; ours writes it again, and the merged
model, and Python reads both. Hidden states, logits and losses must agree within 1e-5 of the largest value (5e-5
once merged), texts token for token, adapters in every key and value.

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
import warnings

try:
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore")

TOLERANCE, MERGED = 1e-5, 5e-5
ACTIVATIONS = ["gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu", "tanh"]
KINDS = ["language model", "lora", "base", "lora", "without prefix", "untied", "own head", "shards"]
TARGETS = [["c_attn"], ["c_attn", "c_proj"], ["c_fc", "mlp.c_proj"], "all-linear", ["wte"], ["lm_head"], ["c_attn", "wpe"]]


class Failure(Exception):
    pass


def random_config(rng, kind):
    heads = rng.choice([1, 2, 3, 4])
    return transformers.GPT2Config(
        vocab_size=rng.randrange(20, 120), n_positions=rng.randrange(24, 48), n_embd=heads * rng.choice([2, 4, 6, 8, 16]),
        n_layer=rng.randrange(1, 5), n_head=heads, n_inner=rng.choice([None, rng.randrange(5, 60)]),
        activation_function=rng.choice(ACTIVATIONS), layer_norm_epsilon=rng.choice([1e-8, 1e-5, 1e-3]),
        initializer_range=rng.choice([0.05, 0.1, 0.3]), scale_attn_weights=rng.random() < 0.8,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=rng.choice([None, 0]), tie_word_embeddings=kind != "untied",
    )


def random_model(kind, config):
    model = (transformers.GPT2Model if kind == "base" else transformers.GPT2LMHeadModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be mixed up
            parameter += config.initializer_range * torch.randn_like(parameter)
    return model.eval()


def save_model(model, folder, kind, rng):
    model.save_pretrained(folder, **({"max_shard_size": "10KB"} if kind == "shards" else {}))
    if kind not in ("without prefix", "own head") and not (kind == "base" and rng.random() < 0.5):
        return model
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    if kind == "without prefix":  # as the files of 2019 are
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        for i in range(model.config.n_layer):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 4, 4).tril().bool()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    elif kind == "base":
        tensors = {"transformer." + name: value for name, value in tensors.items()}
    else:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + (0.1 if rng.random() < 0.5 else 0.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return type(model).from_pretrained(folder).eval()


def random_adapter(model, folder, rng):
    """A LoRA or trained tokens of random values, saved by Python: the adapted model."""
    tokens, targets = rng.sample(range(model.config.vocab_size), 3), rng.choice(TARGETS)
    if rng.random() < 0.2:
        config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=tokens)
    else:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rng.randrange(1, 5), lora_alpha=rng.randrange(1, 20),
                                 target_modules=targets, use_rslora=rng.random() < 0.3, use_dora=rng.random() < 0.2,
                                 fan_in_fan_out=rng.random() < 0.5,
                                 trainable_token_indices=tokens if targets == ["c_attn"] else None)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def random_mask(rng, rows, time, left):
    mask = torch.ones(rows, time, dtype=torch.long)
    for row in range(1, rows):
        length = rng.randrange(1, time + 1)
        mask[row] = torch.arange(time) >= time - length if left else torch.arange(time) < length
    return mask


def random_batch(rng, config, language):
    rows, time = rng.randrange(1, 5), rng.randrange(1, 20)
    batch = {}
    if rng.random() < 0.8:
        batch["input_ids"] = torch.randint(config.vocab_size, (rows, time))
    else:
        batch["inputs_embeds"] = torch.randn(rows, time, config.n_embd)
    mask = random_mask(rng, rows, time, left=rng.random() < 0.6)
    if rng.random() < 0.7:
        batch["attention_mask"] = mask
    else:
        mask = torch.ones_like(mask)
    if rng.random() < 0.3:
        batch["token_type_ids"] = torch.randint(config.vocab_size, (rows, time))
    if rng.random() < 0.4:
        start = rng.randrange(config.n_positions - time)  # not packed, as transformers would read jumps
        batch["position_ids"] = torch.arange(start, start + time).expand(rows, time).contiguous()
    if rng.random() < 0.5 and time > 1:
        cut = rng.randrange(1, time)
        batch["chunks"] = torch.tensor([cut] + [1] * (time - cut) if rng.random() < 0.5 else [cut, time - cut])
    elif language and rng.random() < 0.8:
        labels = torch.randint(config.vocab_size, (rows, time)) * mask - 100 * (1 - mask)
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]  # what a padding token predicts is no one's business
        batch["labels"] = labels.masked_fill(before == 0, -100)
    return batch, mask


def expected(model, batch):
    batch = dict(batch)
    chunks = batch.pop("chunks", None)
    with torch.no_grad():
        if chunks is None:
            outputs = [model(**batch, output_hidden_states=True, use_cache=False)]
        else:
            outputs, begin, cache = [], 0, None
            for length in chunks.tolist():
                end = begin + length
                part = {key: value[:, (0 if key == "attention_mask" else begin):end] for key, value in batch.items()}
                outputs.append(model(**part, past_key_values=cache, use_cache=True, output_hidden_states=True))
                cache, begin = outputs[-1].past_key_values, end
    values = {"last_hidden_state": torch.cat([output.hidden_states[-1] for output in outputs], 1)}
    if "logits" in outputs[0]:
        values["logits"] = torch.cat([output.logits for output in outputs], 1)
    if chunks is None:
        values |= {f"hidden_states.{i}": state for i, state in enumerate(outputs[0].hidden_states)}
        if outputs[0].get("loss") is not None:
            values["loss"] = outputs[0].loss
    return values


def random_prompts(rng, config, rows, common):
    """Prompts padded on the left, and how to go on: as our options and as transformers'."""
    time = rng.randrange(1, 12)
    mask = random_mask(rng, rows, time, left=True)
    ids = torch.randint(3, config.vocab_size, (rows, time)) * mask
    settings = {"max_new_tokens": rng.randrange(1, config.n_positions - time), "eos_token_id": [2], "pad_token_id": 0}
    if rng.random() < 0.5:  # likely ends, so that rows end at different steps
        settings["eos_token_id"] = [2] + rng.sample(range(3, config.vocab_size), config.vocab_size // 10)
    inputs = {"input_ids": ids}
    if rng.random() < 0.7:
        inputs["attention_mask"] = mask
    return inputs, settings | common


def written_by_python(model, inputs, settings):
    settings = {"do_sample": False, "top_k": 50} | settings
    torch.manual_seed(settings.pop("seed", 0))
    if not settings["do_sample"]:
        settings.pop("top_k")
    return model.generate(**inputs, **settings)


def check(name, ours, theirs, worst, mask=None, tolerance=TOLERANCE):
    if ours.shape != theirs.shape:
        raise Failure(f"{name}: {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    if mask is not None and theirs.dim() == 3:  # of padding, transformers' values depend on its kernel
        ours, theirs = (value.masked_fill(mask.unsqueeze(-1) == 0, 0) for value in (ours, theirs))
    if theirs.isnan().all() and ours.isnan().all():
        return  # a batch in which every label is ignored
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    kind = name.split(".")[-1] if not name.split(".")[-1].isdigit() else "hidden_states"
    worst[kind] = max(worst[kind], error)
    if not error <= tolerance:
        raise Failure(f"{name}: relative error {error:.3g}")


def compare(tool, kind, scratch, rng, prompts, worst, tried):
    """One model, with everything that is compared of it."""
    config = random_config(rng, kind)
    folder = f"{scratch}/model"
    model = save_model(random_model(kind, config), folder, kind, rng)
    job = {"model": folder, "class": type(model).__name__, "inputs": f"{scratch}/inputs.safetensors",
           "outputs": f"{scratch}/outputs.safetensors", "save_model": f"{scratch}/saved", "save_new": f"{scratch}/new"}
    language = kind != "base"
    if kind == "lora":
        model = random_adapter(model, f"{scratch}/adapter", rng)
        job |= {"adapter": f"{scratch}/adapter", "save_adapter": f"{scratch}/again"}
    batches = [random_batch(rng, config, language) for _ in range(4)]
    texts = []
    if language:
        for common in ({}, {"use_cache": False},
                       {"do_sample": True, "seed": rng.randrange(10**6), "top_k": rng.choice([0, 3, 10**6]),
                        "top_p": rng.choice([1.0, 0.6]), "temperature": rng.choice([1.0, 0.7, 1.5])}):
            texts.append(random_prompts(rng, config, prompts, common))
    inputs = {f"b{i}.{key}": value for i, (batch, _) in enumerate(batches) for key, value in batch.items()}
    inputs |= {f"g{i}.{key}": value for i, (batch, _) in enumerate(texts) for key, value in batch.items()}
    save_file({key: value.contiguous() for key, value in inputs.items()}, job["inputs"])
    json.dump(job | {"generate": [settings for _, settings in texts]}, open(f"{scratch}/job.json", "w"))
    done = subprocess.run([tool, f"{scratch}/job.json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"the tool ended with {done.returncode}: {done.stderr.strip()[:2000]}")
    ours = load_file(job["outputs"])

    names = set()
    for i, (batch, mask) in enumerate(batches):
        for name, value in expected(model, batch).items():
            names.add(f"b{i}.{name}")
            if f"b{i}.{name}" not in ours:
                raise Failure(f"b{i}.{name} is missing")
            check(f"b{i}.{name}", ours[f"b{i}.{name}"], value, worst, mask)
    for i, (batch, settings) in enumerate(texts):
        names.add(f"g{i}.texts")
        value = written_by_python(model, batch, settings)
        if not torch.equal(ours[f"g{i}.texts"], value):
            raise Failure(f"other texts with {settings}:\n{ours[f'g{i}.texts']}\nexpected\n{value}")
        tried["sampled texts" if "seed" in settings else "greedy texts"] += len(value)
        tried["tokens"] += value[:, batch["input_ids"].shape[1]:].numel()
    if set(ours) != names:
        raise Failure(f"other outputs: {sorted(set(ours) ^ names)}")

    if kind == "lora":  # written by us, read by Python
        old, new = (load_file(f"{scratch}/{name}/adapter_model.safetensors") for name in ("adapter", "again"))
        old = {key: value for key, value in old.items() if "base_layer" not in key}  # Python's copy of a base's head
        if set(old) != set(new) or any(not torch.equal(old[key], new[key]) for key in old):
            raise Failure(f"the adapter written again differs: {sorted(set(old) ^ set(new))}")
        old, new = (json.load(open(f"{scratch}/{name}/adapter_config.json")) for name in ("adapter", "again"))
        # else what the user said
        turned = old["peft_type"] == "LORA" and all(name not in old["target_modules"] for name in ("wte", "lm_head"))
        for key in ["r", "lora_alpha", "use_rslora", "use_dora", "task_type", "peft_type"] + ["fan_in_fan_out"] * turned:
            if old.get(key) != new.get(key):
                raise Failure(f"adapter_config.json: {key} {new.get(key)}, expected {old.get(key)}")
        base = transformers.GPT2LMHeadModel.from_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base, f"{scratch}/again").eval()
        for i, (batch, mask) in enumerate(batches):
            check("adapter", expected(again, batch)["logits"], expected(model, batch)["logits"], worst, mask)
    for folder in (job["save_model"], job["save_new"]) if kind != "lora" else (job["save_model"],):
        saved = type(model.get_base_model() if kind == "lora" else model).from_pretrained(folder).eval()
        for i, (batch, mask) in enumerate(batches):
            for name, value in expected(model, batch).items():
                check("saved", expected(saved, batch)[name], value, worst, mask, MERGED)
    tried["merged heads of their own"] += kind == "lora" and not saved.config.tie_word_embeddings


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", default=os.environ.get("PEFT_GPT2_TOOL"))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    if not arguments.tool:
        parser.error("--tool or PEFT_GPT2_TOOL must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}", flush=True)
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)

    worst, failures, tried = collections.defaultdict(float), 0, collections.Counter()
    for i in range(arguments.count):
        kind = KINDS[i % len(KINDS)]
        tried[kind] += 1
        with tempfile.TemporaryDirectory() as scratch:
            try:
                compare(arguments.tool, kind, scratch, rng, -(-arguments.prompts // arguments.count), worst, tried)
            except Failure as failure:
                failures += 1
                print(f"model {i} ({kind}): {failure}", flush=True)

    print("tried: " + ", ".join(f"{count} {kind}" for kind, count in tried.items() if count))
    print("largest relative errors: " + ", ".join(f"{kind} {error:.2g}" for kind, error in sorted(worst.items())))
    print(f"{failures} failures" if failures else "all agree")
    return 1 if failures or not worst else 0


if __name__ == "__main__":
    sys.exit(main())
