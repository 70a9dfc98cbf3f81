"""What a finished stop leaves behind: the JSON report, the termination log, its entry in the registry."""

from __future__ import annotations

import sys

from autoteardown.primitives import allocate_lock, start_new_thread
from autoteardown.stop import report
from autoteardown.stop.hands import Hands
from autoteardown.stop.story import Story


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
    written = allocate_lock()
    written.acquire()

    def run() -> None:
        try:
            _write(story, hands, final)
            for stream in (sys.stdout, sys.stderr) if final else ():
                if stream is not None:
                    stream.flush()
        except BaseException as error:
            hands.log.line(f"last words failed: {type(error).__name__}: {error}", story.seconds)
        written.release()

    start_new_thread(run, ())
    written.acquire(timeout=seconds)


def _write(story: Story, hands: Hands, final: bool) -> None:
    settings = hands.settings
    if final:
        hands.unlist(story.outcome, story.exit_code)
    else:
        hands.mark(state="leaving", outcome=story.outcome, exit_code=story.exit_code)
    if settings.report_dir:
        about = story.identity
        name = f"{about['host']}-{about['pid']}.json".replace("/", "_")
        problem = report.write_report(settings.report_dir, name, story.as_dict())
        if problem:
            hands.log.line(problem, story.seconds)
    if settings.termination_log:
        report.write_termination_log(settings.termination_log, story.text())
