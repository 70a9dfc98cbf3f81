"""Trainers with a default group, engines without one, and a group that syncs weights between them.

`custom_group.py trainer|engine NUMBER SYNC_PORT steps|idle|blocked|hangs [ENGINES]`. Trainer 0 and the engines are in
the group, which is made as SkyRL and OpenRLHF make it. `blocked`: in a broadcast in it that trainer 0 never joins, or
that the engines do not. `hangs`: it steps, and releasing the group waits for its other members, as NCCL may.
"""

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world, rendezvous

import autoteardown


def init_custom_process_group(port, rank, world_size, name="weights"):
    """A copy of torch's init, but for the default group."""
    timeout = timedelta(seconds=300)
    store, rank, world_size = next(
        iter(rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=timeout))
    )
    store.set_timeout(timeout)
    store = PrefixStore(name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], "gloo", store, group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


def main(role, number, port, what, engines="1"):
    """Join, say so, and do it for ever."""
    number, size, group = int(number), 1 + int(engines), None
    if role == "trainer":
        dist.init_process_group("gloo")
    if role == "engine" or number == 0:
        group = init_custom_process_group(port, number + (role == "engine"), size)
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        assert ones.item() == size
    print("status", json.dumps(autoteardown.status()), flush=True)
    if role == "trainer":
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        dist.barrier()
    print("ready", flush=True)
    if what == "hangs":
        # Before torch 2.7 a group has no such method.
        here = hasattr(dist.ProcessGroup, "shutdown")
        owner, name = (
            (dist.ProcessGroup, "shutdown") if here else (dist.distributed_c10d, "_shutdown_backend")
        )
        real = getattr(owner, name)
        setattr(
            owner,
            name,
            lambda group: time.sleep(600) if group.group_name == "weights" else real(group),
        )
    if what == "blocked":
        dist.broadcast(torch.ones(1), 0 if role == "engine" else 1, group=group)
        print("the broadcast returned", flush=True)
    while True:
        if what in ("steps", "hangs"):
            model(torch.randn(4, 2)).sum().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
        time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
