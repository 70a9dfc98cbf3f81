"""What a finished teardown says of itself: the last log line, the JSON report, the termination log, the registry."""

from __future__ import annotations

import _thread
import signal
import sys
from typing import TYPE_CHECKING, Any

from autoteardown.node.record import printable
from autoteardown.stop import report

if TYPE_CHECKING:
    from autoteardown.stop.driver import Teardown


def summary(teardown: Teardown) -> str:
    """The last line: `done: clean, stopped at step 1201, exit 0`."""
    steps = teardown.stop.steps if teardown.stop is not None else None
    where = f"stopped at step {steps['stopped_at']}, " if steps and steps["stopped_at"] else ""
    return f"done: {_outcome(teardown)}, {where}exit {teardown.exit_code}"


def write(teardown: Teardown, seconds: float, final: bool) -> None:
    """Leave everything behind that outlives the process, or what can be left in so many seconds. Never raises.

    Args:
        teardown: what to tell of.
        seconds: how long to wait for a dead disk or a full pipe.
        final: the process ends now; else the program's own way out is still ahead.
    """
    written = _thread.allocate_lock()
    written.acquire()

    def run() -> None:
        try:
            _write(teardown, final)
            for stream in (sys.stdout, sys.stderr) if final else ():
                if stream is not None:
                    stream.flush()
        except BaseException as error:
            teardown.say(f"last words failed: {type(error).__name__}: {error}")
        written.release()

    _thread.start_new_thread(run, ())
    written.acquire(timeout=seconds)


def _write(teardown: Teardown, final: bool) -> None:
    guard, stop = teardown.guard, teardown.stop
    if stop is not None and stop.phases:
        last = stop.phases[-1]
        if last.end is None:
            last.outcome = "timeout" if stop.forced else "ok"
        if last.name == "exit" or last.end is None:  # the program's own way out was part of it
            last.end = teardown.now
    if final:
        guard.entry_leave(_outcome(teardown), teardown.exit_code)
    else:
        guard.entry_update(state="leaving", outcome=_outcome(teardown), exit_code=teardown.exit_code)
    if guard.settings.report_dir:
        problem = report.write_report(guard.settings.report_dir, guard.report_name, as_dict(teardown))
        if problem:
            teardown.say(problem)
    if guard.settings.termination_log:
        report.write_termination_log(guard.settings.termination_log, story(teardown))


def as_dict(teardown: Teardown) -> dict[str, Any]:
    """The JSON report, schema 1."""
    guard, stop = teardown.guard, teardown.stop
    return {
        **guard.identity(),
        "cause": teardown.cause,
        "signal": signal.Signals(teardown.signum).name if teardown.signum else None,
        "origin": teardown.origin,
        "received_at": teardown.received_at,
        "grace": guard.settings.grace,
        "phases": [phase.as_dict() for phase in stop.phases] if stop is not None else [],
        "steps": stop.steps if stop is not None else None,
        "stuck": teardown.stuck,
        "outcome": _outcome(teardown),
        "exit_code": teardown.exit_code,
    }


def story(teardown: Teardown) -> str:
    """The same in lines of text, for a reader of `kubectl describe pod`."""
    guard, stop = teardown.guard, teardown.stop
    phases = stop.phases if stop is not None else []
    lines = [f"autoteardown: rank {guard.rank} of {guard.world_size}, {teardown.opening()}"]
    lines += [
        f"+{phase.start:.2f}s {phase.name}: {phase.outcome} {phase.detail}".rstrip() for phase in phases
    ]
    lines.append(f"+{teardown.now:.2f}s {summary(teardown)}")
    for entry in teardown.stuck[-4:]:
        lines.append(f"{entry['when']}, thread {entry['thread']}: " + " < ".join(entry["frames"][:6]))
    return "".join(f"{printable(line)}\n" for line in lines)


def _outcome(teardown: Teardown) -> str:
    return teardown.stop.outcome if teardown.stop is not None else "forced"
