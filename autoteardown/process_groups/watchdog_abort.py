"""Keeps `abort()` on another thread from taking the exit code of a stop.

1. A communicator's watchdog that finds an error or a time-out ends the process with `abort()`, also in the middle of
   a teardown. A launcher would see -6 instead of the exit code that the settings promise. The watchdog cannot be
   told to stop: NCCL's settings are read when the group is made.
2. The C handler of SIGABRT may be any function. `pause` does not return, so the thread that calls `abort()` stays
   there. The process then ends as the stop decides or, if that thread holds the GIL, by the POSIX timer.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any, Optional


class _SigAction(ctypes.Structure):  # the layout of glibc and musl on 64-bit Linux (see `_load`)
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def _load() -> Optional[Any]:
    # Elsewhere the layout differs.
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "sigaction") and hasattr(library, "pause") else None
    except OSError:
        return None


_libc = _load()


def hold_off() -> bool:
    """From now on, a thread that calls `abort()` waits for the end of the process instead of causing it. Never raises.

    Only for a process that is sure to end: one that crashes after this call would hang.

    Returns:
        Whether this is in effect.
    """
    try:
        if _libc is None:
            return False
        # All signals are blocked meanwhile: any handler that ran on that thread would let `pause` return.
        everything = (ctypes.c_ubyte * 128)(*[0xFF] * 128)
        function = ctypes.cast(_libc.pause, ctypes.c_void_p).value
        action = _SigAction(function, everything, 0, None)
        return bool(_libc.sigaction(signal.SIGABRT.value, ctypes.byref(action), None) == 0)
    except Exception:  # the stop goes on without it
        return False
