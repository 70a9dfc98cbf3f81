"""An example of a training program. It has no code for evictions.

One process is a world of its own; torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, make it a rank.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

for name, default in (
    ("RANK", "0"),
    ("WORLD_SIZE", "1"),
    ("MASTER_ADDR", "127.0.0.1"),
    ("MASTER_PORT", "29500"),
):
    os.environ.setdefault(name, default)
steps = int(os.environ.get("STEPS", "1000000"))
on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

dist.init_process_group("nccl" if on_gpu else "gloo")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(nn.Linear(32, 8).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(steps):
    inputs = torch.randn(64, 32, device=device)
    loss = model(inputs).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0 and dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)
    time.sleep(0.01)
dist.destroy_process_group()
