"""Runs Hugging Face PEFT and checks or prints the reference values of tests/methods/test_prompt.cpp,
test_p_tuning.cpp and test_multitask_prompt.cpp.

python3 prompt_values.py needs torch, transformers and peft; as lycoris_values.py. The model, its weights and its
inputs are those of bert_values.py.
"""

import contextlib
import copy
import io
import sys
import warnings

import peft
import torch

from lycoris_values import flat, run

with contextlib.redirect_stdout(io.StringIO()):
    from bert_values import inputs, model as bert, tokens

warnings.simplefilter("ignore")
LABELS = torch.tensor([2, 0])


def prompted(config, dtype, base=bert):
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(base), config).to(dtype).eval()


def case(name, config, **more):
    """The prompt from seed 0 in float32; the logits with it, and the losses of 12 AdamW steps of it alone."""
    values = {f"{name}: start": prompted(config(), torch.float32).get_prompt_embedding_to_save("default")}
    model = prompted(config(), torch.float64)
    values[f"{name}: logits"] = model(**inputs, **more).logits
    values[f"{name}: without types"] = model(**{**inputs, "token_type_ids": None}, **more).logits
    parameters = list(model.prompt_encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(**inputs, **more).logits, LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    values[f"{name}: losses"] = torch.stack(losses)
    values[f"{name}: trained"] = model(**inputs, **more).logits
    return values


def prompt(task="SEQ_CLS", **settings):
    return lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, **settings)


def p_tuning(**settings):
    return lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, **settings)


def prompts():
    values = case("random", prompt()) | case("vocabulary", prompt(prompt_tuning_init="SAMPLE_VOCAB"))
    encoder = prompted(prompt("FEATURE_EXTRACTION")(), torch.float64, bert.bert)
    values["encoder: last state of the first token"] = encoder(**inputs).last_hidden_state[:, 3]
    classifier = prompted(prompt("TOKEN_CLS")(), torch.float64, tokens)
    values["tokens: logits of the first token"] = classifier(**inputs).logits[:, 3]
    return values


def networks():
    lstm = p_tuning(encoder_reparameterization_type="LSTM", encoder_hidden_size=2)
    return case("mlp", p_tuning(encoder_hidden_size=5)) | case("lstm", lstm)


def tasks():
    def config():
        return peft.MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, num_tasks=3, num_ranks=2)

    values = case("tasks", config, task_ids=torch.tensor([2, 0]))
    encoder = prompted(config(), torch.float32).prompt_encoder["default"]
    values["tasks: matrices"] = flat([encoder.prefix_task_cols, encoder.prefix_task_rows])
    return values


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[1:],
            [
                ("test_prompt.cpp", "Prompts equal Hugging Face's numbers", prompts()),
                ("test_p_tuning.cpp", "P-tuning equals Hugging Face's numbers", networks()),
                ("test_multitask_prompt.cpp", "Multitask prompts equal Hugging Face's numbers", tasks()),
            ],
        )
    )
