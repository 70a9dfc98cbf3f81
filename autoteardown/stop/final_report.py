"""Writes what outlives the process: the JSON report, the termination log, and the end of its registry entry."""

from __future__ import annotations

import os
import sys

from autoteardown.stop import report
from autoteardown.stop.bounded import run_bounded
from autoteardown.stop.control import RankControl
from autoteardown.stop.outcome import Outcome


def write(outcome: Outcome, control: RankControl, seconds: float, final: bool) -> None:
    """Write all of it, or what can be written in so many seconds.

    Args:
        outcome: what to write.
        control: the armed rank, whose settings say where.
        seconds: how long to wait for a dead disk or a full pipe.
        final: the process ends now; otherwise the program's own exit comes first.
    """

    def run() -> None:
        try:
            _write(outcome, control, final)
            for stream in (sys.stdout, sys.stderr) if final else ():
                if stream is not None:
                    stream.flush()
        except BaseException as error:
            control.log.line(f"the report was not written: {type(error).__name__}: {error}", outcome.seconds)

    if not run_bounded(run, seconds):
        run()  # unbounded: the hard deadline ends the process in time


def write_evidence(outcome: Outcome, control: RankControl, seconds: float) -> None:
    """Write the flight recorders' entries next to the report, as the very last thing.

    torch reads them with the GIL held, and asks a driver that may be stuck: nothing may wait for this to return.
    """
    folder = control.settings.report_dir
    if not folder:
        return

    def run() -> None:
        try:
            path = os.path.join(folder, report.taken(folder, _name(outcome), outcome.as_dict()))
            collective = dict(outcome.collective or {})
            if control.evidence(path.rpartition(".json")[0], collective) and collective:
                _write_report(outcome._replace(collective=collective), control)  # it now names the operation
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
    why = {"failed": outcome.failed, "why": outcome.why}
    if final:
        control.unregister(outcome.outcome, outcome.exit_code, **why)
    else:
        control.mark(state="leaving", outcome=outcome.outcome, exit_code=outcome.exit_code, **why)
    _write_report(outcome, control)
    if settings.termination_log:
        report.write_termination_log(settings.termination_log, outcome.text())
