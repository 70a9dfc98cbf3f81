"""Tracks the agent's calls into C++ that release the GIL, so that none is running when the interpreter shuts down.

When a thread returns from C++ after the interpreter has been finalized, CPython (up to 3.13) makes the thread exit. The
C++ frames turn that into an abort of the process, whatever its exit code would have been.
"""

from __future__ import annotations

import os
from typing import Callable, TypeVar

from autoteardown import unpatched

_Result = TypeVar("_Result")

_running: set[object] = set()
_exiting = False


class InterpreterExiting(Exception):
    """The interpreter is shutting down, so no call into C++ may begin."""


def call(function: Callable[[], _Result]) -> _Result:
    """Call a function that releases the GIL, and return its result.

    Raises:
        InterpreterExiting: the function was not called.
    """
    mark = object()
    _running.add(
        mark
    )  # before the check, so that `wait_for_running` misses no call that has passed the check
    try:
        if _exiting:
            raise InterpreterExiting
        return function()
    finally:
        _running.discard(mark)


def wait_for_running(seconds: float) -> None:
    """At the end of the exit: allow no further calls, and wait at most so many seconds for those that are running."""
    global _exiting
    _exiting = True
    end = unpatched.monotonic() + seconds
    while _running and unpatched.monotonic() < end:
        unpatched.sleep(0.001)


def _after_fork_in_child() -> None:
    global _exiting
    _exiting = False
    _running.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
