"""A training job that saves when it is evicted, and goes on there when it is started again. `training.py HOW [WHAT]`

HOW, `polls`: asks `autoteardown.stop_requested()` after each step. `flag`: has a SIGTERM handler that sets a flag.
`callback`: has no code for evictions, a callback of `autoteardown.on_teardown()` saves. `fails`: ends with 3 in
step 20.
WHAT, `workers`: its batches come from two processes. `uneven`: rank 0 is slow between `backward()` and `step()`, so
that its peers are ahead. `slow`: the save takes 35 s.
Each rank saves the number of its step in a file of its own, `saved/RANK`, and leaves with 0.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import autoteardown

how, what = [*sys.argv[1:], ""][:2]
flag = []
if how == "flag":
    signal.signal(signal.SIGTERM, lambda signum, frame: flag.append(signum))


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 1 << 20

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.randn(4)


def batches():
    if what == "workers":
        yield from torch.utils.data.DataLoader(Samples(), num_workers=2)
    while True:
        yield torch.randn(2, 4)


def save():
    print(f"rank {rank} saves", flush=True)
    time.sleep(35 if what == "slow" else 0)
    place = Path("saved") / str(rank)
    place.parent.mkdir(exist_ok=True)
    place.with_suffix(".tmp").write_text(str(step))
    place.with_suffix(".tmp").rename(place)
    print(f"rank {rank} saved {step}", flush=True)


def evicted():
    """The agent runs the handler of every rank after the same step, so that the flag needs no collective."""
    return autoteardown.stop_requested() if how == "polls" else bool(flag)


dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
place = Path("saved") / str(rank)
step = int(place.read_text()) if place.exists() else 0
if how == "callback":
    autoteardown.on_teardown(save)
print(f"rank {rank} begins at {step}", flush=True)
for batch in batches():
    model(batch).square().mean().backward()
    if what == "uneven" and rank == 0:
        time.sleep(0.3)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if step % 10 == 0:
        print(f"rank {rank} pid {os.getpid()} step {step}", flush=True)
    if how == "fails" and step == 20:
        sys.exit(3)
    if evicted():
        save()
        break
    time.sleep(0.02)
dist.destroy_process_group()
print(f"rank {rank} left by itself", flush=True)
