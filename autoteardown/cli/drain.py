"""`autoteardown drain`: signals the armed ranks of this node and waits for them."""

from __future__ import annotations

import argparse
import json
import os
import sys

from autoteardown import settings, variables
from autoteardown.cli import ps
from autoteardown.node import drain, registry

_DAY = 86400


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help=f"longest wait (default: AUTOTEARDOWN_GRACE and {drain.MARGIN:g} more)",
    )
    parser.add_argument("--job", help="only the ranks of this job, as `ps` shows it")
    parser.add_argument(
        "--pid",
        type=_pid,
        action="append",
        default=[],
        help="only the rank with this process id; may be given several times",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the ranks that would be signalled, and signal none"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Drain and print the results.

    Returns:
        0 if every rank left cleanly or there was none, else 1. A dry run: 0 if the registry could be read, else 1.
    """
    found, refused = settings.load(os.environ)
    for line in refused:
        print(f"autoteardown: {line}", file=sys.stderr)
    # Cut like the names in the registry.
    job = None if args.job is None else args.job.strip()[: variables.JOB_LENGTH]
    selection = drain.Selection(job, args.pid)
    if args.dry_run:
        return _dry_run(found, selection, args.json)
    timeout = found.grace + drain.MARGIN if args.timeout is None else args.timeout
    problems: dict[str, None] = {}  # each one once, in order
    ranks, interrupted = drain.drain(
        found.runtime_dir, found.signals[0], timeout, problems.setdefault, selection
    )
    for problem in problems:
        print(f"autoteardown: {problem}", file=sys.stderr)
    clean = not problems and all(rank.clean for rank in ranks)
    if args.json:
        answer = {"clean": clean, "interrupted": interrupted, "ranks": [_as_dict(rank) for rank in ranks]}
        print(json.dumps(answer, indent=2))
    elif ranks:
        for rank in ranks:
            print(rank.line())
        left = sum(rank.clean for rank in ranks)
        print(f"{'interrupted: ' if interrupted else ''}{left} of {len(ranks)} left cleanly")
    elif not problems:
        print(_none(found, selection))
    return 0 if clean else 1


def _dry_run(found: settings.Settings, selection: drain.Selection, as_json: bool) -> int:
    problems: list[str] = []
    records = drain.would_signal(found.runtime_dir, selection, problems.append)
    for problem in problems:
        print(f"autoteardown: {problem}", file=sys.stderr)
    signals = [settings.signal_name(record.signal or found.signals[0]) for record in records]
    if as_json:
        ranks = [{**ps.as_dict(record), "signal": name} for record, name in zip(records, signals)]
        print(json.dumps({"dry_run": True, "ranks": ranks}, indent=2))
    elif records:
        for record, name in zip(records, signals):
            print(f"{drain.describe(record)}: would be sent {name}")
        print(f"{len(records)} would be signalled; none was (--dry-run)")
    elif not problems:
        print(_none(found, selection))
    return 1 if problems else 0


def _none(found: settings.Settings, selection: drain.Selection) -> str:
    count = len(registry.read(found.runtime_dir))
    if not count or (selection.job is None and not selection.pids):
        return ps.none_here(found.runtime_dir)
    return f"none of the {count} armed ranks on this node is selected; `autoteardown ps` lists them"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _DAY:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_DAY}")
    return seconds


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id, a whole number above 0")
    return int(text)


def _as_dict(rank: drain.Drained) -> dict[str, object]:
    record = rank.record
    return {
        "pid": record.pid,
        "job": record.job,
        "rank": record.rank,
        "local_rank": record.local_rank,
        "world_size": record.world_size,
        "backend": record.backend,
        "program": record.program,
        "signal": rank.signalled,
        "outcome": rank.outcome,
        "clean": rank.clean,
        "exit_code": rank.exit_code,
        "seconds": round(rank.seconds, 3),
        "detail": rank.detail or None,
    }
