"""Ranks 1 and 2 each wait in a collective that nobody joins, and that does not involve the other ranks.

As in an NCCL job, nothing tells them that one of those has ended.
"""

import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
groups = [dist.new_group([1, 2]), dist.new_group([1, 2])]
dist.barrier()
print("ready", flush=True)
if rank in (1, 2):
    dist.all_reduce(torch.ones(1), group=groups[rank - 1])
while True:
    time.sleep(0.01)
