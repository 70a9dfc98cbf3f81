"""`autoteardown drill`: evicts a rank of a training job started here, and shows what happens."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoteardown import settings
from autoteardown.drills import display, page, processes, table
from autoteardown.drills import run as drills
from autoteardown.drills.command import CommandDrill
from autoteardown.drills.control import ControlDrill
from autoteardown.drills.environment import environment
from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import AGENT, PROTECTIONS, SCENARIOS
from autoteardown.node import procfs

GRACE = 10.0
RANKS = 2
PATIENCE = 180.0
AFTER = 5.0
_PLATFORM_GRACE = 25.0  # the agent's default

_EPILOG = """scenarios:
""" + "\n".join(f"  {scenario.name:10} {scenario.title}" for scenario in SCENARIOS.values())


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "A fire drill on this machine: starts a real training job (DDP on scikit-learn's digits, under torchrun), "
        "evicts it as a platform would, and shows what becomes of its ranks. Exit status 0: with the agent, every "
        "rank was out in time and with the right exit code, and the checkpoint is whole."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--ranks",
        type=_ranks,
        metavar="N",
        help=f"ranks to start (default: {RANKS}); of a COMMAND: to wait for",
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
        help="also without a handler, and with the one that scripts carry: drain, destroy, exit 0; a COMMAND of your "
        "own: also with the agent off",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as one self-contained page, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument(
        "--grace",
        type=_seconds(2.0),
        metavar="S",
        help=f"seconds from the signal to SIGKILL (default: {GRACE:g}, so that a drill is short; of a COMMAND: "
        f"AUTOTEARDOWN_GRACE, else {_PLATFORM_GRACE:g})",
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
        help=f"of a COMMAND: seconds from its last init_process_group to the eviction (default: {AFTER:g})",
    )
    parser.add_argument(
        "launch",
        nargs="*",
        metavar="COMMAND",
        help="after --: a launch command of your own to drill instead, with the agent on (train and pod only)",
    )
    parser.set_defaults(fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """0: clean with the agent; 1: not; 2: this cannot be run here or so."""
    _check(args)
    missing = _missing(args)
    if missing is not None:
        sys.stderr.write(f"autoteardown drill: {missing}\n")
        return 2
    # The folder is the outer one: nobody writes into it any more when it is removed.
    with tempfile.TemporaryDirectory(prefix="autoteardown-drill-") as folder, processes.contained():
        try:
            return _run(args, Path(folder))
        except KeyboardInterrupt:
            sys.stderr.write("\nautoteardown drill: interrupted; what it has started ends with it\n")
            raise


def _run(args: argparse.Namespace, folder: Path) -> int:
    show = display.choose(sys.stderr if args.json else sys.stdout)
    try:
        outcomes = _command(args, folder, show) if args.launch else _own(args, folder, show)
    finally:
        show.pause()
    introduction = _introduction(args, outcomes)
    clean = all(outcome.clean for outcome in outcomes if outcome.protection == AGENT)
    show.line()
    if any(outcome.ranks for outcome in outcomes):
        show.line(table.headline(outcomes), "bold")
        show.line()
        show.table(outcomes)
        show.line()
        for line in table.LEGEND:
            show.line(line, "dim")
    if args.html is not None:
        try:
            args.html.write_text(page.html(outcomes, introduction), encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"autoteardown drill: --html {args.html}: {error.strerror}\n")
            return 2
        show.line(f"wrote {args.html}")
    if args.json:
        answer = {
            "clean": clean,
            "grace": outcomes[0].grace,
            "command": args.launch or None,
            "outcomes": [outcome.as_dict() for outcome in outcomes],
        }
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    return 0 if clean else 1


def _own(args: argparse.Namespace, folder: Path, show: display.Display) -> list[Outcome]:
    """The job that the drill brings with it."""
    ranks = args.ranks or RANKS
    grace = args.grace or GRACE
    show.line(
        f"Fire drill: {ranks} rank{'s' if ranks > 1 else ''} train on scikit-learn's digits with DDP, under torchrun.",
        "bold",
    )
    note = (
        f" (the usual {_PLATFORM_GRACE:g} s and more, cut short for a drill)"
        if grace < _PLATFORM_GRACE
        else ""
    )
    show.line(f"From SIGTERM to SIGKILL there are {grace:g} s{note}; AUTOTEARDOWN_GRACE is the same.")
    return drills.run(
        [SCENARIOS[name] for name in _wanted(args)],
        list(PROTECTIONS) if args.compare else [AGENT],
        ranks,
        grace,
        args.start_timeout,
        folder,
        show,
    )


def _command(args: argparse.Namespace, folder: Path, show: display.Display) -> list[Outcome]:
    """The user's own."""
    grace = args.grace or settings.load(os.environ)[0].grace
    after = AFTER if args.after is None else args.after
    scenario = SCENARIOS[args.scenario[0] if args.scenario else "train"]
    show.line(f"Fire drill: {' '.join(args.launch)}", "bold")
    show.line(f"From the signal to SIGKILL there are {grace:g} s; AUTOTEARDOWN_GRACE is the same.")
    drill = CommandDrill(args.launch, scenario, grace, args.ranks, args.start_timeout, after, folder, show)
    found = drill.run()
    if not args.compare or not found.ranks:
        return [found]
    at = drill.evicted_after
    control = ControlDrill(
        args.launch, scenario, grace, len(found.ranks), args.start_timeout, at, folder / "control", show
    )
    return [control.run(), found]


def _wanted(args: argparse.Namespace) -> list[str]:
    """The scenarios to drill."""
    return args.scenario or (list(SCENARIOS) if args.compare else ["train"])


def _introduction(args: argparse.Namespace, outcomes: list[Outcome]) -> str:
    """What was done, for the page."""
    what = (
        " ".join(args.launch)
        if args.launch
        else f"{args.ranks or RANKS} ranks on scikit-learn's digits with DDP, under torchrun"
    )
    backend = next((outcome.backend for outcome in outcomes if outcome.backend), "no process group")
    return f"{what}; {backend}; {outcomes[0].grace:g} s from SIGTERM to SIGKILL"


def _check(args: argparse.Namespace) -> None:
    """What the options cannot say one by one."""
    if args.launch:
        if args.scenario and args.scenario not in (["train"], ["pod"]):
            args.fail(
                f"--scenario {','.join(args.scenario)}: a COMMAND of your own can only be drilled in one of: train, pod"
            )
        if shutil.which(args.launch[0]) is None:
            args.fail(f"COMMAND {args.launch[0]!r}: no such program")
    else:
        if args.after is not None:
            args.fail("--after: only for a COMMAND of your own")
        for name in _wanted(args):
            if args.ranks and args.ranks < SCENARIOS[name].least:
                args.fail(f"--ranks {args.ranks}: the scenario {name} needs at least {SCENARIOS[name].least}")
    # Now, and not after a minute of drilling.
    if args.html is not None and (args.html.is_dir() or not args.html.absolute().parent.is_dir()):
        args.fail(f"--html {str(args.html)!r}: not a file in a folder that exists")


def _missing(args: argparse.Namespace) -> str | None:
    """What this machine lacks, and what to do about it."""
    if not procfs.is_ours():
        return "needs Linux, and a /proc of this pid namespace"
    if args.launch:
        return None
    if find_spec("torch") is None:
        return "PyTorch is not installed in this environment: pip install torch"
    if find_spec("sklearn") is None or find_spec("numpy") is None:
        return "the data set is scikit-learn's, which is not installed in this environment: pip install scikit-learn"
    env = environment(Path("/nonexistent"), GRACE, agent=True)
    probe = "import sys; from autoteardown import startup; sys.exit(not startup.active())"
    if subprocess.run([sys.executable, "-c", probe], env=env, cwd="/", check=False).returncode:
        return "AUTOTEARDOWN=1 does not start the agent in this environment; `autoteardown doctor` says why"
    return None


def _ranks(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 64")
    return int(text)


def _scenarios(text: str) -> list[str]:
    names = list(SCENARIOS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join(SCENARIOS)}; all stands for all of them"
            )
    return list(dict.fromkeys(names))


def _seconds(least: float) -> Any:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= 3600:  # NaN fails it, too
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to 3600")
        return value

    return read
