"""A world on another kind of store. `inits.py KIND`: file, store (a caller's TCPStore), prefix, hash (one rank)."""

import os
import sys
import time

import torch
import torch.distributed as dist

kind = sys.argv[1]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if kind == "file":
    dist.init_process_group(
        "gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=rank, world_size=world
    )
else:
    if kind == "hash":
        store = dist.HashStore()
    else:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, rank == 0)
    if kind == "prefix":
        store = dist.PrefixStore("outer", dist.PrefixStore("inner/", store))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
step = 0
while True:
    weight.grad = torch.ones(1)
    dist.all_reduce(weight.grad)
    optimizer.step()
    step += 1
    print("step", step, flush=True)
    time.sleep(0.005)
