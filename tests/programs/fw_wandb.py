"""Two ranks that log to Weights & Biases, each to a run of its own, offline; `fw_wandb.py none`: rank 1 to none."""

import os
import sys

import torch
import torch.distributed as dist
import wandb
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
run = None
if rank == 0 or "none" not in sys.argv:
    folder = f"wandb-{rank}"
    os.makedirs(folder)
    run = wandb.init(mode="offline", project="evictions", dir=folder)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
while True:
    loss = model(torch.randn(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    if run is not None:
        run.log({"loss": loss.item()})
    step += 1
    print(f"rank {rank} pid {os.getpid()} step {step}", flush=True)
