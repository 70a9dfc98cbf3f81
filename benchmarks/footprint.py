"""Measures how much more memory, descriptors and threads a rank has when it is armed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks import common
from benchmarks.common import Ranks, middle, table

PROGRAM = """
import time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(10):
    weight.grad = torch.ones(1)
    dist.all_reduce(weight.grad)
    optimizer.step()
dist.barrier()
time.sleep(1)  # both ranks are connected by then
print("ready", flush=True)
time.sleep(3600)
"""
COLUMNS = ("private memory, KiB", "descriptors", "threads")


def look(pid: int) -> dict[str, float]:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = sum(int(number) for number in re.findall(r"^Private_\w+:\s+(\d+)", rollup, re.MULTILINE))
    counts = (private, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
    return dict(zip(COLUMNS, counts))


def run(quick: bool) -> None:
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    kinds: list[tuple[str, str, dict[str, str]]] = [("without", "none", {}), ("with the agent", "agent", {})]
    if common.beside:
        kinds.append((common.beside.name, "agent", {"PYTHONPATH": str(common.beside.folder)}))
    ranks = Ranks()
    try:
        for _ in range(2 if quick else 9):
            for name, mode, env in kinds:
                with ranks.job() as job:
                    # Not forked: what the server has imported would be shared, and cost nothing.
                    world = job.world(PROGRAM, 2, mode=mode, fresh=True, **env)
                    for number, rank in enumerate(world):
                        rank.wait_for("ready")
                        found.setdefault((name, number), []).append(look(rank.pid))
    finally:
        ranks.close()
    rows = []
    for number, name in enumerate(("rank 0, which hosts the store", "rank 1")):
        for column in COLUMNS:
            row = [[each[column] for each in found[kind, number]] for kind, _, _ in kinds]
            more = [[after - before for before, after in zip(row[0], each)] for each in row[1:]]
            rows.append(
                [name, column, *(middle(each, 0) for each in row), *(middle(each, 0) for each in more)]
            )
    names = [kind for kind, _, _ in kinds]
    table(["two gloo ranks", "", *names, *("more" for _ in names[1:])], rows)
