"""Compares training by peft-finetune with Python PEFT and torch's AdamW, live, step by step.

    python tests/reference/compare_training.py [--program build/examples/peft-finetune] [--encoder DIR] [--only NAME] [--seed N]

--program is by default the environment's PEFT_FINETUNE, --encoder PEFT_ENCODER or PEFT_MINILM, --seed random. From the
same initial adapter and over the same 50 batches (`--inputs`, `--schedule constant --clip 0`): the losses must agree
within 1e-4, the final adapter within 1e-4, and Python must load it with no missing and no unexpected key. Before and
after training, and merged, `predict --inputs` must equal Python's logits, loss and hidden states within 1e-5 of the
largest value. On a random tiny BERT and on the real encoder; LoRA with several of its options, BitFit, head and full;
the classifier of transformers and a head on mean-pooled states.

Exit status 0 only when nothing differs; 77 where Python's libraries are missing, before anything was compared.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings

# Threads that wait in a loop take the time of those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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

STEPS, LABELS, RATE, DECAY = 50, 3, 2e-3, 0.01
FULL_RATE = 1e-4  # at an adapter's rate a whole encoder is thrown about, and any rounding with it
LOSS_TOLERANCE, ADAPTER_TOLERANCE, OUTPUT_TOLERANCE = 1e-4, 1e-4, 1e-5
CHANGE_TOLERANCE = 1e-3
LORA = {"lora": dict(r=4, lora_alpha=8, target_modules=["query", "value"])}
TINY_LORA = {
    **LORA,
    "lora on every linear layer, rsLoRA": dict(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
    "lora with every bias": dict(r=2, lora_alpha=2, bias="all", target_modules=["key", "dense"]),
    "lora with its own biases": dict(r=2, lora_alpha=4, bias="lora_only", target_modules=["query", "intermediate.dense"]),
    "lora with lora_bias": dict(r=2, lora_alpha=4, lora_bias=True, target_modules=["value"]),
    "lora with patterns": dict(r=2, lora_alpha=4, target_modules=["query", "value", "output.dense"],
                               rank_pattern={"layer.0.attention.self.query": 5}, alpha_pattern={"value": 7}),
    "lora on one layer and not all of it": dict(r=4, target_modules=r".*layer\.1\..*dense", exclude_modules=["intermediate.dense"]),
    "lora on layers_to_transform": dict(r=4, target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
    "lora on embeddings": dict(r=4, target_modules=["word_embeddings", "query"]),
    "lora with the pooler saved": dict(r=4, target_modules=["query"], modules_to_save=["pooler"]),
}


class Failure(Exception):
    pass


class MeanPooled(torch.nn.Module):
    """An encoder and a linear head on the mean of the real tokens' states."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, LABELS)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits, loss=loss)


def run(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()[:2000]}")
    return done


def make_batches(rng, config, count, rows, longest):
    batches = []
    for _ in range(count):
        lengths = [rng.randrange(3, longest + 1) for _ in range(rows)]
        ids, mask = torch.zeros(rows, max(lengths), dtype=torch.long), torch.zeros(rows, max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(1, config.vocab_size, (length,))
            mask[row, :length] = 1
        # The label is something that can be learned, so that the gradients do not only fight noise.
        labels = ids[:, 1] % LABELS
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def save_batches(path, batches):
    save_file({f"b{i}.{key}": value for i, batch in enumerate(batches) for key, value in batch.items()}, path)


def train(model, batches, rate=RATE):
    """The reference: torch's AdamW on what asks for a gradient, at a constant rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=DECAY)
    model.train()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def relative(ours, theirs):
    if ours.shape != theirs.shape:
        raise Failure(f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


class Comparison:
    def __init__(self, program, scratch):
        self.program, self.scratch = program, scratch
        self.worst = {"loss": 0.0, "adapter": 0.0, "output": 0.0}

    def note(self, kind, what, error, tolerance):
        self.worst[kind] = max(self.worst[kind], error)
        if not error <= tolerance:
            raise Failure(f"{what}: difference {error:.3g}")

    def predictions(self, what, folder, model, batches, adapter=None, hidden=None):
        """`predict --inputs` of a folder against Python's model; hidden: the encoder whose states are compared."""
        save_batches(f"{self.scratch}/some.safetensors", batches)
        out = f"{self.scratch}/outputs.safetensors"
        run(self.program, "predict", "--model", folder, "--inputs", f"{self.scratch}/some.safetensors", "--out", out,
            *(["--adapter", adapter] if adapter else []), *(["--hidden"] if hidden is not None else []))
        ours = load_file(out)
        os.remove(out)
        model.eval()
        with torch.no_grad():
            for i, batch in enumerate(batches):
                output = model(**batch)
                self.note("output", f"{what}, b{i}.logits", relative(ours[f"b{i}.logits"], output.logits), OUTPUT_TOLERANCE)
                self.note("output", f"{what}, b{i}.loss", relative(ours[f"b{i}.loss"].reshape(()), output.loss),
                          OUTPUT_TOLERANCE)
                if hidden is not None:
                    encoded = hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                    for name in ["last_hidden_state", "pooler_output"]:
                        if encoded.get(name) is not None:
                            self.note("output", f"{what}, b{i}.{name}", relative(ours[f"b{i}.{name}"], encoded[name]),
                                      OUTPUT_TOLERANCE)

    def tensors(self, what, ours, theirs, start=None):
        """Equal names, and values within the tolerance. The gradient of a key projection's bias is zero up to rounding,
        which Adam turns into steps of the learning rate: those cannot be compared. Among the millions of weights of a
        whole encoder some have such gradients too: there, with `start`, it is the change of a tensor as a whole that must
        agree, within a thousandth of its length."""
        if set(ours) != set(theirs):
            raise Failure(f"{what}: other tensors: {sorted(set(ours) ^ set(theirs))[:6]}")
        for name, value in theirs.items():
            if name.endswith(("key.bias", "key.base_layer.bias", "key.lora_B.bias")):
                continue
            difference = ours[name].float() - value.float()
            error = float(difference.abs().max()) if value.numel() else 0.0
            if start is not None:
                error = float(difference.norm() / (value.float() - start[name]).norm().clamp_min(1e-6))
            self.note("adapter", f"{what}, {name}", error, ADAPTER_TOLERANCE if start is None else CHANGE_TOLERANCE)

    def ours(self, folder, batches, *more, rate=RATE):
        """Trains with the program: the losses, and where the adapter is."""
        inputs, log, out = (f"{self.scratch}/{name}" for name in ["inputs.safetensors", "log.jsonl", "out"])
        save_batches(inputs, batches)
        run(self.program, "train", "--model", folder, "--inputs", inputs, "--schedule", "constant", "--clip", 0, "--warmup",
            0, "--lr", rate, "--weight-decay", DECAY, "--log", log, "--out", out, "--overwrite", *more)
        with open(log, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        losses = [line["loss"] for line in lines if "task_loss" in line]
        if any(line["loss"] != line["task_loss"] or line["lr"] != rate for line in lines if "task_loss" in line):
            raise Failure("the log's losses or rates are not those of a run without penalty and schedule")
        return losses, out

    def losses(self, ours, theirs):
        if len(ours) != len(theirs):
            raise Failure(f"{len(ours)} losses, expected {len(theirs)}")
        for step, (a, b) in enumerate(zip(ours, theirs), 1):
            self.note("loss", f"loss of step {step} ({a} for {b})", abs(a - b), LOSS_TOLERANCE)

    def lora(self, folder, batches, settings, pooled):
        torch.manual_seed(1)
        task = "FEATURE_EXTRACTION" if pooled else "SEQ_CLS"
        base = (transformers.BertModel.from_pretrained(folder, add_pooling_layer=False) if pooled else
                transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS))
        model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, init_lora_weights=False, **settings))
        with torch.no_grad():  # the reference draws the factors with a spread at which 50 steps change little
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter *= 0.2
        init = f"{self.scratch}/init"
        model.save_pretrained(init)
        whole = MeanPooled(model) if pooled else model
        if not pooled:
            self.predictions("initial adapter", folder, model, batches[:2], adapter=init, hidden=model.base_model.model.bert)
        expected = train(whole, batches)
        losses, out = self.ours(folder, batches, "--init-adapter", init, *(["--pooling", "mean"] if pooled else []))
        self.losses(losses, expected)

        theirs = f"{self.scratch}/theirs"
        model.save_pretrained(theirs)
        # modules_to_save with bias "all": Python writes the head twice more, under its wrapper's names.
        expected = {name: value for name, value in load_file(f"{theirs}/adapter_model.safetensors").items()
                    if ".modules_to_save." not in name and ".original_module." not in name}
        self.tensors("trained adapter", load_file(f"{out}/adapter_model.safetensors"), expected)
        if pooled:
            head = load_file(f"{out}/head.safetensors")
            self.tensors("trained head", head, {"weight": whole.head.weight.detach(), "bias": whole.head.bias.detach()})

        base = (transformers.BertModel.from_pretrained(folder, add_pooling_layer=False) if pooled else
                transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS))
        blank = peft.get_peft_model(base, peft.LoraConfig.from_pretrained(out))
        loaded = blank.load_adapter(out, "default")
        wrong = loaded.unexpected_keys + [key for key in loaded.missing_keys if "lora_" in key or "modules_to_save.default" in key]
        if wrong:
            raise Failure(f"Python misses or does not expect {wrong[:6]}")
        trained = MeanPooled(blank) if pooled else blank
        if pooled:
            trained.head.load_state_dict(head)
        self.predictions("our adapter in Python", folder, trained, batches[:2], adapter=out)
        merged = f"{self.scratch}/merged"
        run(self.program, "merge", "--model", folder, "--adapter", out, "--out", merged, "--overwrite")
        self.predictions("our adapter, merged", merged, trained, batches[:2])
        if not pooled:
            plain = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
            self.predictions("our merged folder in transformers", merged, plain, batches[:2], hidden=plain.bert)

    def selective(self, method, folder, batches, pooled):
        """BitFit, head and full, which start from the base."""
        torch.manual_seed(1)
        if pooled:
            model = MeanPooled(transformers.BertModel.from_pretrained(folder, add_pooling_layer=False))
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
        for name, parameter in model.named_parameters():
            head = name.startswith(("classifier.", "head."))
            parameter.requires_grad_(head or method == "full" or (method == "bitfit" and name.endswith("bias")))
        start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        rate = FULL_RATE if method == "full" else RATE
        expected = train(model, batches, rate)
        losses, out = self.ours(folder, batches, "--method", method, *(["--pooling", "mean"] if pooled else []), rate=rate)
        self.losses(losses, expected)
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        if all(torch.equal(trained[name], start[name]) for name in trained):
            raise Failure("Python has trained nothing")
        ours = {}
        if os.path.exists(f"{out}/adapter_model.safetensors"):
            for name, value in load_file(f"{out}/adapter_model.safetensors").items():
                ours[("encoder." if pooled else "") + name.removeprefix("base_model.model.")] = value
        if pooled:
            for name, value in load_file(f"{out}/head.safetensors").items():
                ours["head." + name] = value
        self.tensors("what was trained", ours, trained, start if method == "full" else None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=os.environ.get("PEFT_FINETUNE"))
    parser.add_argument("--encoder", default=os.environ.get("PEFT_ENCODER") or os.environ.get("PEFT_MINILM"))
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    if not arguments.program:
        parser.error("--program or PEFT_FINETUNE must name the program")
    print(f"seed {arguments.seed}; torch {torch.__version__}, transformers {transformers.__version__}, peft "
          f"{peft.__version__}", flush=True)
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)

    cases, failures = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        config = transformers.BertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=LABELS,
            initializer_range=0.15)
        tiny = f"{scratch}/tiny"
        transformers.BertForSequenceClassification(config).save_pretrained(tiny)
        bases = [("tiny", tiny, make_batches(rng, config, STEPS, 8, 20), TINY_LORA, False),
                 ("tiny, mean", tiny, make_batches(rng, config, STEPS, 8, 20), LORA, True)]
        if arguments.encoder:
            config = transformers.BertConfig.from_pretrained(arguments.encoder)
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
            real = f"{scratch}/real"  # without dropout for Python, and without the tokenizer, which nobody needs here
            transformers.BertModel.from_pretrained(arguments.encoder, config=config).save_pretrained(real)
            bases.append(("encoder, mean", real, make_batches(rng, config, STEPS, 8, 24), LORA, True))
        else:
            print("no real encoder: PEFT_ENCODER is not set")

        for name, folder, batches, loras, pooled in bases:
            methods = {method: (lambda c, m=method: c.selective(m, folder, batches, pooled))
                       for method in ["head", "bitfit", "full"]}
            methods |= {method: (lambda c, s=settings: c.lora(folder, batches, s, pooled))
                        for method, settings in loras.items()}
            torch.set_num_threads(2 if "encoder" in name else 1)
            for method, compare in methods.items():
                if arguments.only not in f"{name}: {method}":
                    continue
                comparison = Comparison(arguments.program, tempfile.mkdtemp(dir=scratch))
                cases += 1
                try:
                    compare(comparison)
                    result = "agrees"
                except Failure as failure:
                    failures += 1
                    result = f"FAILED: {failure}"
                print(f"{name}: {method}: {result}; largest differences: " +
                      ", ".join(f"{kind} {error:.2g}" for kind, error in comparison.worst.items()), flush=True)
    print(f"{cases} comparisons of {STEPS} steps, {failures} failures")
    return 1 if failures or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
