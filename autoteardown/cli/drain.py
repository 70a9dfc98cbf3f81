"""`autoteardown drain`: signals the armed ranks of this node and waits for them."""

from __future__ import annotations

import argparse
import json
import os
import sys

from autoteardown import settings, variables
from autoteardown.cli import ps
from autoteardown.node import drain, registry

SUMMARY = "signal every armed rank of this node and wait until they are gone"
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
        "--pid", type=_pid, action="append", default=[], help="only this rank; may be given several times"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say whom it would signal, signal nobody, wait for nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 when every rank left cleanly, or there was none; 1 otherwise. A dry run: 0 when the registry could be read."""
    found, refused = settings.load(os.environ)
    for line in refused:
        print(f"autoteardown: {line}", file=sys.stderr)
    # No more of its name is kept than `ps` shows.
    which = drain.Selection(None if args.job is None else args.job.strip()[: variables.JOB_LENGTH], args.pid)
    if args.dry_run:
        return _dry_run(found, which, args.json)
    timeout = found.grace + drain.MARGIN if args.timeout is None else args.timeout
    problems: dict[str, None] = {}  # each one once, in order
    ranks, interrupted = drain.drain(found.runtime_dir, found.signals[0], timeout, problems.setdefault, which)
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
        print(_none(found, which))
    return 0 if clean else 1


def _dry_run(found: settings.Settings, which: drain.Selection, as_json: bool) -> int:
    problems: list[str] = []
    records = drain.would_signal(found.runtime_dir, which, problems.append)
    for problem in problems:
        print(f"autoteardown: {problem}", file=sys.stderr)
    signals = [settings.signal_name(record.signal or found.signals[0]) for record in records]
    if as_json:
        ranks = [{**ps.as_dict(record), "signal": name} for record, name in zip(records, signals)]
        print(json.dumps({"dry_run": True, "ranks": ranks}, indent=2))
    elif records:
        for record, name in zip(records, signals):
            print(f"{drain.describe(record)}: would be sent {name}")
        print(f"{len(records)} would be signalled; nobody was (--dry-run)")
    elif not problems:
        print(_none(found, which))
    return 1 if problems else 0


def _none(found: settings.Settings, which: drain.Selection) -> str:
    there = len(registry.read(found.runtime_dir))
    if not there or (which.job is None and not which.pids):
        return ps.none_here(found.runtime_dir)
    return f"none of the {there} armed ranks on this node is meant; `autoteardown ps` lists them"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _DAY:  # NaN fails it, too
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
