"""Reference values of tests/models/test_roberta.cpp and test_encoder_tasks.cpp, from transformers. Prints C++.

Every parameter is set by a formula both sides can compute: the i-th value of a parameter is 0.15 sin(0.7 i + k), k the
sum of the bytes of its name modulo 31, plus 1 for the weights of norms.
"""

import torch
import transformers

SHARED = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
FAMILIES = {
    "Bert": (dict(hidden_act="gelu_new", max_position_embeddings=10, layer_norm_eps=1e-6),
             dict(input_ids=torch.tensor([[5, 3, 19, 7], [1, 2, 0, 0]]), attention_mask=MASK,
                  token_type_ids=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))),
    "Roberta": (dict(max_position_embeddings=12, layer_norm_eps=1e-5, type_vocab_size=1),
                dict(input_ids=torch.tensor([[5, 3, 19, 7], [0, 2, 1, 1]]), attention_mask=MASK)),
}
# The bias of an output layer has two names.
SECOND = {"cls.predictions.bias": "cls.predictions.decoder.bias", "lm_head.bias": "lm_head.decoder.bias"}


def filled(family, task, labels=3):
    config = getattr(transformers, f"{family}Config")(**SHARED, **FAMILIES[family][0], num_labels=labels)
    model = getattr(transformers, family + task)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            k = sum(SECOND.get(name, name).encode()) % 31
            values = 0.15 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
            if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
                values += 1
            parameter.copy_(values.reshape(parameter.shape))
    return model.eval()


def show(name, tensor):
    values = ", ".join(f"{value:.9g}" for value in tensor.flatten().tolist())
    print(f"const auto {name} = torch::tensor({{{values}}});")


with torch.no_grad():
    for family, (_, inputs) in FAMILIES.items():
        print(f"// {family}")
        if family == "Roberta":
            model = filled(family, "ForSequenceClassification")
            show("hidden", model.roberta(**inputs).last_hidden_state[:, 1])
            show("unmasked", model.roberta(inputs["input_ids"]).last_hidden_state[1, 3])
            show("logits", model(**inputs).logits)
            show("loss", model(**inputs, labels=torch.tensor([2, 0])).loss)
            show("pooled", filled(family, "Model")(**inputs).pooler_output)
            show("token_logits", filled(family, "ForTokenClassification")(**inputs).logits[:, 1])
        spans = filled(family, "ForQuestionAnswering", labels=2)
        output = spans(**inputs, start_positions=torch.tensor([1, 0]), end_positions=torch.tensor([[3], [1]]))
        show("start_logits", output.start_logits)
        show("end_logits", output.end_logits)
        show("span_loss", output.loss)
        show("outside", spans(**inputs, start_positions=torch.tensor([9, -1]), end_positions=torch.tensor([3, 4])).loss)
        output = filled(family, "ForMaskedLM")(**inputs, labels=torch.tensor([[-100, 4, -100, -100], [-100, 9, -100, -100]]))
        show("word_logits", output.logits[:, 1])
        show("word_loss", output.loss)
