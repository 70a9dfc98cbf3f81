"""What a finished stop leaves behind: the JSON report, the termination log, its entry in the registry."""

from __future__ import annotations

import os
import sys

from autoteardown.stop import report
from autoteardown.stop.bounded import aside
from autoteardown.stop.control import Hands
from autoteardown.stop.outcome import Story


def write(story: Story, hands: Hands, seconds: float, final: bool) -> None:
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
            _write(story, hands, final)
            for stream in (sys.stdout, sys.stderr) if final else ():
                if stream is not None:
                    stream.flush()
        except BaseException as error:
            hands.log.line(f"last words failed: {type(error).__name__}: {error}", story.seconds)

    aside(run, seconds)


def write_evidence(story: Story, hands: Hands, seconds: float) -> None:
    """Last of all: what the communicators have recorded, next to the report.

    torch reads it with the GIL held, and asks a driver that may be stuck: nothing may depend on its end.
    """
    folder = hands.settings.report_dir
    if not folder:
        return

    def run() -> None:
        try:
            path = os.path.join(folder, report.taken(folder, _name(story), story.as_dict()))
            if hands.evidence(path.rpartition(".json")[0], story.collective) and story.collective is not None:
                _write_report(story, hands)  # which operation it was is known by now
        except BaseException as error:
            hands.log.line(f"no evidence: {type(error).__name__}: {error}", story.seconds)

    aside(run, seconds)


def _name(story: Story) -> str:
    return f"{story.identity['host']}-{story.identity['pid']}.json".replace("/", "_")


def _write_report(story: Story, hands: Hands) -> None:
    folder = hands.settings.report_dir
    problem = report.write_report(folder, _name(story), story.as_dict()) if folder else None
    if problem:
        hands.log.line(problem, story.seconds)


def _write(story: Story, hands: Hands, final: bool) -> None:
    settings = hands.settings
    if final:
        hands.unlist(story.outcome, story.exit_code)
    else:
        hands.mark(state="leaving", outcome=story.outcome, exit_code=story.exit_code)
    _write_report(story, hands)
    if settings.termination_log:
        report.write_termination_log(settings.termination_log, story.text())
