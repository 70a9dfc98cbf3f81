"""Reports like those of real stops, for tests of what reads them."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from autoteardown.stop.report import stamped

T0 = datetime(2026, 3, 5, 14, 7, 31, 250_000, tzinfo=timezone.utc)
FRAMES = [
    "/usr/lib/python3/site-packages/torch/distributed/distributed_c10d.py:2806 in all_reduce",
    "/app/train.py:61 in main",
    "/app/train.py:88 in <module>",
]


def phases(*steps: tuple[str, float, str, str]) -> list[dict[str, Any]]:
    """Phases end to end, from (name, seconds, outcome, detail)."""
    result, at = [], 0.0
    for name, took, outcome, detail in steps:
        end = round(at + took, 6)
        result.append({"name": name, "start": round(at, 6), "end": end, "outcome": outcome, "detail": detail})
        at = end
    return result


def report(rank: int, world: int, **changes: Any) -> dict[str, Any]:
    """A rank that stopped clean: the first is signalled, the rest follow a moment later."""
    draw = random.Random(rank)
    first = {"rank": 0, "host": "node-000", "pid": 4000}
    late = 0.0 if rank == 0 else 0.004 + draw.random() * 0.012
    value: dict[str, Any] = {
        "schema": 2,
        "job": "4711",
        "host": f"node-{rank // 8:03}",
        "pid": 4000 + rank % 8,
        "program": "/app/train.py",
        "rank": rank,
        "local_rank": rank % 8,
        "world_size": world,
        "backend": "nccl",
        "python": "3.11.7",
        "torch": "2.13.0",
        "cause": "signal" if rank == 0 else "peer",
        "signal": "SIGTERM" if rank == 0 else None,
        "origin": first,
        "received_at": (T0 + timedelta(seconds=late)).isoformat(),
        "grace": 25.0,
        "phases": phases(
            ("step", 0.21 + draw.random() * 0.05, "ok", "agreed on step 1201"),
            ("park", 0.01 + draw.random() * 0.02, "ok", ""),
            ("drain", 0.03 + draw.random() * 0.05, "ok", "cuda:0"),
            ("quiet", 0.04 + draw.random() * 0.03, "ok", ""),
            ("destroy", 0.09 + draw.random() * 0.04, "ok", ""),
            ("exit", 0.05 + draw.random() * 0.03, "ok", ""),
        ),
        "steps": {"at_signal": 1200, "agreed": 1201, "stopped_at": 1201},
        "stuck": [],
        "outcome": "clean",
        "exit_code": 0 if rank == 0 else 143,
    }
    return {**value, **changes}


def wedged(rank: int, world: int, **changes: Any) -> dict[str, Any]:
    """A rank blocked in a collective: it could not park, so its communicators were aborted."""
    steps = phases(
        ("step", 8.0, "timeout", "held in all_reduce"),
        ("park", 5.0, "timeout", "the training thread is blocked in C"),
        ("abort", 0.35, "ok", "2 groups"),
        ("quiet", 0.1, "ok", ""),
        ("exit", 0.2, "ok", ""),
    )
    stuck = [{"when": when, "thread": 140_189, "frames": FRAMES} for when in ("at the signal", "after park")]
    steps_seen = {"at_signal": 1200, "agreed": 1201, "stopped_at": None}
    return report(
        rank,
        world,
        **{
            "phases": steps,
            "stuck": stuck,
            "steps": steps_seen,
            "outcome": "aborted",
            "why": "blocked in all_reduce",
            **changes,
        },
    )


def forced(rank: int, world: int, **changes: Any) -> dict[str, Any]:
    """A rank that not even an abort could free: the hard deadline ended it."""
    steps = phases(
        ("step", 8.0, "timeout", ""),
        ("park", 5.0, "timeout", ""),
        ("abort", 3.0, "timeout", "did not return"),
    )
    steps.append(
        {"name": "quiet", "start": 16.0, "end": 24.0, "outcome": "timeout", "detail": "hard deadline"}
    )
    return wedged(rank, world, **{"phases": steps, "outcome": "forced", **changes})


def write(folder: Path, reports: list[dict[str, Any]], prefix: str = "") -> Path:
    """The folder with these reports in it, named as ranks name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in reports:
        name = stamped(f"{prefix}{value['host']}-{value['pid']}.json", value)
        (folder / re.sub(r"[^\w.-]", "_", name)).write_text(json.dumps(value))
    return folder


def job(world: int, odd: dict[int, Any] | None = None) -> list[dict[str, Any]]:
    """A whole job: clean ranks, who wait for the devices of the others, and those that `odd` names a maker for."""
    values = [(odd or {}).get(rank, report)(rank, world) for rank in range(world)]
    last = max(value["phases"][-1]["end"] for value in values)
    for value in values if odd else []:
        if value["outcome"] == "clean":
            wait = last - value["phases"][-1]["end"] - 0.1
            for phase in value["phases"]:
                phase["end"] = round(phase["end"] + wait * (phase["name"] in ("quiet", "destroy", "exit")), 6)
                phase["start"] = round(phase["start"] + wait * (phase["name"] in ("destroy", "exit")), 6)
    return values
