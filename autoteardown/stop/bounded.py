"""Calls a function that may never return, and waits for it with a bound."""

from __future__ import annotations

from typing import Callable

from autoteardown import spare_threads
from autoteardown.unpatched import allocate_lock


def run_bounded(function: Callable[[], object], seconds: float) -> bool:
    """Call `function` on another thread, and wait until it has returned or so many seconds have passed.

    Returns:
        False if no thread is available: then `function` has not been called.
    """
    over = allocate_lock()
    over.acquire()

    def run() -> None:
        try:
            function()
        finally:
            over.release()

    if not spare_threads.start(run):
        return False
    over.acquire(timeout=seconds)
    return True
