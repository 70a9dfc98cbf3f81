"""A rank whose training thread is not the main thread, evicted before there is an optimizer: `WHERE` it is then.

It prints `computing`, and after a second `went on`. The group's stop takes three seconds, because of rank 1.
"""

import sys
import threading
import time

import torch
import torch.distributed as dist

import autoteardown


def compute():
    print("computing", flush=True)
    for _ in range(100):
        time.sleep(0.01)
    print("went on", flush=True)


class Model(torch.nn.Linear):
    """Computes for long when DDP's constructor asks for its parameters, or in its forward pass."""

    def named_parameters(self, *args, **kwargs):
        if sys.argv[1] == "constructor":
            compute()
        return super().named_parameters(*args, **kwargs)

    def forward(self, batch):
        if sys.argv[1] == "forward":
            compute()
        return super().forward(batch)


def train():
    if sys.argv[1] == "elsewhere":
        compute()
        dist.all_reduce(torch.ones(1))
    model = torch.nn.parallel.DistributedDataParallel(Model(4, 4))
    model(torch.ones(1, 4)).sum().backward()


dist.init_process_group("gloo")
if dist.get_rank() == 1:
    autoteardown.on_teardown(lambda: time.sleep(3))
thread = threading.Thread(target=train)
thread.start()
thread.join()
