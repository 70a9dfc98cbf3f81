"""Parks a thread that is not the main one, at its next bytecode.

A signal handler can only run on the main thread. An asynchronous exception reaches any thread, and Python makes the
instance on that thread before any handler of the program's sees it: so the constructor is where it parks.
"""

from __future__ import annotations

import ctypes

from autoteardown.training import gate as _gate
from autoteardown.unpatched import get_ident


def park_thread(ident: int) -> None:
    """Have that thread park at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Parks))


class _Parks(BaseException):
    """Raised into the thread (PyThreadState_SetAsyncExc)."""

    def __init__(self) -> None:
        super().__init__()
        gate, ident = _gate.gate, get_ident()
        if ident in gate.waits.inside or ident in gate.held:  # it looks for itself
            return
        parking = gate.parking
        if parking.left(ident) and parking.on_way_out():  # asked twice, and on its way already
            parking.leave()
        gate.park()
