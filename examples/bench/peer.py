"""The other side of peft-bench: Hugging Face's PEFT on the LibTorch of its torch, doing what it is told, a JSON object
a line on its standard input, one back on its standard output. Started by peft-bench.

    python peer.py THREADS
"""

import ctypes
import gc
import json
import os
import shutil
import sys
import time

wire = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints is for people

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, __version__ as peft_version
from safetensors.torch import load_file
from torch import nn


def norm(tensor):
    return tensor.detach().double().norm().item()


def figures(outputs, gradients, x, parameters):
    """As `figures` of session.h: a loss and the norms of gradients."""
    squares = sum(norm(p.grad) ** 2 for p in parameters if p.grad is not None)
    result = []
    for y, gradient in zip(outputs, gradients):
        result += [(y.detach().double() * gradient.double()).sum().item(), norm(y), norm(x.grad), squares**0.5]
    return result


def backward_step(forward, x, gradients, parameters):
    """Forward and backward, gradients made anew."""

    def step():
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        outputs = forward(x)
        torch.autograd.backward(outputs, gradients)
        return outputs

    return step


def saved_bytes(forward, parameters):
    """Bytes of the distinct storages a graph holds for backward, those of parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(found.values())


def status_bytes(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def step_memory(step, device):
    """The peak that a step needs beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status_bytes("VmRSS")
    step()
    return max(0, status_bytes("VmHWM") - before)


def freeze(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def without_dropout(model, work):
    """Figures that can be compared: masks are drawn apart."""
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    model.train(not has_dropout)
    result = work()
    model.train()
    return result


class Layers(nn.Module):
    def __init__(self, names, width_in, width_out, chain):
        super().__init__()
        self.names, self.chain = names, chain
        for name in names:
            self.add_module(name, nn.Linear(width_in, width_out))

    def forward(self, x):
        if not self.chain:
            return [getattr(self, name)(x) for name in self.names]
        for name in self.names:
            x = getattr(self, name)(x)
        return [x]


class Base:
    """Tensors of the case, and a model on its base."""

    def __init__(self, what):
        self.folder, self.device = what["folder"], what["device"]

    def tensors(self, name):
        return {key: value.to(self.device) for key, value in load_file(f"{self.folder}/{name}.safetensors").items()}

    def fill(self, model, strict=True):
        weights = self.tensors("base")
        model = model.to(device=self.device, dtype=next(iter(weights.values())).dtype)
        missing, unexpected = model.load_state_dict(weights, strict=strict)
        assert not unexpected and all("position_ids" in key for key in missing), (missing, unexpected)
        return freeze(model)

    def adapted(self, model):
        return PeftModel.from_pretrained(model, f"{self.folder}/adapter", is_trainable=True)


def prepare_layers(what):
    base = Base(what)
    data = base.tensors("data")
    make = lambda: base.fill(Layers(what["names"], what["in"], what["out"], what["chain"]))
    gradients = [data[f"gradient{i}"] for i in range(len(data) - 1)]
    frozen, adapted = make(), base.adapted(make())
    adapted.train()
    steps = {}
    for name, model in [("PEFT floor", frozen), ("PEFT", adapted)]:
        x = data["x"].clone().requires_grad_()
        # Past the wrapper: only the layers are measured.
        forward = (model.base_model.model if name == "PEFT" else model).forward
        steps[name] = backward_step(forward, x, gradients, trained(model))
    outputs = without_dropout(adapted, steps["PEFT"])
    return steps, {"figures": figures(outputs, gradients, x, trained(adapted))}


def prepare_encoder(what):
    from transformers import BertConfig, BertForSequenceClassification

    base = Base(what)
    data = base.tensors("data")
    config = BertConfig(**what["config"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    make = lambda: base.fill(BertForSequenceClassification(config), strict=False).train()
    ids, labels = data["ids"], data["labels"]
    frozen, model = make(), make()
    vectors = frozen.bert.embeddings.word_embeddings(ids).detach().requires_grad_()

    def floor():
        vectors.grad = None
        frozen(inputs_embeds=vectors, labels=labels).loss.backward()

    method = what["method"]
    if method == "adapter":
        model = base.adapted(model)
        model.train()
        for name, parameter in model.named_parameters():  # PEFT would train the classifier too
            if "modules_to_save" in name:
                parameter.requires_grad_(False)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full fine-tuning" or name.endswith(".bias"))
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=what["rate"], weight_decay=what["decay"])
    count = [0]

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, what["clip"])
        optimizer.step()
        if what["allocates"]:
            model.base_model.update_and_allocate(count[0])
        count[0] += 1
        return loss

    forward = lambda: model(input_ids=ids, labels=labels).loss
    facts = {"loss without dropout": without_dropout(model, forward).item(), "losses": []}
    for _ in range(3):
        if what["allocates"]:  # the loss the task sees, which is without the penalty
            with torch.no_grad():
                task = model.base_model.model(input_ids=ids, labels=labels).loss.item()
            step()
            facts["losses"].append(task)
        else:
            facts["losses"].append(step().item())
    facts["saved"] = saved_bytes(forward, list(model.parameters()))
    facts["memory"] = step_memory(step, base.device)
    return {"PEFT floor": floor, "PEFT": step}, facts


def prepare_optimizer(what):
    """`layers` layers of one width with LoRA, or for the work `adalora` AdaLoRA, and gradients that are there."""
    from types import SimpleNamespace

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(what["width"], what["width"]) for _ in range(what["layers"]))

        def forward(self):
            return SimpleNamespace(loss=torch.zeros((), device=what["device"]))

    names = [f"layers.{i}" for i in range(what["layers"])]
    work, device = what["work"], what["device"]
    steps = {}
    for name in ["PEFT", "PEFT foreach", "PEFT fused"]:
        if name != "PEFT" and not work.startswith("adamw"):
            break
        if work == "adalora":
            config = AdaLoraConfig(init_r=what["rank"], target_r=max(1, what["rank"] // 2), total_step=1_000_000,
                                   tinit=0, tfinal=0, deltaT=1, target_modules=names)
        else:
            config = LoraConfig(r=what["rank"], target_modules=names)
        model = get_peft_model(Stack(), config).to(device)
        parameters = trained(model)
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
            parameter.grad = torch.randn_like(parameter) * 1e-3
        form = {} if name == "PEFT" else {name.split()[1]: True}
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, **form)

        def step(model=model, parameters=parameters, optimizer=optimizer):
            if work == "adalora":
                model.base_model().loss.backward()  # the wrapper around it leaves the penalty out
                model.base_model.update_and_allocate(step.count)
                step.count += 1
            if work in ("adamw with clipping", "clipping"):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if work.startswith("adamw"):
                optimizer.step()
            if work == "zero_grad":
                optimizer.zero_grad(set_to_none=False)

        step.count = 1
        steps[name] = step
    return steps, {}


def prepare_life(what):
    from transformers import BertConfig, BertModel

    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    config = lambda: LoraConfig(r=what["rank"], lora_alpha=16, target_modules=targets)
    model = get_peft_model(BertModel(BertConfig(**what["config"])).to(what["device"]), config(), "loaded0")
    trainable = sum(p.numel() for p in trained(model))
    for i in range(1, what["loaded"]):
        model.add_adapter(f"loaded{i}", config())
    folder, turn = f"{what['folder']}/peft", [0]
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)

    def switch():
        turn[0] = (turn[0] + 1) % what["loaded"]
        model.set_adapter(f"loaded{turn[0]}")

    remove = lambda: model.delete_adapter("more")
    merge, unmerge = model.merge_adapter, model.unmerge_adapter
    deed = what["deed"]
    if deed == "unmerge":
        merge()
    steps = {"inject": (lambda: model.add_adapter("more", config()), remove), "switch": (switch, None),
             "merge": (merge, unmerge), "unmerge": (unmerge, merge),
             "save": (lambda: model.save_pretrained(folder), None),
             "load": (lambda: model.load_adapter(f"{folder}/loaded0", "more"), remove)}
    return {"PEFT": steps[deed]}, {"trainable": trainable}


class DecoderBlock(nn.Module):
    """As `DecoderBlock` of block_rows.h."""

    def __init__(self, what):
        super().__init__()
        hidden, inner, self.heads, self.kv_heads = (what[k] for k in ("hidden", "intermediate", "heads", "kv_heads"))
        narrow = hidden // self.heads * self.kv_heads
        for name, width_in, width_out in [("q", hidden, hidden), ("k", hidden, narrow), ("v", hidden, narrow),
                                          ("o", hidden, hidden), ("gate", hidden, inner), ("up", hidden, inner),
                                          ("down", inner, hidden)]:
            self.add_module(f"{name}_proj", nn.Linear(width_in, width_out, bias=False))
        self.norm1, self.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))

    def forward(self, x):
        def normed(h, weight):
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

        def split(y, count):
            return y.view(y.shape[0], y.shape[1], count, -1).transpose(1, 2)

        def repeated(y):
            return y if self.kv_heads == self.heads else y.repeat_interleave(self.heads // self.kv_heads, 1)

        h = normed(x, self.norm1)
        q = split(self.q_proj(h), self.heads)
        k, v = (repeated(split(p(h), self.kv_heads)) for p in (self.k_proj, self.v_proj))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = x + self.o_proj(attended.transpose(1, 2).reshape(x.shape))
        g = normed(y, self.norm2)
        return y + self.down_proj(nn.functional.silu(self.gate_proj(g)) * self.up_proj(g))


class DecoderStack(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layers = nn.ModuleList(DecoderBlock(what) for _ in range(what["blocks"]))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def prepare_blocks(what):
    base = Base(what)
    data = base.tensors("data")
    with torch.device("meta"):
        shells = [DecoderStack(what) for _ in range(2)]
    frozen = base.fill(shells[0].to_empty(device=base.device))
    adapted = base.adapted(base.fill(shells[1].to_empty(device=base.device)))
    adapted.train()
    gradients = [data["gradient0"]]
    steps = {}
    for name, model in [("PEFT floor", frozen), ("PEFT", adapted)]:
        x = data["x"].clone().requires_grad_()
        forward = model.base_model.model if name == "PEFT" else model
        steps[name] = backward_step(lambda x, forward=forward: [forward(x)], x, gradients, trained(model))
    outputs = without_dropout(adapted, steps["PEFT"])
    parameters = trained(adapted)
    facts = {"figures": figures(outputs, gradients, x, parameters),
             "saved": saved_bytes(lambda: adapted.base_model.model(x), list(adapted.parameters()))}
    if what["trains"]:
        optimizer = torch.optim.AdamW(parameters, lr=what["rate"])
        one, count = steps["PEFT"], [0]

        def step():
            one()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if hasattr(adapted.base_model, "update_and_allocate"):
                adapted.base_model.update_and_allocate(count[0])
            count[0] += 1

        steps["PEFT"] = step
    facts["memory"] = step_memory(steps["PEFT"], base.device)
    return steps, facts


def run(step, count, device):
    """Seconds of `count` steps; of a pair, of its first half."""
    step, undo = step if isinstance(step, tuple) else (step, None)
    if undo is None:
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            step()
        if device == "cuda":
            end.record()
            end.synchronize()
            return {"cpu": time.process_time() - cpu, "wall": begin.elapsed_time(end) / 1e3}
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    total_cpu = total_wall = 0.0
    for _ in range(count):
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        total_cpu += time.process_time() - cpu
        total_wall += time.perf_counter() - wall
        undo()
    return {"cpu": total_cpu, "wall": total_wall}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    say = lambda answer: print(json.dumps(answer), file=wire)
    say({"torch": torch.__version__, "peft": peft_version, "threads": torch.get_num_threads()})
    steps, device = {}, "cpu"
    for line in sys.stdin:
        what = json.loads(line)
        try:
            if what["do"] == "prepare":
                steps = None  # the last case's memory first
                gc.collect()
                device = what["device"]
                steps, answer = globals()["prepare_" + what["kind"]](what)
            else:
                answer = run(steps[what["variant"]], what["count"], device)
            say(answer)
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
