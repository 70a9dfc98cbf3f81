"""Composer's way: a handler put in place at import that leaves with 128 + n. (composer/utils/misc.py, `set_signal`.)

`fw_exit_handler.py FOLDER`: an atexit callback closes the run down, as Composer's engine does, here by a save.
"""

import atexit
import os
import signal
import sys
import time


def exit_handler(signum, frame):
    sys.exit(128 + signum)


signal.signal(signal.SIGTERM, exit_handler)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


@atexit.register
def close():
    torch.save(model.module.state_dict(), f"{sys.argv[1]}/rank{rank}.pt")
    print(f"rank {rank} closed", flush=True)


for step in range(1, 1 << 30):
    optimizer.zero_grad()
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    print(f"rank {rank} pid {os.getpid()} step {step}", flush=True)
    time.sleep(0.02)
