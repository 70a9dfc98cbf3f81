"""Parks a thread that is not the main thread, before its next bytecode.

Signal handlers run on the main thread only. An asynchronous exception reaches any thread, and Python creates the
exception instance on that thread before any handler of the program sees it: so the constructor parks the thread.
"""

from __future__ import annotations

import ctypes

from autoteardown.training import gate as _gate
from autoteardown.unpatched import get_ident


def park_thread(ident: int) -> None:
    """Have that thread park before its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Parks))


class _Parks(BaseException):
    """The exception that is raised in the thread (PyThreadState_SetAsyncExc)."""

    def __init__(self) -> None:
        super().__init__()
        gate, ident = _gate.gate, get_ident()
        if ident in gate.waits.inside or ident in gate.held:  # it waits already, and checks by itself
            return
        parking = gate.parking
        if parking.left(ident) and parking.on_way_out():  # raised twice, and the thread is exiting already
            parking.leave()
        gate.park()
