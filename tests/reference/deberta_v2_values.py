"""Reference values of tests/models/test_deberta_v2.cpp, from transformers. Prints C++.

Every parameter is set by a formula both sides can compute: the i-th value of the k-th parameter is 0.15 sin(0.7 i + k), plus
1 for the weights of norms.
"""

import torch
from transformers import (DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2ForQuestionAnswering,
                          DebertaV2ForSequenceClassification, DebertaV2ForTokenClassification)

sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
             max_position_embeddings=12, layer_norm_eps=1e-6, num_labels=3, relative_attention=True,
             pos_att_type="p2c|c2p")
third = dict(sizes, position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
             legacy=False)
second = dict(sizes, embedding_size=6, type_vocab_size=2, conv_kernel_size=3, conv_groups=2, max_relative_positions=3)
inputs = dict(
    input_ids=torch.tensor([[5, 3, 19, 7, 11, 2], [1, 2, 4, 9, 0, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    token_type_ids=torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]),
)


def filled(model):
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            values = 0.15 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
            if name.endswith("LayerNorm.weight"):
                values += 1
            parameter.copy_(values.reshape(parameter.shape))
    return model.eval()


def show(name, tensor):
    values = ", ".join(f"{value:.9g}" for value in tensor.flatten().tolist())
    print(f"const auto {name} = torch::tensor({{{values}}});")


with torch.no_grad():
    labels = torch.tensor([2, 0])
    for name, settings in (("third", third), ("second", second)):
        model = filled(DebertaV2ForSequenceClassification(DebertaV2Config(**settings)))
        output = model(**inputs, labels=labels, output_hidden_states=True)
        show(f"{name}_hidden", output.hidden_states[-1][:, 3])
        show(f"{name}_first_layer", output.hidden_states[1][:, 5])
        show(f"{name}_logits", output.logits)
        show(f"{name}_loss", output.loss)
    show("ignoring", model(**inputs, labels=torch.tensor([-1, 0])).loss)
    show("all_ignored", model(**inputs, labels=torch.tensor([-1, -100])).loss)
    show("probabilities", model(**inputs, labels=torch.tensor([[0.5, 0.2, 0.3], [0, 0, 1]])).loss)
    tokens = filled(DebertaV2ForTokenClassification(DebertaV2Config(**third)))
    show("token_logits", tokens(**inputs).logits[:, 1])
    answers = filled(DebertaV2ForQuestionAnswering(DebertaV2Config(**dict(third, num_labels=2))))
    output = answers(**inputs, start_positions=torch.tensor([1, 3]), end_positions=torch.tensor([2, 9]))
    show("start_logits", output.start_logits[:, 1])
    show("end_logits", output.end_logits[:, 1])
    show("answer_loss", output.loss)
    for name, settings in (("word_logits", third), ("legacy_word_logits", second)):
        show(name, filled(DebertaV2ForMaskedLM(DebertaV2Config(**settings)))(**inputs).logits[:, 1, :4])
