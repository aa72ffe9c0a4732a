"""Reference values of tests/methods/test_prefix.cpp, printed as C++. Run it once with Hugging Face PEFT installed and
once with AdapterHub's adapters: it prints what the library at hand knows.

Models are filled by the formula of bert_values.py.
"""

import warnings

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

warnings.simplefilter("ignore")
bert_config = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
    hidden_act="gelu_new", max_position_embeddings=10, type_vocab_size=2, layer_norm_eps=1e-6, num_labels=3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
gpt2_config = GPT2Config(vocab_size=20, n_positions=24, n_embd=8, n_layer=2, n_head=2, n_inner=12,
                         bos_token_id=None, eos_token_id=None,
                         # adapters 1.3.0 counts the keys a query sees from the prefix on in the fused attention
                         attn_implementation="eager")
inputs = dict(
    input_ids=torch.tensor([[5, 3, 19, 7], [1, 2, 0, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    token_type_ids=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
)
text = dict(input_ids=torch.tensor([[5, 3, 19, 7, 2]]))
padded = dict(input_ids=torch.tensor([[5, 3, 19, 7], [0, 0, 4, 11]]),
              attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
positions = torch.tensor([[3, 1, 0, 2]])


def filled(model):
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            values = 0.15 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
            if name.endswith(("LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                values += 1
            parameter.copy_(values.reshape(parameter.shape))
    return model.eval()


def show(name, tensor):
    print(f"const std::vector<double> {name}{{{', '.join(f'{x:.9g}' for x in tensor.flatten().tolist())}}};")


def hugging_face():
    from peft import PrefixTuningConfig, get_peft_model

    def seeded(model, config):
        model = filled(model)
        torch.manual_seed(5)
        return get_peft_model(model, config).eval()

    forms = {
        "direct": dict(num_virtual_tokens=3),
        "zero": dict(num_virtual_tokens=3, init_weights="zero"),
        "projected": dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
    }
    for name, form in forms.items():
        model = seeded(BertForSequenceClassification(bert_config), PrefixTuningConfig(task_type="SEQ_CLS", **form))
        show(f"{name}_table", model.get_prompt_embedding_to_save("default")[0])
        show(f"{name}_logits", model(**inputs).logits)
        show(f"{name}_placed", model(**inputs, position_ids=positions).logits)
        model = seeded(GPT2LMHeadModel(gpt2_config), PrefixTuningConfig(task_type="CAUSAL_LM", **form))
        show(f"{name}_gpt2", model(**text).logits[0, :, 4])
        show(f"{name}_gpt2_loss", model(**text, labels=text["input_ids"]).loss)
        show(f"{name}_texts", model.generate(**padded, max_new_tokens=6, do_sample=False, pad_token_id=0,
                                             eos_token_id=None))


def adapter_hub():
    import adapters

    forms = {
        "hub": dict(prefix_length=3, bottleneck_size=5),
        "hub_flat": dict(prefix_length=3, flat=True, leave_out=[1]),
        "hub_gated": dict(prefix_length=3, bottleneck_size=5, non_linearity="relu", use_gating=True),
        "hub_gates": dict(prefix_length=2, bottleneck_size=5, use_gating=True, shared_gating=False),
    }
    for name, form in forms.items():
        for model, given, end in [(BertForSequenceClassification(bert_config), inputs, ""),
                                  (GPT2LMHeadModel(gpt2_config), text, "_gpt2")]:
            model = filled(model)
            adapters.init(model)
            torch.manual_seed(5)
            model.add_adapter("one", config=adapters.PrefixTuningConfig(**form))
            model.set_active_adapters("one")
            logits = model.eval()(**given).logits
            show(f"{name}{end}", logits[0, :, 4] if end else logits)
    model = filled(BertForSequenceClassification(bert_config))
    adapters.init(model)
    torch.manual_seed(5)
    model.add_adapter("one", config=adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5, dropout=0.4))
    model.set_active_adapters("one")
    model.train()
    torch.manual_seed(6)
    show("hub_dropout", model(**inputs).logits)


with torch.no_grad():
    try:
        hugging_face()
    except ImportError:
        adapter_hub()
