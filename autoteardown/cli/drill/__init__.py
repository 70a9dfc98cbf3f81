"""`autoteardown drill`: evicts a rank of a training job started here, and shows what happens."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from autoteardown import settings
from autoteardown.cli.drill.options import AFTER, GRACE, PLATFORM_GRACE, RANKS, check, wanted
from autoteardown.cli.drill.options import configure as configure
from autoteardown.drills import display, page, processes, table
from autoteardown.drills import run as drills
from autoteardown.drills.command import CommandDrill
from autoteardown.drills.control import ControlDrill
from autoteardown.drills.environment import environment
from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import AGENT, PROTECTIONS, SCENARIOS
from autoteardown.node import procfs


def run(args: argparse.Namespace) -> int:
    """Run the drill; return 0 if it was clean with the agent, 1 if not, 2 if it cannot run here or like this."""
    check(args)
    missing = _missing(args)
    if missing is not None:
        sys.stderr.write(f"autoteardown drill: {missing}\n")
        return 2
    # The folder is the outer context, so that no process writes into it any more when it is removed.
    with tempfile.TemporaryDirectory(prefix="autoteardown-drill-") as folder, processes.contained():
        try:
            return _run(args, Path(folder))
        except KeyboardInterrupt:
            sys.stderr.write(
                "\nautoteardown drill: interrupted; the processes that it has started are ended\n"
            )
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
    """Drill the built-in training job."""
    ranks = args.ranks or RANKS
    grace = args.grace or GRACE
    show.line(
        f"Fire drill: {ranks} rank{'s' if ranks > 1 else ''} train on scikit-learn's digits with DDP, under torchrun.",
        "bold",
    )
    note = (
        f" (the usual {PLATFORM_GRACE:g} s and more, cut short for a drill)" if grace < PLATFORM_GRACE else ""
    )
    show.line(f"From SIGTERM to SIGKILL there are {grace:g} s{note}; AUTOTEARDOWN_GRACE is the same.")
    return drills.run(
        [SCENARIOS[name] for name in wanted(args)],
        list(PROTECTIONS) if args.compare else [AGENT],
        ranks,
        grace,
        args.start_timeout,
        folder,
        show,
    )


def _command(args: argparse.Namespace, folder: Path, show: display.Display) -> list[Outcome]:
    """Drill the user's launch command."""
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


def _introduction(args: argparse.Namespace, outcomes: list[Outcome]) -> str:
    """A line for the page: what was drilled."""
    what = (
        " ".join(args.launch)
        if args.launch
        else f"{args.ranks or RANKS} ranks on scikit-learn's digits with DDP, under torchrun"
    )
    backend = next((outcome.backend for outcome in outcomes if outcome.backend), "no process group")
    return f"{what}; {backend}; {outcomes[0].grace:g} s from SIGTERM to SIGKILL"


def _missing(args: argparse.Namespace) -> str | None:
    """What the drill needs and this machine lacks, with advice; None if nothing."""
    if not procfs.available():
        return "needs Linux, with /proc mounted for this pid namespace"
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
