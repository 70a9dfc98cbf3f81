"""Tells, in the last atexit callback, which code the process is about to exit with.

1. CPython does not pass the code to atexit callbacks. An uncaught exception is in `sys.last_value`. A SystemExit ends
   the process through `Py_Exit`, which is then on the C stack; its code is known if `sys.exit` was called.
2. A child of multiprocessing runs its finalizers with the exception, if there is one, still in flight.
3. The result is None if it is not certain: the agent must never replace an exit code of the program by mistake.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Optional

from autoteardown.loaded_symbols import locate
from autoteardown.thread_stacks import is_in_collective

_FRAMES = 64  # of the C stack
_recorded: Optional[int] = None


def watch() -> None:
    """Record the codes of calls of `sys.exit` from now on. Called in a process that is being evicted."""
    real = sys.exit
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def exit(status: Any = None, /) -> None:
        global _recorded
        _recorded = _code_of(status)
        real(status)

    sys.exit = exit  # type: ignore[assignment]


def failed() -> bool:
    """Whether an uncaught exception of the program's own ends it.

    Not its own are those that came up while it exited with SystemExit, and those of a collective whose peer has exited.
    """
    error: Any = getattr(sys, "last_value", None)
    if error is None or is_in_collective(error.__traceback__):
        return False
    for _ in range(_FRAMES):
        if error is None:
            break
        if isinstance(error, SystemExit):
            return False
        error = error.__context__
    return True


def status() -> Optional[int]:
    """The exit code of the process, from its last atexit callback; None if it is not certain."""
    if getattr(sys, "last_value", None) is not None:
        return 1
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        error = sys.exc_info()[1]
        return _code_of(error.code) if isinstance(error, SystemExit) else int(error is not None)
    if sys.version_info >= (3, 14):  # how a SystemExit reaches the exit there has not been examined
        return _recorded
    through_exit = _in_py_exit()
    if through_exit is None:
        return _recorded
    return _recorded if through_exit else 0


def _code_of(status: Any) -> int:
    if status is None:
        return 0
    return status & 0xFF if isinstance(status, int) else 1


def _in_py_exit() -> Optional[bool]:
    """Whether `Py_Exit` is on the C stack of this thread; None where that cannot be seen (musl)."""
    backtrace = getattr(ctypes.CDLL(None), "backtrace", None)
    if backtrace is None:
        return None
    frames = (ctypes.c_void_p * _FRAMES)()
    count = backtrace(frames, _FRAMES)
    wanted = ctypes.cast(ctypes.pythonapi.Py_Exit, ctypes.c_void_p).value
    located = [locate(address) for address in frames[:count]]
    return any(each is not None and each.function == wanted for each in located)
