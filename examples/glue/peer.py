"""Trains one cell of peft-glue with Hugging Face's PEFT: the adapter, head and batches that the program left in a
folder. Started by peft-glue --peer.

    python peer.py FOLDER

Reads job.json, data.safetensors, head.safetensors and adapter/; writes result.json and logits.safetensors.
"""

import json
import math
import os
import resource
import sys
import time
import warnings

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

folder = sys.argv[1]
with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
    job = json.load(file)
data = load_file(os.path.join(folder, "data.safetensors"))
torch.set_num_threads(job["threads"])
warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def open_model():
    """The base without dropout, with the adapter and head the other program begins with."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=job["labels"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if not job["head_only"]:
        return PeftModel.from_pretrained(base, os.path.join(folder, "adapter"), is_trainable=True)
    head = load_file(os.path.join(folder, "head.safetensors"))
    head = {name.replace(".replace.", "."): tensor for name, tensor in head.items()}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in head)
        if name in head:
            parameter.data.copy_(head.pop(name))
    assert not head, f"the model has no {', '.join(head)}"
    return base


def batch_of(prefix, rows):
    longest = int(data[prefix + "lengths"][rows].max())
    lengths = data[prefix + "lengths"][rows]
    return {"input_ids": data[prefix + "input_ids"][rows, :longest],
            "token_type_ids": data[prefix + "token_type_ids"][rows, :longest],
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": data[prefix + "labels"][rows]}


def cuts(count, size):
    return [(begin, min(count, begin + size)) for begin in range(0, count, size)]


def task_loss(logits, labels):
    return F.mse_loss(logits.squeeze(-1), labels) if job["labels"] == 1 else F.cross_entropy(logits, labels)


model = open_model()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=job["weight_decay"])
schedule = {
    "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, job["warmup_steps"], job["steps"]),
    "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, job["warmup_steps"], job["steps"]),
    "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, job["warmup_steps"]),
}[job["schedule"]]()
allocates = not job["head_only"] and hasattr(model.base_model, "update_and_allocate")

count = len(data["train.lengths"])
epoch_cuts = cuts(count, job["batch_size"])
every = job["eval_every"] or len(epoch_cuts)
logits, evaluated, losses, seconds = {}, [], [], 0.0
features = {}


def cache(prefix):
    """What a head alone sees of every row."""
    rows = torch.argsort(data[prefix + "lengths"])
    result = None
    for begin, end in cuts(len(rows), job["evaluation_batch"]):
        batch = batch_of(prefix, rows[begin:end])
        batch.pop("labels")
        with torch.no_grad():
            first = model.base_model(**batch).last_hidden_state[:, :1]
        if result is None:
            result = first.new_empty(len(rows), *first.shape[1:])
        result[rows[begin:end]] = first
    features[prefix] = result


def forward(prefix, rows):
    """(loss with the method's penalty, logits, labels)"""
    if prefix in features:
        labels = data[prefix + "labels"][rows]
        out = model.classifier(model.base_model.pooler(features[prefix][rows]))
        return task_loss(out, labels), out, labels
    batch = batch_of(prefix, rows)
    out = model(**batch)
    return out.loss, out.logits, batch["labels"]


def evaluate(step):
    model.eval()
    with torch.no_grad():
        for i in range(job["devs"]):
            prefix = f"dev{i}."
            rows = torch.arange(len(data[prefix + "lengths"]))
            parts = [forward(prefix, rows[begin:end])[1] for begin, end in cuts(len(rows), job["evaluation_batch"])]
            logits[f"{step}.dev{i}"] = torch.cat(parts).contiguous()
    model.train()
    evaluated.append(step)


start = time.perf_counter()
if job["head_only"] and model.config.model_type == "bert":
    model.eval()
    for prefix in ["train."] + [f"dev{i}." for i in range(job["devs"])]:
        cache(prefix)
model.train()
for step in range(job["steps"]):
    begin, end = epoch_cuts[step % len(epoch_cuts)]
    optimizer.zero_grad()
    loss, out, labels = forward("train.", data[f"order{step // len(epoch_cuts)}"][begin:end])
    if step in (0, job["steps"] - 1):
        losses.append(task_loss(out.detach(), labels).item())
    value = loss.item()
    if not math.isfinite(value):
        sys.exit(f"the loss is {value} at step {step + 1}")
    loss.backward()
    if job["clip"] > 0:
        torch.nn.utils.clip_grad_norm_(trained, job["clip"])
    optimizer.step()
    schedule.step()
    if allocates:
        model.base_model.update_and_allocate(step)
    if (step + 1) % every == 0 or step + 1 == job["steps"]:
        seconds += time.perf_counter() - start
        evaluate(step + 1)
        start = time.perf_counter()

sizes = {True: 0, False: 0}
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        sizes[job["head_only"] or "modules_to_save" in name] += parameter.numel()
save_file(logits, os.path.join(folder, "logits.safetensors"))
with open(os.path.join(folder, "result.json"), "w", encoding="utf-8") as file:
    json.dump({"head_weights": sizes[True], "other_weights": sizes[False], "seconds": seconds, "evaluated": evaluated,
               "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
               "first_loss": losses[0], "last_loss": losses[-1]}, file)
