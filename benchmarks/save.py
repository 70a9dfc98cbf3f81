"""Measures the cost of being ready to save: a poll, the hook, and the flag that people all-reduce instead."""

from __future__ import annotations

import random
import re
import time
import timeit
from typing import Any

from benchmarks.common import Ranks, middle, table
from benchmarks.step import hook

FLAG = """
import statistics, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
flag = False
times = []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    stopping = torch.tensor([float(flag)])
    dist.all_reduce(stopping)
    bool(stopping)
    times.append(time.perf_counter() - start)
print("took", statistics.median(times), flush=True)
dist.barrier()
dist.destroy_process_group()
"""
POLL = """
import sys, time, timeit
import torch.distributed as dist
import autoteardown

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(int(sys.argv[1])):
    seconds = timeit.timeit(autoteardown.stop_requested, timer=time.thread_time, number=200_000)
    print("took", seconds / 200_000, flush=True)
dist.destroy_process_group()
"""


def measure(program: str, ranks: int, *args: str, mode: str = "agent") -> list[float]:
    """What rank 0 of such a job says that something took, in seconds."""
    made = Ranks()
    try:
        with made.job() as job:
            world: list[Any] = job.world(program, ranks, *args, mode=mode)
            for rank in world:
                rank.wait()
            return [float(each) for each in re.findall(r"^took (\S+)$", world[0].stdout, re.MULTILINE)]
    finally:
        made.close()


def evict(style: str, mode: str, rounds: int) -> tuple[list[float], list[float]]:
    """Iterations and milliseconds from the signal to the checkpoint of the signalled rank."""
    iterations, took = [], []
    made = Ranks()
    try:
        for number in range(rounds):
            with made.job() as job:
                world: list[Any] = job.world("saver.py", 3, style, "0.005", mode=mode, AUTOTEARDOWN_GRACE=25)
                for rank in world:
                    rank.wait_for("^step 5$")
                time.sleep(random.Random(number).uniform(0, 0.05))
                victim = world[1]
                before = victim.stdout.count("step ")
                victim.signal()
                saved = int(victim.wait_for(r"^saved 1 (\d+)$")[1])
                took.append((time.monotonic() - victim.signalled) * 1e3)
                iterations.append(float(saved - before))
    finally:
        made.close()
    return iterations, took


def run(quick: bool) -> None:
    rounds = 3 if quick else 20
    off = timeit.repeat(
        "f()", "import autoteardown; f = autoteardown.stop_requested", time.thread_time, rounds, 200_000
    )
    armed = measure(POLL, 1, str(rounds))
    flag = [each for _ in range(3) for each in measure(FLAG, 3, "300" if quick else "3000", mode="none")]
    rows = [
        ["a poll, the agent off", middle([each / 200_000 * 1e9 for each in off], 0)],
        ["a poll, armed", middle([each * 1e9 for each in armed], 0)],
        ["a flag all-reduced, three gloo ranks", middle([each * 1e9 for each in flag], 0)],
    ]
    table(["each step", "ns: median (quartiles)"], rows)
    print()
    hook(rounds)
    print()
    found = [
        [name, middle(iterations, 1), middle(took, 1)]
        for name, (iterations, took) in (
            ("a handler's flag, with the agent", evict("flag", "agent", rounds)),
            ("stop_requested()", evict("poll", "agent", rounds)),
            ("a flag all-reduced in each step, without", evict("allreduced", "none", rounds)),
        )
    ]
    table(["three ranks, one signalled", "iterations to the save", "ms to the save"], found)
