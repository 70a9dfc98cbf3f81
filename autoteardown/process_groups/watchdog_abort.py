"""`abort()` on another thread does not take the exit code of a stop.

A communicator's watchdog that finds an error or a time-out ends the process with `abort()`, whoever is in the middle of
a teardown; a launcher would see -6 where the contract says otherwise. It cannot be called off: NCCL's settings are read
when the group is made. But the C handler of SIGABRT may be any function, and `pause` is one that does not come back:
the thread that calls `abort()` stays there, and the process ends as the stop says, or, if that thread has the GIL, by
its fuse.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any, Optional


class _SigAction(ctypes.Structure):  # as glibc and musl have it, where it can be relied on (see `_load`)
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def _load() -> Optional[Any]:
    # Elsewhere the structure is another one.
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "sigaction") and hasattr(library, "pause") else None
    except OSError:
        return None


_libc = _load()


def hold_off() -> bool:
    """From here on a thread that calls `abort()` waits for the end of the process instead of being it. Never raises.

    Only for a process that is sure to end: one that crashes later than this would hang.

    Returns:
        Whether that is so now.
    """
    try:
        if _libc is None:
            return False
        # All other signals wait meanwhile: any handler that ran on that thread would let `pause` return.
        everything = (ctypes.c_ubyte * 128)(*[0xFF] * 128)
        function = ctypes.cast(_libc.pause, ctypes.c_void_p).value
        action = _SigAction(function, everything, 0, None)
        return bool(_libc.sigaction(signal.SIGABRT.value, ctypes.byref(action), None) == 0)
    except Exception:  # the stop goes on without
        return False
