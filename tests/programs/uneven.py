"""Ranks that do not all do the same. `uneven.py ROLE`: prints `rank R step K`. Roles:

steps     all_reduce and step
slow      as steps, 0.1 s slower at each of them
returns   as steps, on a thread; when the file `go` is there, that ends (the process lives on)
ends      as steps; when the file `go` is there, the process ends by itself
raises    as steps; when the file `go` is there, it ends with an exception
helper    takes part in every all_reduce and has no optimizer
long      as steps, each of them an hour
destroys  as steps; when the file `go` is there, destroys the group, prints `destroying` first
again     as steps, in a second group after a first one was destroyed
"""

import os
import sys
import threading
import time

import torch
import torch.distributed as dist

role = sys.argv[1]


def go():
    """Whether the test says so, to all ranks at the same step."""
    flag = torch.tensor([float(os.path.exists("go"))])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def train():
    """Train."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step = 0
    while True:
        weight.grad = torch.ones(1)
        dist.all_reduce(weight.grad)
        if go():
            if role in ("returns", "ends"):
                return
            if role == "raises":
                raise RuntimeError("a bug of the program's")
            if role == "destroys":
                print("destroying", flush=True)
                dist.destroy_process_group()
                return
        if role == "slow":
            time.sleep(0.1)
        if role != "helper":
            optimizer.step()
        step += 1
        print("rank", dist.get_rank(), "step", step, flush=True)
        time.sleep(3600 if role == "long" else 0.005)


dist.init_process_group("gloo")
if role == "again":
    dist.barrier()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    dist.init_process_group("gloo")
if role == "returns":
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
else:
    train()
if role == "ends":
    sys.exit(0)
print("trained", flush=True)
while True:
    time.sleep(0.01)
