"""A hard deadline that needs no Python: a POSIX timer whose thread calls `_exit`.

A Python thread cannot end a process in which another holds the GIL for good. torch does: the destructor of a gloo
process group joins its threads with the GIL held, while one of them waits for the GIL.
"""

from __future__ import annotations

import ctypes
from typing import Any, Optional

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _SigEvent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "in_s", "in_ns")]


def _load() -> Optional[Any]:
    for name in (None, "librt.so.1"):  # glibc before 2.34 has timers in a library of their own
        try:
            library = ctypes.CDLL(name)
            if all(
                hasattr(library, call) for call in ("timer_create", "timer_settime", "timer_delete", "_exit")
            ):
                return library
        except OSError:
            continue
    return None


_libc = _load()


class HardDeadlineTimer:
    """Ends the process when it expires. Does nothing where there are no POSIX timers (macOS)."""

    def __init__(self) -> None:
        self._timer: Optional[ctypes.c_void_p] = None

    def arm(self, seconds: float, code: int) -> None:
        """End the process with `code` in so many seconds; replaces an earlier deadline. Never raises."""
        try:
            if _libc is None:
                return
            function = ctypes.cast(_libc._exit, ctypes.c_void_p).value
            event = _SigEvent(code, 0, _SIGEV_THREAD, function, None)
            timer = ctypes.c_void_p()
            if _libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
                return
            nanoseconds = max(1, int(seconds * 1e9))
            spec = _TimerSpec(0, 0, *divmod(nanoseconds, 10**9))
            _libc.timer_settime(timer, 0, ctypes.byref(spec), None)
            old, self._timer = self._timer, timer
            if old is not None:
                _libc.timer_delete(old)
        except Exception:  # the deadline thread in Python remains
            pass
