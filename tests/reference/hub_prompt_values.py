"""Reference values of tests/methods/test_prompt.cpp, from AdapterHub. Prints C++.

python3 hub_prompt_values.py needs torch and adapters, with its own version of transformers. The model, its weights and
its inputs are those of bert_values.py; its attention is the plain one, for with "sdpa" AdapterHub's virtual tokens see
the padding.
"""

import contextlib
import io

import adapters
import torch

with contextlib.redirect_stdout(io.StringIO()):
    from bert_values import BertForSequenceClassification, config, filled, inputs

config._attn_implementation = "eager"
model = filled(BertForSequenceClassification(config))
adapters.init(model)


def show(name, tensor):
    print(f"// {name}\n{{{', '.join(f'{value:.10g}' for value in tensor.detach().double().flatten().tolist())}}},")


for combine in ["prefix", "prefix_after_bos"]:
    torch.manual_seed(0)
    model.add_adapter(combine, adapters.PromptTuningConfig(prompt_length=3, combine=combine))
    model.set_active_adapters(combine)
    if combine == "prefix":
        show("hub start", model.bert.prompt_tuning.prompt_tunings[combine].prompt_embedding.weight)
    show(f"hub {combine} logits", model.eval().double()(**inputs).logits)
    model.float()
