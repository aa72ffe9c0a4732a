"""Prints the reference values of tests/train/test_lora_plus.cpp from Hugging Face PEFT.

python3 lora_plus_values.py needs torch, transformers and peft.
"""

import peft.optimizers
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(10, 8)
        self.q = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 2)


for use_dora in (False, True):
    targets = ["emb", "q", "conv"]
    config = peft.LoraConfig(
        r=2, target_modules=targets, modules_to_save=["head", "norm"], use_dora=use_dora, bias="lora_only"
    )
    model = peft.get_peft_model(Net(), config)
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.05
    )
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    print("DoRA" if use_dora else "LoRA")
    for group in optimizer.param_groups:
        print(f"  lr {group['lr']:.6g} decay {group['weight_decay']}: " + " ".join(names[id(p)] for p in group["params"]))
