"""Ranks started by `torch.multiprocessing.spawn`: rank 0 waits in a collective that rank 1 never joins."""

import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing


def work(rank):
    """One rank."""
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    dist.barrier()
    # In one write: several processes print here.
    os.write(1, f"rank {rank} pid {os.getpid()}\n".encode())
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    while True:
        time.sleep(0.01)


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, nprocs=2)
