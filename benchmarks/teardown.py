"""Measures an eviction: seconds from a rank's SIGTERM to the exit of all ranks, and until its peers are free.

And a rank that vanishes: seconds from its SIGKILL to the last of those free that are blocked without it.

Every round goes through all kinds of protection, so that they share whatever else the machine is doing. What is not
over when the grace period is, gets SIGKILL, as from a platform (`KILLED`); peers are watched for 2 s more (`HANG`).
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import common
from benchmarks.common import Ranks, middle, table

GRACE = 8.0
AFTERMATH = 2.0
IDLE = """
import time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
# Each: the program, what each rank says when it is where it should be, whether rank 0 is then blocked in C.
SCENARIOS = {
    "idle": (IDLE, "^ready$", False),
    "training": ("train.py", "step 5$", False),
    "stuck": ("stuck.py", "^ready$", True),
    "rendezvous": ("rendezvous.py", "^joining$", True),
}
MODES = {"none": "no handler", "handwritten": "hand-written", "agent": "agent"}


def kind_of(mode: str) -> dict[str, Any]:
    """How ranks of this kind are started."""
    if mode == "beside":
        assert common.beside is not None
        return {"mode": "agent", "fresh": True, "PYTHONPATH": str(common.beside.folder)}
    return {"mode": mode}


def vanish(ranks: Ranks, victim: int) -> float:
    """SIGKILL to one of four ranks: seconds to the end of the two that are blocked without it."""
    with ranks.job() as job:
        world: list[Any] = job.world("vanished.py", 4)
        for rank in world:
            rank.wait_for("^ready$")
        for rank in world[1:3]:
            rank.wait_blocked("^ready$")
        start = time.monotonic()
        world[victim].signal(9)
        for rank in world[1:3]:
            rank.wait(60)
        return max(rank.ended for rank in world[1:3]) - start


def evict(ranks: Ranks, scenario: str, size: int, mode: str) -> tuple[float, float | None, str]:
    """One eviction, of rank 0: seconds to the last exit, to the last peer free, and what went wrong."""
    program, text, blocked = SCENARIOS[scenario]
    # In rendezvous, the one that all wait for never comes.
    missing = (size,) if scenario == "rendezvous" else ()
    with ranks.job() as job:
        world: list[Any] = job.world(program, size + len(missing), missing=missing, **kind_of(mode))
        for rank in world:
            rank.wait_for(text)
        if blocked:
            world[0].wait_blocked(text)
        world[0].signal()
        start = world[0].signalled
        while any(rank.running for rank in world) and time.monotonic() < start + GRACE:
            time.sleep(0.001)
        problem = "KILLED" if world[0].running else ""
        if problem:
            world[0].signal(9)
        until = time.monotonic() + AFTERMATH
        while any(rank.running for rank in world) and time.monotonic() < until:
            time.sleep(0.001)
        hanging = any(rank.running for rank in world[1:])
        now = time.monotonic()
        ends = [rank.ended or now for rank in world]
        free = max(ends[1:]) - start if size > 1 else None
        return max(ends) - start, free, problem + (" HANG" if hanging else "")


def run(quick: bool) -> None:
    rows = []
    ranks = Ranks()
    modes = {**MODES, "beside": common.beside.name} if common.beside else MODES
    try:
        for scenario in SCENARIOS:
            for size in (1, 2) if quick else (1, 2, 4, 8):
                if scenario == "stuck" and size == 1:
                    continue  # nobody to wait for
                found: dict[str, list[tuple[float, float | None, str]]] = {mode: [] for mode in modes}
                for _ in range(1 if quick else 5):
                    for mode in modes:
                        # What is known to end in SIGKILL is not worth so many rounds of the grace period.
                        if sum(bool(each[2]) for each in found[mode]) < 2:
                            found[mode].append(evict(ranks, scenario, size, mode))
                for mode, name in modes.items():
                    last = [each[0] for each in found[mode]]
                    free = [each[1] for each in found[mode] if each[1] is not None]
                    problems = sorted({word for each in found[mode] for word in each[2].split()})
                    rows.append([scenario, size, name, middle(last, 2), middle(free, 2), " ".join(problems)])
        gone = {
            name: middle([vanish(ranks, victim) for _ in range(1 if quick else 3)], 2)
            for name, victim in (("rank 0", 0), ("another", 3))
        }
    finally:
        ranks.close()
    print(f"grace period {GRACE:g} s, seconds: median (quartiles)\n")
    table(["rank 0 is", "ranks", "protection", "last exit", "last peer free", ""], rows)
    print()
    table(["vanished, AUTOTEARDOWN_LOST at its default", "last of the blocked free"], gone.items())
