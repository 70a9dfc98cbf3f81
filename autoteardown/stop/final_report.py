"""What a finished stop leaves behind: the JSON report, the termination log, its entry in the registry."""

from __future__ import annotations

import os
import sys

from autoteardown.stop import report
from autoteardown.stop.bounded import run_bounded
from autoteardown.stop.control import RankControl
from autoteardown.stop.outcome import Outcome


def write(outcome: Outcome, control: RankControl, seconds: float, final: bool) -> None:
    """Leave everything behind that outlives the process, or what can be left in so many seconds.

    Args:
        story: what to tell.
        hands: where it goes.
        seconds: how long to wait for a dead disk or a full pipe.
        final: the process ends now; else the program's own way out is still ahead.

    Raises:
        RuntimeError: no thread to be had.
    """

    def run() -> None:
        try:
            _write(outcome, control, final)
            for stream in (sys.stdout, sys.stderr) if final else ():
                if stream is not None:
                    stream.flush()
        except BaseException as error:
            control.log.line(f"last words failed: {type(error).__name__}: {error}", outcome.seconds)

    run_bounded(run, seconds)


def write_evidence(outcome: Outcome, control: RankControl, seconds: float) -> None:
    """Last of all: what the communicators have recorded, next to the report.

    torch reads it with the GIL held, and asks a driver that may be stuck: nothing may depend on its end.
    """
    folder = control.settings.report_dir
    if not folder:
        return

    def run() -> None:
        try:
            path = os.path.join(folder, report.taken(folder, _name(outcome), outcome.as_dict()))
            if (
                control.evidence(path.rpartition(".json")[0], outcome.collective)
                and outcome.collective is not None
            ):
                _write_report(outcome, control)  # which operation it was is known by now
        except BaseException as error:
            control.log.line(f"no evidence: {type(error).__name__}: {error}", outcome.seconds)

    run_bounded(run, seconds)


def _name(outcome: Outcome) -> str:
    return f"{outcome.identity['host']}-{outcome.identity['pid']}.json".replace("/", "_")


def _write_report(outcome: Outcome, control: RankControl) -> None:
    folder = control.settings.report_dir
    problem = report.write_report(folder, _name(outcome), outcome.as_dict()) if folder else None
    if problem:
        control.log.line(problem, outcome.seconds)


def _write(outcome: Outcome, control: RankControl, final: bool) -> None:
    settings = control.settings
    if final:
        control.unregister(outcome.outcome, outcome.exit_code)
    else:
        control.mark(state="leaving", outcome=outcome.outcome, exit_code=outcome.exit_code)
    _write_report(outcome, control)
    if settings.termination_log:
        report.write_termination_log(settings.termination_log, outcome.text())
