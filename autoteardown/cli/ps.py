"""`autoteardown ps`: lists the armed ranks on this node."""

from __future__ import annotations

import argparse
import json
import os
import sys

from autoteardown import settings
from autoteardown.node import registry
from autoteardown.node.entry import Entry, printable


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if the registry cannot be used, else 0."""
    runtime_dir = settings.load(os.environ)[0].runtime_dir
    problems: list[str] = []
    records = registry.read(runtime_dir, problems.append)
    for problem in problems:
        print(f"autoteardown: {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps([as_dict(record) for record in records], indent=2))
    elif records:
        rows = [
            ("PID", "JOB", "RANK", "BACKEND", "PROGRAM", "STATE", "AGE", "PEERS"),
            *(_row(record) for record in records),
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    elif not problems:
        print(none_here(runtime_dir))
    return 1 if problems else 0


def as_dict(record: Entry) -> dict[str, object]:
    """A rank in the output of `--json`."""
    return {
        "pid": record.pid,
        "job": record.job,
        "start_time": record.start_time,
        "rank": record.rank,
        "local_rank": record.local_rank,
        "world_size": record.world_size,
        "backend": record.backend,
        "program": record.program,
        "state": record.state,
        "alone": record.alone,
        "armed_at": record.armed_at,
        "age": round(record.age, 3),
    }


def none_here(runtime_dir: str) -> str:
    """The line for a node without ranks, with the number of ranks in other containers that share the folder."""
    others = registry.elsewhere(runtime_dir)
    hint = f" ({others} of other pid namespaces or boots)" if others else ""
    return f"no armed ranks on this node{hint}"


def _row(record: Entry) -> tuple[str, ...]:
    texts = (printable(text) for text in (record.backend, record.program, record.state))
    return (
        str(record.pid),
        printable(record.job),
        record.place,
        *texts,
        _age(int(record.age)),
        peers(record),
    )


def peers(record: Entry) -> str:
    """Whether the other ranks would be notified now of this rank's eviction."""
    if record.alone is None:
        return "-"
    return f"not told: {printable(record.alone)}" if record.alone else "connected"


def _age(seconds: int) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60}m"
    return f"{minutes}m{seconds % 60}s" if minutes else f"{seconds}s"
