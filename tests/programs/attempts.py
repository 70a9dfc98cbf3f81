"""Under torchrun. The first attempt does not end by itself; a later one trains five steps.

`attempts.py blocked`: at the first, rank 0 waits in a collective that the others never join. `attempts.py apart`: ranks
1 and 2 wait for each other, which rank 0 has no part in. `attempts.py steps`: all train.

Prints `attempt A rank R of W pid P`, after the first barrier, and `attempt A rank R trained`.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
dist.barrier()
# In one write: several processes print here.
os.write(1, f"attempt {attempt} rank {rank} of {dist.get_world_size()} pid {os.getpid()}\n".encode())
if attempt == 0 and sys.argv[1] == "blocked":
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    while True:
        time.sleep(0.01)
if attempt == 0 and sys.argv[1] == "apart":
    import autoteardown

    groups = [dist.new_group([1, 2]), dist.new_group([1, 2])]
    while not autoteardown.status()["connected"]:  # else its peers do not notice its end
        time.sleep(0.01)
    os.write(1, f"rank {rank} apart\n".encode())
    if rank:
        dist.all_reduce(torch.ones(1), group=groups[rank - 1])
    while True:
        time.sleep(0.01)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
while attempt == 0 or step < 5:
    optimizer.zero_grad()
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    time.sleep(0.005)
    step += 1
os.write(1, f"attempt {attempt} rank {rank} trained\n".encode())
time.sleep(0.1)  # see train.py
dist.destroy_process_group()
