"""Reference values of tests/models/test_bert.cpp and test_bert_tokens.cpp, from transformers. Prints C++.

Every parameter is set by a formula both sides can compute: the i-th value of the k-th parameter is
0.15 sin(0.7 i + k), plus 1 for the weights of norms.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

config = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
    hidden_act="gelu_new", max_position_embeddings=10, type_vocab_size=2, layer_norm_eps=1e-6, num_labels=3,
)


def filled(model):
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            values = 0.15 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
            if name.endswith("LayerNorm.weight"):
                values += 1
            parameter.copy_(values.reshape(parameter.shape))
    return model.eval()


model = filled(BertForSequenceClassification(config))
tokens = filled(BertForTokenClassification(config))
inputs = dict(
    input_ids=torch.tensor([[5, 3, 19, 7], [1, 2, 0, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    token_type_ids=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
)


def show(name, tensor):
    values = ", ".join(f"{value:.9g}" for value in tensor.flatten().tolist())
    print(f"const auto {name} = torch::tensor({{{values}}});")


with torch.no_grad():
    output = model.bert(**inputs, output_hidden_states=True)
    show("hidden", output.last_hidden_state[:, 1])
    show("first_layer", output.hidden_states[1][:, 0])
    show("pooled", output.pooler_output)
    single = model(**inputs, labels=torch.tensor([2, 0]))
    show("logits", single.logits)
    show("single", single.loss)
    show("ignoring", model(**inputs, labels=torch.tensor([-100, 0])).loss)
    model.config.problem_type = "multi_label_classification"
    show("multi", model(**inputs, labels=torch.tensor([[1.0, 0, 1], [0, 0, 1]])).loss)
    model.config.problem_type = "regression"
    show("regression", model(**inputs, labels=torch.tensor([[0.5, 0, 1], [0, -2, 1]])).loss)

    labels = torch.tensor([[2, 0, -100, 1], [1, 1, -100, -100]])
    output = tokens(**inputs, labels=labels)
    show("token_logits", output.logits[:, 1])
    show("token_loss", output.loss)
    show("all_labelled", tokens(**inputs, labels=labels.clamp_min(0)).loss)
