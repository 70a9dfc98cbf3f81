"""What Ray's own layers do to a process that is a rank, and what a teardown has to do about it."""

from __future__ import annotations

import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _is_ray() -> bool:
    return "ray._raylet" in sys.modules


def call_abort_off() -> None:
    """In a driver, Ray's C++ handler for SIGTERM runs first and has the process aborted (exit code 134) 3 s later.

    By abseil's failure signal handler, through `alarm(3)` (ray-project/ray#64830): it hands on to Python's handler
    after that, so by the time that anybody hears of the signal, the alarm is set. An application that uses alarms has
    a Python handler for them.
    """
    if _is_ray() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.alarm(0)


def waits_for_method(loop: Any) -> bool:
    """Whether a SystemExit would not end the process: of an async actor Ray waits for the methods that still run.

    Args:
        loop: the event loop of the thread that called init, if it has one.
    """
    asyncio = sys.modules.get("asyncio")
    if loop is None or asyncio is None or not _is_ray():
        return False
    try:
        return any(not task.done() for task in asyncio.all_tasks(loop))
    except RuntimeError:  # tasks come and go on another thread
        return True
