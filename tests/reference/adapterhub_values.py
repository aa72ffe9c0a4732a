"""Reference values of tests/io/test_adapterhub.cpp, from AdapterHub. Prints C++.

python3 adapterhub_values.py needs torch and adapters, with its own version of transformers. Every parameter, the
adapter's among them, is set by the formula of encoder_values.py.
"""

import re

import adapters
import torch
import transformers
from adapters import LoRAConfig, PrefixTuningConfig, SeqBnConfig, UniPELTConfig

SHARED = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
              max_position_embeddings=12, num_labels=3)
FAMILIES = {
    "Roberta": dict(layer_norm_eps=1e-5, type_vocab_size=1),
    "DebertaV2": dict(layer_norm_eps=1e-6, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
                      share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0),
}
INPUTS = dict(input_ids=torch.tensor([[5, 3, 19, 7], [0, 2, 1, 1]]),
              attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))

for family, sizes in FAMILIES.items():
    config = getattr(transformers, f"{family}Config")(**SHARED, **sizes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    adapters.init(model)
    model.add_adapter("topics", UniPELTConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
                                              SeqBnConfig(reduction_factor=2), LoRAConfig(r=2, alpha=2)))
    model.set_active_adapters("topics")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The table of a prefix has one name more in each layer.
            name = re.sub(r"encoder\.layer\.0\.attention\.self\.prefix_tuning\.pool", "prefix_tuning", name)
            k = sum(name.encode()) % 31
            values = 0.15 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + k)
            if name.endswith("LayerNorm.weight"):
                values += 1
            parameter.copy_(values.reshape(parameter.shape))
        logits = model.eval()(**INPUTS).logits
    print(f"{{\"{family}\", {{{', '.join(f'{value:.9g}' for value in logits.flatten().tolist())}}}}},")
