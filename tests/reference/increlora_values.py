"""Runs the author's IncreLoRA on small nets and prints its traces: the values in tests/train/test_increlora_training.cpp.

    python tests/reference/increlora_values.py SOURCE

SOURCE is a checkout of github.com/FeiyuZhang98/IncreLoRA. Layer, allocator, scheduler, optimizer, penalty, and the order
of loss, clipping, allocation and update are executed from its own files; the net and the data are ours. In float64.
"""

import ast
import contextlib
import enum
import importlib.util
import io
import logging
import pathlib
import sys
import types
import warnings

import torch

warnings.filterwarnings("ignore")


class OutOfPlace(ast.NodeTransformer):
    """x += y becomes x = x + y: his penalty adds onto the result of a norm, which today's autograd still needs."""

    def visit_AugAssign(self, node):
        load = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        return ast.copy_location(ast.Assign([node.target], ast.BinOp(load, node.op, node.value)), node)


class Author:
    """What training needs of the author's code, loaded from his files."""

    def __init__(self, source):
        source = pathlib.Path(source)

        def stop():
            raise RuntimeError("the author's code stopped in its debugger")

        class LambdaLR(torch.optim.lr_scheduler.LambdaLR):  # of his torch: one argument more, later groups left alone
            def __init__(self, optimizer, lr_lambda, last_epoch=-1, verbose=False):
                super().__init__(optimizer, lr_lambda, last_epoch)

            def get_lr(self):
                return super().get_lr() + [group["lr"] for group in self.optimizer.param_groups[len(self.base_lrs):]]

        sys.modules["ipdb"] = types.SimpleNamespace(set_trace=stop)
        for name in ["author_lora", "author_transformers", "author_transformers.utils"]:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = []
        words = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
        sys.modules["author_transformers.trainer_utils"] = types.SimpleNamespace(
            SchedulerType=enum.Enum("SchedulerType", {word.upper(): word for word in words}))
        sys.modules["author_transformers.utils"].logging = types.SimpleNamespace(get_logger=logging.getLogger)

        def load(name, path):
            spec = importlib.util.spec_from_file_location(name, source / path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module

        load("author_lora.layers", "loralib/loralib/layers.py")
        self.lora = load("author_lora.increlora", "loralib/loralib/increlora.py")
        plain, torch.optim.lr_scheduler.LambdaLR = torch.optim.lr_scheduler.LambdaLR, LambdaLR
        self.optimization = load("author_transformers.optimization", "NLU/src/transformers/optimization.py")
        torch.optim.lr_scheduler.LambdaLR = plain

        tree = ast.parse((source / "NLU/src/transformers/trainer.py").read_text(encoding="utf-8"))
        methods = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        found = {"torch": torch, "lora": self.lora, "is_torch_tpu_available": lambda: False}
        for name in ["compute_loss", "compute_svd_orth_regu"]:
            method = ast.fix_missing_locations(OutOfPlace().visit(methods[name]))
            exec(compile(ast.Module([method], []), name, "exec"), found)
        self.compute_loss, self.compute_orthogonality = found["compute_loss"], found["compute_svd_orth_regu"]

        # From the clipping to the count of the step: the part of the training loop that follows backward.
        def holds(nodes, word):
            return any(word in ast.unparse(node) for node in nodes)

        step = [node for node in ast.walk(methods["train"]) if isinstance(node, ast.If)
                and holds(node.body[:2], "update_and_increase") and holds(node.body, "self.state.global_step += 1")][-1]
        last = [i for i, node in enumerate(step.body) if holds([node], "self.state.global_step += 1")][0]
        code = compile(ast.Module(step.body[:last + 1], []), "step", "exec")
        self.step = lambda trainer, model: exec(code, {**found, "self": trainer, "model": model})


class Net(torch.nn.Module):
    """Adapted layers in the order of `uses`, with tanh between, and perhaps a trained layer at the end."""

    def __init__(self, author, job):
        super().__init__()
        options = job["options"]
        self.layers = torch.nn.ModuleList()
        for layer in job["layers"]:
            weight = torch.tensor(layer["weight"])
            module = author.lora.SVDLinear(weight.size(1), weight.size(0), r=options["rank"], lora_alpha=options["alpha"],
                                           lora_dropout=options["dropout"], merge_weights=False)
            self.layers.append(module)
            with torch.no_grad():
                for parameter, name in [(module.weight, "weight"), (module.bias, "bias"), (module.lora_A[0], "A"),
                                        (module.lora_E[0], "E"), (module.lora_B[0], "B")]:
                    parameter.copy_(torch.tensor(layer[name]))
            module.bias.requires_grad_(False)
        self.uses = job["uses"]
        self.head = None
        if job["head"]:
            weight = torch.tensor(job["head"]["weight"])
            self.head = torch.nn.Linear(weight.size(1), weight.size(0))
            with torch.no_grad():
                self.head.weight.copy_(weight)
                self.head.bias.copy_(torch.tensor(job["head"]["bias"]))

    def forward(self, x, target):
        for i, use in enumerate(self.uses):
            x = self.layers[use](torch.tanh(x) if i else x)
        if self.head is not None:
            x = self.head(torch.tanh(x))
        return {"loss": ((x - target) ** 2).mean()}


def trace(author, job):
    """One line a step; the final tensors after the last. `job` is what the C++ tool reads too."""
    torch.set_default_dtype(torch.float64)
    options, training = job["options"], job["optimizer"]
    model = Net(author, job).train()
    decayed = [p for n, p in model.named_parameters() if "bias" not in n]
    groups = [{"params": decayed, "weight_decay": training["weight_decay"]}]
    if job["head"]:
        groups.append({"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0})
    form = author.optimization.AdamW if training["form"] == "transformers" else torch.optim.AdamW
    optimizer = form(groups, lr=training["lr"], betas=training["betas"], eps=training["eps"])
    schedule = author.optimization.get_scheduler("linear", optimizer, training["warmup"], training["total"],
                                                 multi_lr=options["multi_lr"])
    allocator = author.lora.RankAllocator(
        model, lora_r=options["rank"], target_rank=options["target_rank"], init_warmup=options["init_warmup"],
        incre_interval=options["incre_interval"], top_h=options["top_h"], advance_learn=options["advance_learn"],
        beta1=options["beta1"], beta2=options["beta2"], target_total_rank=options["target_total_rank"],
        weight_decay=training["weight_decay"], incre_rank_num=options["incre_rank_num"])
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(max_grad_norm=training["clip"], past_index=-1), state=types.SimpleNamespace(global_step=0),
        optimizer=optimizer, lr_scheduler=schedule, rankallocator=allocator, model=model, label_smoother=None, deepspeed=None,
        use_amp=False, use_apex=False,
        model_args=types.SimpleNamespace(apply_lora=True, lora_type="svd", reg_orth_coef=options["reg_orth_coef"]))
    trainer.compute_svd_orth_regu = lambda m: author.compute_orthogonality(trainer, m)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append([group["lr"] for group in o.param_groups]))

    lines, drawn, normal = [], 0, torch.nn.init.normal_

    def filled(tensor, **_):  # the reserve of the golden trace, which is not drawn
        nonlocal drawn
        drawn += 1
        with torch.no_grad():
            return tensor.copy_(0.02 * fill(tensor.shape, 20 + drawn))

    if job["reserve"] == "fill":
        torch.nn.init.normal_ = filled
    torch.manual_seed(job["seed"])
    for batch in job["batches"]:
        loss = author.compute_loss(trainer, model, {key: torch.tensor(value) for key, value in batch.items()})
        loss.backward()
        line = {"loss": loss.item(), "score": [float(layer.score) for layer in model.layers]}
        with contextlib.redirect_stdout(io.StringIO()):
            author.step(trainer, model)
        lines.append({
            **line, "rates": rates[-1], "rank": [int(layer.ranknum) for layer in model.layers],
            "chunks": [len(layer.lora_E) for layer in model.layers],
            "importance": [float(allocator.exp_avg_ipt[name] * allocator.exp_avg_unc[name]) for name in
                           (f"layers.{i}" for i in range(len(model.layers)))] if allocator.exp_avg_ipt else [],
            "E": [torch.cat([e.flatten() for e in layer.lora_E]).tolist() for layer in model.layers]})
    torch.nn.init.normal_ = normal
    lines[-1]["tensors"] = {
        name: torch.cat([value.flatten() for value in getattr(layer, f"lora_{kind}")]).tolist()
        for i, layer in enumerate(model.layers) for kind in "AB" for name in [f"{i}.{kind}"]}
    if job["head"]:
        lines[-1]["tensors"] |= {"head": torch.cat([p.flatten() for p in model.head.parameters()]).tolist()}
    return lines


def fill(shape, k):
    count = torch.Size(shape).numel()
    return torch.tensor([(((i + k) * 37) % 101 - 50) / 100 for i in range(count)], dtype=torch.float64).reshape(shape)


def golden(**changes):
    """Three layers, everything filled by a formula; `changes` to options and optimizer."""
    options = dict(rank=1, target_rank=2, target_total_rank=None, alpha=6, dropout=0.0, top_h=1, incre_rank_num=1,
                   init_warmup=2, incre_interval=2, advance_learn=True, multi_lr=True, reg_orth_coef=0.1, beta1=0.85,
                   beta2=0.85)
    optimizer = dict(form="torch", lr=0.05, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip=1.0, warmup=2, total=14)
    for name, value in changes.items():
        (options if name in options else optimizer)[name] = value
    shapes = [(3, 4), (3, 3), (3, 3)]
    return dict(
        layers=[dict(weight=fill(s, 1 + i).tolist(), bias=fill(s[:1], 2 + i).tolist(), A=fill([1, s[1]], 3 + i).tolist(),
                     E=[[0.0]], B=fill([s[0], 1], 6 + i).tolist()) for i, s in enumerate(shapes)],
        uses=[0, 1, 2], head=None, reserve="fill", seed=0, options=options, optimizer=optimizer,
        batches=[dict(x=fill([5, 4], 5).tolist(), target=fill([5, 3], 6).tolist())] * optimizer["total"])


# Growth by two, an overshoot, weight decay, and the optimizer of the published runs.
LONGER = golden(total=30, incre_rank_num=2, target_rank=3, top_h=2, init_warmup=3, incre_interval=5, weight_decay=0.1,
                form="transformers", reg_orth_coef=0.3)


def main():
    author = Author(sys.argv[1])

    def text(numbers):
        return "{" + ", ".join(f"{number:.12g}" for number in numbers) + "}"

    for job in [golden(), LONGER]:
        for line in trace(author, job):
            print(f"{{{line['loss']:.12g}, {text(line['rank'])}, {text(line['chunks'])}, {text(line['rates'])}, "
                  f"{text(line['E'][-1])}, {text(line['importance'])}}},")
        print()


if __name__ == "__main__":
    main()
