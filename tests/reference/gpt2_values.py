"""Reference values of tests/models/test_gpt2.cpp, from transformers. Prints C++.

Every parameter is set by a formula both sides can compute: the i-th value of the k-th parameter is
0.4 sin(0.7 i + k), plus 1 for the weights of norms.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12,
                    scale_attn_by_inverse_layer_idx=True, eos_token_id=17, bos_token_id=1, pad_token_id=0)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for k, (name, parameter) in enumerate(model.named_parameters()):
        values = 0.4 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
        if "ln_" in name and name.endswith("weight"):
            values += 1
        parameter.copy_(values.reshape(parameter.shape))

ids = torch.tensor([[5, 3, 19, 7], [0, 0, 9, 12]])
mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])


def show(name, tensor, integers=False):
    values = ", ".join(f"{value}" if integers else f"{value:.9g}" for value in tensor.flatten().tolist())
    print(f"const auto {name} = torch::tensor({{{values}}});")


with torch.no_grad():
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    show("first_layer", output.hidden_states[1][:, 3])
    show("last", output.logits[:, 3])
    show("placed", model(ids, attention_mask=mask, position_ids=positions).logits[1, 3])
    show("typed", model(ids, token_type_ids=torch.ones_like(ids)).logits[0, 3])
    show("loss", model(ids, labels=torch.tensor([[5, -100, 19, 7], [0, 0, 9, -100]])).loss)
    show("texts", model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), integers=True)
    model.generation_config.eos_token_id = None
    show("longer", model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), integers=True)
