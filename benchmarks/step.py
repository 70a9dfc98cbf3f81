"""Measures the optimizer hook, a DDP loop with and without the agent, and what the agent adds to an init."""

from __future__ import annotations

import re
import statistics
import timeit
from typing import Any

from benchmarks import common
from benchmarks.common import Ranks, middle, table

INIT = """
import time
import torch
import torch.distributed as dist

start = time.perf_counter()
dist.init_process_group("gloo")
print("took", time.perf_counter() - start, flush=True)
dist.barrier()
time.sleep(0.1)
dist.destroy_process_group()
"""
# Armed and not in turns, in one job: from job to job the two ranks share the cores in other ways.
LOOP = """
import statistics, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import autoteardown

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
batch = torch.randn(16, 64)

def block(steps):
    dist.barrier()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

block(200)
for number in range(int(sys.argv[1])):
    found = {}
    for armed in (True, False) if number % 2 else (False, True):
        (autoteardown.arm if armed else autoteardown.disarm)()
        assert (autoteardown.status()["state"] == "armed") == armed, autoteardown.status()
        time.sleep(0.3)  # until it is connected
        found[armed] = block(int(sys.argv[2]))
    print("took", found[False], found[True], flush=True)
print("all", flush=True)
del model
autoteardown.arm()
dist.destroy_process_group()
"""


def hook(rounds: int) -> None:
    """The hook beside a hook that does nothing, in nanoseconds a call."""
    from autoteardown.training import optimizer_hooks

    def empty(optimizer: object, args: object, kwargs: object) -> None:
        pass

    calls = 20_000
    found: dict[str, list[float]] = {"a hook that does nothing": [], "the agent's hook": []}
    for _ in range(rounds):
        for name, function in zip(found, (empty, optimizer_hooks._after_step)):
            seconds = timeit.timeit(lambda function=function: function(None, (), {}), number=calls)  # type: ignore[misc]
            found[name].append(seconds / calls * 1e9)
    table(["call", "ns: median (quartiles)"], [[name, middle(values, 0)] for name, values in found.items()])


def init(rounds: int, env: dict[str, str] | None = None) -> dict[str, list[float]]:
    """Milliseconds that the init of rank 0 takes, in jobs of two ranks, one kind after the other.

    Args:
        rounds: jobs of each kind.
        env: of those with the agent, which are then not forked from a process that has it imported.
    """
    found: dict[str, list[float]] = {"none": [], "agent": []}
    ranks = Ranks()
    try:
        for number in range(rounds + 1):
            for mode in ("none", "agent") if number % 2 else ("agent", "none"):
                with ranks.job() as job:
                    extra = (env or {}) if mode == "agent" else {}
                    world: list[Any] = job.world(INIT, 2, mode=mode, fresh=env is not None, **extra)
                    seconds = float(world[0].wait_for(r"^took (\S+)$").group(1))
                    for rank in world:
                        rank.wait()
                if number:  # the first round warms up
                    found[mode].append(seconds * 1e3)
    finally:
        ranks.close()
    return found


def loop(size: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Microseconds that a step of rank 0 takes, the median of each block of them."""
    ranks = Ranks()
    try:
        with ranks.job() as job:
            world: list[Any] = job.world(LOOP, size, str(rounds), str(steps))
            world[0].wait_for("^all$", 600)
            took = re.findall(r"^took (\S+) (\S+)$", world[0].stdout, re.MULTILINE)
    finally:
        ranks.close()
    return {"none": [float(each[0]) * 1e6 for each in took], "agent": [float(each[1]) * 1e6 for each in took]}


def paired(found: dict[str, list[float]], digits: int) -> str:
    """The median of the differences within the rounds, and their quartiles."""
    differences = [with_ - without for without, with_ in zip(found["none"], found["agent"])]
    share = statistics.median(differences) / statistics.median(found["none"])
    return f"{middle(differences, digits)}, {share:+.1%}"


def run(quick: bool) -> None:
    hook(5 if quick else 25)
    print()
    measured = [
        ("a step of one rank, µs", loop(1, 4 if quick else 40, 100 if quick else 300), 1),
        ("a step of two ranks, µs", loop(2, 4 if quick else 40, 100 if quick else 300), 1),
        ("an init of two ranks, ms", init(3 if quick else 40), 2),
    ]
    if common.beside:
        rounds = 3 if quick else 15
        theirs = init(rounds, {"PYTHONPATH": str(common.beside.folder)})
        measured.append(("an init, each process by itself, ms", init(rounds, {}), 2))
        measured.append((f"the same, {common.beside.name}", theirs, 2))
    table(
        ["DDP, gloo", "without", "with the agent", "difference, paired"],
        [
            [what, middle(found["none"], digits), middle(found["agent"], digits), paired(found, digits)]
            for what, found, digits in measured
        ],
    )
