"""The hook by itself, a DDP loop of two ranks with and without the agent, and what the agent adds to an init."""

from __future__ import annotations

import statistics
import timeit
from typing import Any

from benchmarks.common import Ranks, middle, table

PROGRAM = """
import statistics, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

start = time.perf_counter()
dist.init_process_group("gloo")
init = time.perf_counter() - start
dist.barrier()
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
batch, times = torch.randn(16, 64), []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
print("took", init, statistics.median(times), flush=True)
del model
time.sleep(0.1)
dist.destroy_process_group()
"""


def hook(rounds: int) -> None:
    """The hook beside a hook that does nothing, in nanoseconds a call."""
    from autoteardown import training

    def empty(optimizer: object, args: object, kwargs: object) -> None:
        pass

    calls = 20_000
    found: dict[str, list[float]] = {"a hook that does nothing": [], "the agent's hook": []}
    for _ in range(rounds):
        for name, function in zip(found, (empty, training.step_hook)):
            seconds = timeit.timeit(lambda function=function: function(None, (), {}), number=calls)  # type: ignore[misc]
            found[name].append(seconds / calls * 1e9)
    table(["call", "ns: median (quartiles)"], [[name, middle(values, 0)] for name, values in found.items()])


def loop(rounds: int, steps: int) -> None:
    """Jobs of two ranks, one kind after the other; the median step of each job's rank 0, and its init."""
    inits: dict[str, list[float]] = {"none": [], "agent": []}
    step_times: dict[str, list[float]] = {"none": [], "agent": []}
    ranks = Ranks()
    try:
        for number in range(rounds + 1):
            order = ["none", "agent"]
            for mode in order if number % 2 else order[::-1]:
                with ranks.job() as job:
                    world: list[Any] = job.world(PROGRAM, 2, str(steps), mode=mode)
                    init, step = map(float, world[0].wait_for(r"^took (\S+) (\S+)$").groups())
                    for rank in world:
                        rank.wait()
                if number:  # the first round warms up
                    inits[mode].append(init * 1e3)
                    step_times[mode].append(step * 1e6)
    finally:
        ranks.close()
    print()
    table(
        ["two DDP ranks, gloo", "without", "with the agent", "difference, paired"],
        [
            [what, middle(found["none"], digits), middle(found["agent"], digits), paired(found, digits)]
            for what, found, digits in (("step, µs", step_times, 0), ("init, ms", inits, 2))
        ],
    )


def paired(found: dict[str, list[float]], digits: int) -> str:
    """The median of the differences within the rounds, and their quartiles."""
    differences = [with_ - without for without, with_ in zip(found["none"], found["agent"])]
    share = statistics.median(differences) / statistics.median(found["none"])
    return f"{middle(differences, digits)}, {share:+.1%}"


def run(quick: bool) -> None:
    hook(5 if quick else 25)
    loop(3 if quick else 20, 100 if quick else 500)
