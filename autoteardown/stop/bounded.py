"""What may never return is done on a thread of its own, and waited for with a bound."""

from __future__ import annotations

from typing import Callable

from autoteardown.unpatched import allocate_lock, start_new_thread


def run_bounded(function: Callable[[], object], seconds: float) -> None:
    """Call it on a thread of its own, and wait until it is over or so many seconds have passed.

    Raises:
        RuntimeError: no thread to be had.
    """
    over = allocate_lock()
    over.acquire()

    def run() -> None:
        try:
            function()
        finally:
            over.release()

    start_new_thread(run, ())
    over.acquire(timeout=seconds)
