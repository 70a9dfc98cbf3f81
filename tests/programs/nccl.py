"""Ranks on NCCL, all on the first GPU. `nccl.py ROLE`:

idle      stay in a Python loop
train     train with DDP; prints `step K`
backward  the same with a model whose backward takes most of the time; prints `backward K` as it begins
stuck     rank 0 waits for an all_reduce that nobody joins; the others stay in a Python loop
groups    the same on a group split off the default one, beside a second one that is idle
flight    rank 0 destroys the group with such an all_reduce in flight
spin      rank 0's device is busy with a kernel of its own for a long time
none      gloo, and no CUDA

Prints `ready` when it is there, and `garbage` if it ever comes back from what it waits for.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import autoteardown

role, rank = sys.argv[1], int(os.environ["RANK"])


@autoteardown.on_teardown
def look():
    """On the way out: whether anybody has initialised CUDA here."""
    print("initialised", torch.cuda.is_initialized(), flush=True)


def loop():
    """For ever."""
    while True:
        time.sleep(0.01)


def train(width, depth, text):
    """For ever, too."""
    layers = [torch.nn.Linear(width, width) for _ in range(depth)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers).cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch, step = torch.randn(width, width, device="cuda"), 0
    while True:
        loss = model(batch).square().mean()
        if text == "backward":
            torch.cuda.synchronize()
            print("backward", step, flush=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if text == "step":
            torch.cuda.synchronize()
            print("step", step, flush=True)


def main():
    """Play the role."""
    if role == "none":
        dist.init_process_group("gloo")
        print("ready", flush=True)
        loop()
    torch.cuda.set_device(0)
    print("joining", flush=True)
    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    ones = torch.ones(1 << 20, device="cuda")
    dist.all_reduce(ones)
    torch.cuda.synchronize()
    group = None
    if role == "groups":
        everybody = list(range(dist.get_world_size()))
        other = dist.new_group(everybody)
        dist.all_reduce(ones, group=other)
        group = dist.split_group(split_ranks=[everybody])
        dist.all_reduce(ones, group=group)
        torch.cuda.synchronize()
    print("ready", flush=True)
    if role == "train":
        train(256, 4, "step")
    if role == "backward":
        train(4096, 8, "backward")
    if rank == 0 and role != "idle":
        if role == "spin":
            for _ in range(60):
                torch.cuda._sleep(1 << 31)  # about a second each
        else:
            dist.all_reduce(ones, group=group)
        print("waiting", flush=True)
        if role == "flight":
            dist.destroy_process_group()
        torch.cuda.synchronize()
        print("garbage", float(ones[0]), flush=True)
    loop()


if __name__ == "__main__":
    main()
