"""Tells a repetition of the eviction signal from a second signal that is meant for the application.

1. Platforms repeat the signal: SLURM sends TERM, CONT, TERM within 2 to 120 ms at a time limit, torchrun signals
   workers that the platform has signalled already. An application that gets each of them leaves one iteration before
   the others, or cuts its own save short.
2. So a signal within two seconds of the first is the same eviction, and neither handlers nor event loops get it. A
   later one goes to the application at once.
3. What counts is the time of arrival, which the loop thread reads from the wake-up fd: the main thread may be in C code
   for a long time, and see a repetition late.
4. A program that has put the default action back and raises the signal itself (uvicorn after its shutdown) means its
   own end. The frame that the signal interrupts shows that: its code names the function that sends signals.
"""

from __future__ import annotations

from types import FrameType
from typing import Optional

from autoteardown.settings import SAME_EVICTION
from autoteardown.unpatched import monotonic, sleep

_LOOP_THREAD = 0.05  # seconds for the loop thread, which needs only the GIL, to read what has arrived
_SENDS_SIGNALS = frozenset({"raise_signal", "kill", "killpg", "pthread_kill"})


class RepeatedSignals:
    """The arrivals of eviction signals at one process."""

    def __init__(self) -> None:
        self._arrived: Optional[float] = None  # when the first one arrived
        self._latest = 0.0  # when the latest one arrived
        self._handled: Optional[float] = None  # when the Python-level handler was first called

    def arrived(self) -> bool:
        """Record the arrival of a signal, on the loop thread. Returns whether the signal repeats the first one."""
        self._latest = monotonic()
        if self._arrived is None:
            self._arrived = self._latest
            return False
        return self._latest - self._arrived < SAME_EVICTION

    @property
    def none_handled(self) -> bool:
        """Whether the Python-level handler has not been called yet. Ask before `handled`: another call may come between
        any two bytecodes, and one of the two has to be the first.
        """
        return self._handled is None

    def handled(self, frame: Optional[FrameType]) -> bool:
        """On the main thread, in the Python-level handler. Returns whether the signal repeats the first one.

        Args:
            frame: the frame that the signal interrupts.
        """
        now = monotonic()
        if self._handled is None:
            self._handled = now
            return False
        if frame is not None and not _SENDS_SIGNALS.isdisjoint(frame.f_code.co_names):
            return False
        if self._arrived is None:  # an event loop has had the wake-up fd
            return now - self._handled < SAME_EVICTION
        if now - self._arrived >= SAME_EVICTION and self._latest - self._arrived < SAME_EVICTION:
            sleep(_LOOP_THREAD)  # a later signal may have arrived and not been read yet
        return self._latest - self._arrived < SAME_EVICTION
