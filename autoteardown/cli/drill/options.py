"""Declares and checks the options of `autoteardown drill`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from autoteardown.drills.scenario import SCENARIOS

RANKS = 2
# Seconds: a drill's grace period, short on purpose; the agent's default; longest wait until a job trains; training of a
# COMMAND before it is evicted.
GRACE, PLATFORM_GRACE, PATIENCE, AFTER = 10.0, 25.0, 180.0, 5.0

_EPILOG = """scenarios:
""" + "\n".join(f"  {scenario.name:10} {scenario.title}" for scenario in SCENARIOS.values())


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    # Broken by hand, because the formatter below, which the list of scenarios needs, does not wrap.
    parser.description = (
        "A fire drill on this machine: start a real training job (DDP on scikit-learn's digits,\n"
        "under torchrun), evict it as a platform would, and show how its ranks end.\n\n"
        "Exit status 0: with the agent, every rank exited in time with the right exit code, and the\n"
        "checkpoint is complete; 1: not; 2: the drill cannot run here."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--ranks",
        type=_ranks,
        metavar="N",
        help=f"ranks to start (default: {RANKS}); with a COMMAND: ranks to wait for",
    )
    parser.add_argument(
        "--scenario",
        type=_scenarios,
        metavar="NAME",
        help=f"{', '.join(SCENARIOS)}, a comma list of them, or all (default: train; with --compare: all)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run each scenario also without a handler, and with a hand-written one (drain, destroy, exit 0); a "
        "COMMAND of your own: also with the agent off",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the result as one self-contained HTML page"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument(
        "--grace",
        type=_seconds(2.0),
        metavar="S",
        help=f"seconds from the signal to SIGKILL (default: {GRACE:g}, so that a drill is short; with a COMMAND: "
        f"AUTOTEARDOWN_GRACE, else {PLATFORM_GRACE:g})",
    )
    parser.add_argument(
        "--start-timeout",
        type=_seconds(1.0),
        default=PATIENCE,
        metavar="S",
        help="longest wait for the job to train (default: %(default)g)",
    )
    parser.add_argument(
        "--after",
        type=_seconds(0.0),
        metavar="S",
        help=f"with a COMMAND: seconds from its last init_process_group to the eviction (default: {AFTER:g})",
    )
    parser.add_argument(
        "launch",
        nargs="*",
        metavar="COMMAND",
        help="after --: a launch command of your own to drill instead, with the agent on (train and pod only)",
    )
    parser.set_defaults(fail=parser.error)


def wanted(args: argparse.Namespace) -> list[str]:
    """The scenarios to drill."""
    return args.scenario or (list(SCENARIOS) if args.compare else ["train"])


def check(args: argparse.Namespace) -> None:
    """Refuse combinations of options that make no sense."""
    if args.launch:
        if args.scenario and args.scenario not in (["train"], ["pod"]):
            args.fail(
                f"--scenario {','.join(args.scenario)}: a COMMAND of your own can only be drilled in one of: train, pod"
            )
        if shutil.which(args.launch[0]) is None:
            args.fail(f"COMMAND {args.launch[0]!r}: no such program on PATH")
    else:
        if args.after is not None:
            args.fail("--after: only with a COMMAND of your own, given after --")
        for name in wanted(args):
            if args.ranks and args.ranks < SCENARIOS[name].least:
                args.fail(f"--ranks {args.ranks}: the scenario {name} needs at least {SCENARIOS[name].least}")
    # Checked now, and not after a minute of drilling.
    if args.html is not None and (args.html.is_dir() or not args.html.absolute().parent.is_dir()):
        args.fail(f"--html {str(args.html)!r}: not a file in a folder that exists")


def _ranks(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 64")
    return int(text)


def _scenarios(text: str) -> list[str]:
    names = list(SCENARIOS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a scenario; allowed are {', '.join(SCENARIOS)}, or all"
            )
    return list(dict.fromkeys(names))


def _seconds(least: float) -> Any:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= 3600:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to 3600")
        return value

    return read
