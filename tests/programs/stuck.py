"""Rank 0 waits in an `all_reduce` that no other rank ever joins: they loop in Python."""

import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
print("ready", flush=True)
if dist.get_rank() == 0:
    dist.all_reduce(torch.ones(1))
while True:
    time.sleep(0.01)
