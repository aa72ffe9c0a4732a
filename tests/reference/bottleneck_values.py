"""Prints the numbers of tests/methods/test_bottleneck.cpp from AdapterHub's own modules.

    python tests/reference/bottleneck_values.py        (a Python with adapters 1.3.0)

One adapter module at a join of width 4, around a LayerNorm or, where the case says so, without one: its tensors after
manual_seed(3), what the join gives on fixed tensors, and, in float64, what it gives after three steps of AdamW on the mean of
its square.
"""

import torch
from adapters import configuration
from adapters.context import ForwardContext
from adapters.methods import modeling

WIDTH = 4


def fill(shape, k):
    count = torch.Size(shape).numel()
    values = torch.tensor([((i + k) * 37 % 101 - 50) / 100 for i in range(count)], dtype=torch.float64)
    return values.view(shape).float()


class Shared:
    """Stands for the model's context, where PHM layers look for what they share."""

    shared_parameters = {}


ForwardContext.get_context = staticmethod(lambda: Shared)


def case(name, config, with_norm=True):
    kind = modeling.ParallelAdapter if config.is_parallel else modeling.Adapter
    torch.manual_seed(3)
    block = kind("case", WIDTH, int(WIDTH // config.reduction_factor), config)
    parameters = list(block.parameters())
    if config.phm_layer and (config.shared_phm_rule or config.shared_W_phm):
        Shared.shared_parameters["case"] = modeling.init_shared_parameters(config, WIDTH, "cpu")
        parameters += list(Shared.shared_parameters["case"].values())
    norm = torch.nn.LayerNorm(WIDTH) if with_norm else None
    if norm:
        with torch.no_grad():
            norm.weight.copy_(1 + fill((WIDTH,), 4))
            norm.bias.copy_(fill((WIDTH,), 9))
    output, skip = fill((1, 2, WIDTH), 3), fill((1, 2, WIDTH), 20)

    def join():
        hidden, _, residual = block.pre_forward(output, skip, norm)
        return block.post_forward(block(hidden, residual)[0], output, skip, norm)

    def show(tensors, digits=10):
        return "{" + ", ".join(f"{float(v):.{digits}g}" for t in tensors for v in t.detach().reshape(-1)) + "}"

    # Sorted as the test's tensors are: `shared` comes after what a piece has of its own.
    named = sorted((key.replace("adapter_down.0.", "adapter_down.").replace("adapter_down.1.", "adapter_down."), value)
                   for key, value in block.named_parameters() if not (config.ln_before and key.startswith("adapter_down.0.")))
    start, first = show([value for _, value in named] + parameters[len(list(block.parameters())):]), show([join()])
    output, skip = output.double(), skip.double()
    for module in filter(None, (block, norm)):
        module.double()
    for shared in Shared.shared_parameters.get("case", {}).values():
        shared.data = shared.data.double()
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        join().square().mean().backward()
        optimizer.step()
    print(f"// {name}\n{{{start},\n {first},\n {show([join()], 14)}}},")


load = configuration.AdapterConfig.load
case("houlsby", load("houlsby", reduction_factor=2))
case("pfeiffer", load("pfeiffer", reduction_factor=2))
case("pfeiffer without a norm", load("pfeiffer", reduction_factor=2), with_norm=False)
case("parallel", load("parallel"))
case("scaled_parallel, gated, normed", load("scaled_parallel", use_gating=True, ln_before=True, ln_after=True))
case("adapter_plus", configuration.AdapterPlusConfig(reduction_factor=2, stochastic_depth=0.0))
case("post_add, gated, normed after the residual",
     load("pfeiffer", reduction_factor=1.5, residual_before_ln="post_add", use_gating=True, init_weights="houlsby", ln_after=True,
          adapter_residual_before_ln=True, non_linearity="leakyrelu", init_weights_seed=5))
case("compacter", load("compacter", reduction_factor=2, phm_dim=2))
case("compacter++, all its own", load("compacter++", reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_rule=True,
                                      factorized_phm_W=False, phm_c_init="uniform", phm_bias=False))
case("compacter, all shared", load("compacter", reduction_factor=2, phm_dim=2, shared_W_phm=True, phm_rank=2,
                                   factorized_phm_rule=True, init_weights_seed=5))
