"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_oft.cpp and
test_boft.cpp.

python3 oft_values.py needs torch and peft; as lycoris_values.py. BOFT's CUDA extension is replaced by torch's own
block_diag, so that it takes more than one butterfly factor.
"""

import sys
import types

import peft
import torch

from lora_values import fill
from lycoris_values import layer_case, run


def linear():
    return torch.nn.Linear(6, 3)


def oft():
    def config(block_size=3, blocks=0, **settings):
        return lambda: peft.OFTConfig(r=blocks, oft_block_size=block_size, target_modules=["layer"], **settings)

    x = [2, 6]
    values = layer_case("linear", linear, config(init_weights=False), fill(x, 5))
    values |= layer_case("exact", linear, config(use_cayley_neumann=False), fill(x, 5))
    values |= layer_case("shared block", linear, config(block_share=True, num_cayley_neumann_terms=2), fill(x, 5))
    values |= layer_case("adjusted blocks", linear, config(0, 4, num_cayley_neumann_terms=3), fill(x, 5))
    values |= layer_case("constrained", linear, config(coft=True, eps=0.5, num_cayley_neumann_terms=7), fill(x, 5))
    values |= layer_case("pointwise", lambda: torch.nn.Conv2d(4, 3, 1, stride=2), config(2), fill([1, 4, 3, 2], 5))
    # Of one patch: where patches overlap, PEFT's forward differs from its merge.
    values |= layer_case("patch", lambda: torch.nn.Conv2d(1, 3, 3), config(), fill([2, 1, 3, 3], 5))
    values |= layer_case("embedding", lambda: torch.nn.Embedding(5, 6), config(), torch.tensor([0, 3, 4]))
    return values


def boft():
    from peft.tuners.boft import layer

    layer.get_fbd_cuda = lambda: True
    layer.FastBlockDiag = types.SimpleNamespace(
        apply=lambda factors: torch.stack([torch.block_diag(*blocks) for blocks in factors])
    )

    def config(block_size, blocks=0, factors=1, **settings):
        return lambda: peft.BOFTConfig(
            boft_block_size=block_size,
            boft_block_num=blocks,
            boft_n_butterfly_factor=factors,
            target_modules=["layer"],
            **settings,
        )

    values = layer_case("linear", linear, config(3, init_weights=False), fill([2, 6], 5))
    wide = torch.nn.Linear(8, 3, bias=False)
    values |= layer_case("butterfly", lambda: wide, config(0, 4, 3), fill([2, 8], 5))
    values |= layer_case("dropout", linear, config(2, boft_dropout=0.5), fill([2, 6], 5))
    image = torch.nn.Conv2d(2, 3, 2, stride=2, padding=1)
    values |= layer_case("convolution", lambda: image, config(2, 0, 2), fill([1, 2, 3, 2], 5))
    return values


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[1:],
            [
                ("test_oft.cpp", "OFT equals Hugging Face's numbers", oft()),
                ("test_boft.cpp", "BOFT equals Hugging Face's numbers", boft()),
            ],
        )
    )
