"""Checks or prints the reference values of tests/train/test_t_few.cpp: the T-Few losses, as its authors compute
them, written down plainly.

python3 t_few_values.py needs torch. Every list of numbers in the test case named below must be one of the
lists computed here, and every list computed here must be there. With --print they are printed instead.
"""

import math
import pathlib
import sys

import torch

from lora_values import compare, fill

TEST = pathlib.Path(__file__).resolve().parent.parent / "train" / "test_t_few.cpp"
PADDING = 0
CHOICES = [[[3, 1, 0, 0], [2, 4, 1, 0], [1, 1, 4, 2]], [[4, 2, 2, 0], [1, 0, 0, 0], [3, 3, 1, 2]]]
LABELS = [1, 0]


def losses(logits, length_norm=1.0):
    """(language model, multiple choice, unlikelihood, scores) of logits (batch, choices, time, words)."""
    correct, count = 0.0, 0
    choice, unlikely, wrong = 0.0, 0.0, 0
    scores = torch.zeros(len(CHOICES), len(CHOICES[0]), dtype=logits.dtype)
    for row, (choices, label) in enumerate(zip(CHOICES, LABELS)):
        for number, tokens in enumerate(choices):
            length = sum(token != PADDING for token in tokens)
            for place, token in enumerate(tokens):
                likelihood = torch.tensor(-100.0, dtype=logits.dtype)
                if token != PADDING:
                    log_p = logits[row, number, place].log_softmax(0)[token]
                    scores[row, number] = scores[row, number] - log_p / length**length_norm
                    if number == label:
                        correct, count = correct - log_p, count + 1
                    else:
                        likelihood, wrong = log_p, wrong + 1
                unlikely = unlikely - torch.log(1 - torch.exp(likelihood) + 1e-2)
        choice = choice - (-scores[row]).log_softmax(0)[label] / len(CHOICES)
    return correct / count, choice, unlikely / wrong, scores


def values():
    logits = (3 * fill([2, 3, 4, 5], 1)).requires_grad_(True)
    language_model, choice, unlikely, scores = losses(logits)
    (language_model + 0.5 * choice + 2 * unlikely).backward()
    return {
        "the three losses": torch.stack([language_model, choice, unlikely]),
        "scores": scores,
        "scores with length norm 0.5": losses(logits, 0.5)[3],
        "choice loss without length norm": losses(logits, 0.0)[1].view(1),
        "gradient at the correct choice": logits.grad[0, 1, 2],
        "gradient at a wrong choice": logits.grad[1, 2, 0],
    }


def main(arguments):
    torch.set_num_threads(1)
    assert math.isclose(float(losses(torch.zeros(2, 3, 4, 5).double())[0]), math.log(5))
    if arguments == ["--print"]:
        for name, tensor in values().items():
            print(f"{name}: " + ", ".join(f"{v:.10g}" for v in tensor.detach().double().flatten().tolist()))
        return 0
    source = pathlib.Path(arguments[0] if arguments else TEST).read_text()
    return 1 if compare(source, "The T-Few losses equal the authors' formulas", values(), 1e-9) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
