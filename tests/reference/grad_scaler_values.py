"""The scale of torch.amp.GradScaler over steps with and without infinity, for tests/train/test_grad_scaler.cpp."""
import torch

scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
weight = torch.ones(2, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=0.5)
for finite in [1, 1, 0, 1, 1, 1, 0, 0, 1]:
    optimizer.zero_grad()
    loss = (weight * torch.tensor([1.0 if finite else float("inf"), 0.25])).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(scaler.get_scale(), weight.tolist(), scaler.state_dict()["_growth_tracker"])
