"""Keeps a few threads waiting in an armed process, so that a stop can begin where no thread can be started.

1. A container may be at its PID limit, or a user at RLIMIT_NPROC, when the eviction signal comes: then
   `start_new_thread` raises RuntimeError. What a stop needs at least is started when the rank is armed: the driver, the
   thread of the hard deadline, and two for what may block.
2. The threads are started with `_thread`: `threading.Thread.start` takes a lock that the frozen main thread may hold.
"""

from __future__ import annotations

import os
from typing import Callable, Optional

from autoteardown.unpatched import allocate_lock, start_new_thread

COUNT = 4

_idle: list[_Spare] = []
_kept: list[_Spare] = []


class _Spare:
    """A thread that waits for a function to run."""

    def __init__(self) -> None:
        self.function: Optional[Callable[[], object]] = None
        self.wake = allocate_lock()
        self.wake.acquire()
        start_new_thread(self._run, ())

    def _run(self) -> None:
        while True:
            self.wake.acquire()
            function, self.function = self.function, None
            if function is None:
                return
            try:
                function()
            except BaseException:  # its contract says that it does not raise; but this thread is needed
                pass
            _idle.append(self)


def keep() -> None:
    """Start the waiting threads, as many as can be started. Idempotent."""
    while len(_kept) < COUNT:
        try:
            spare = _Spare()
        except RuntimeError:
            return
        _kept.append(spare)
        _idle.append(spare)


def release() -> None:
    """End the threads that wait."""
    _kept.clear()
    while _idle:
        _idle.pop().wake.release()


def start(function: Callable[[], object]) -> bool:
    """Run `function` on a thread, a new one or one that waits. May be called from any thread, at any bytecode.

    Args:
        function: must not raise.

    Returns:
        False if no thread is available: then it has not been called.
    """
    try:
        start_new_thread(function, ())
        return True
    except RuntimeError:
        pass
    try:
        spare = _idle.pop()
    except IndexError:
        return False
    spare.function = function
    spare.wake.release()
    return True


def _after_fork_in_child() -> None:
    _kept.clear()
    _idle.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
