"""Calls of the agent's own threads into C++ that lets go of the GIL: none is under way when the interpreter ends.

A thread that comes back from C++ to an interpreter that is gone is made to exit by CPython (up to 3.13), and the frames
of C++ turn that into an abort of the process, whatever its exit code was going to be.
"""

from __future__ import annotations

import os
from typing import Callable, TypeVar

from autoteardown import unpatched

_Result = TypeVar("_Result")

_inside: set[object] = set()
_over = False


class InterpreterExiting(Exception):
    """The interpreter is about to end."""


def call(function: Callable[[], _Result]) -> _Result:
    """Call it.

    Raises:
        Over: it was not called.
    """
    mark = object()
    _inside.add(mark)  # first this, then the question: see `settle`
    try:
        if _over:
            raise InterpreterExiting
        return function()
    finally:
        _inside.discard(mark)


def wait_for_running(seconds: float) -> None:
    """At exit, last of all: begin no such call any more, and wait for those under way, at most so many seconds."""
    global _over
    _over = True
    end = unpatched.monotonic() + seconds
    while _inside and unpatched.monotonic() < end:
        unpatched.sleep(0.001)


def _after_fork_in_child() -> None:
    global _over
    _over = False
    _inside.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
