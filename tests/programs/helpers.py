"""A training script with helper processes of `multiprocessing` that are no daemons and write no checkpoint.

`helpers.py KIND`, one for each rank; says `helper up`, and `step N` after every step.

idle      waits for work, as a pool's worker does
pool      a `ProcessPoolExecutor` that has something to do in every step
spawned   waits for work in an interpreter of its own
log       works, prints, and writes a log of its own, which it appends to
busy      computes all the time
"""

import concurrent.futures
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist


def wait(queue):
    """For work that never comes. What it has open is no checkpoint."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm"), tempfile.TemporaryFile():
        print("helper up", flush=True)
        queue.get()


def log(queue):
    """Forever: a line now and then."""
    print("helper up", flush=True)
    with Path("helper.log").open("a") as file:
        while True:
            print("helping", file=file, flush=True)
            print("helping", flush=True)
            time.sleep(0.05)


def compute(queue):
    """Forever."""
    print("helper up", flush=True)
    while True:
        time.sleep(0)


def helper(kind):
    """Start one; return what every step does with it."""
    context = multiprocessing.get_context("spawn" if kind == "spawned" else "fork")
    if kind == "pool":
        pool = concurrent.futures.ProcessPoolExecutor(2, context)
        pool.submit(print, "helper up", flush=True)
        return lambda: pool.submit(time.sleep, 0.01).result()
    queue = context.SimpleQueue()
    context.Process(target={"log": log, "busy": compute}.get(kind, wait), args=[queue]).start()
    return lambda: queue


def main(kind):
    """Train."""
    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    use = helper(kind)
    step = 0
    while True:
        use()
        weight.grad = torch.ones(8)
        dist.all_reduce(weight.grad)
        optimizer.step()
        step += 1
        print("step", step, flush=True)
        time.sleep(0.005)


if __name__ == "__main__":
    main(sys.argv[1])
