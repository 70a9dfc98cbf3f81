"""Calls a function that may never return, and waits for it with a bound."""

from __future__ import annotations

from typing import Callable

from autoteardown.unpatched import allocate_lock, start_new_thread


def run_bounded(function: Callable[[], object], seconds: float) -> None:
    """Call `function` on a new thread, and wait until it has returned or so many seconds have passed.

    Raises:
        RuntimeError: no thread is available.
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
