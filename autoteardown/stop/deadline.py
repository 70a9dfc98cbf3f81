"""Keeps how much time a stop has, counted from its signal, and enforces it."""

from __future__ import annotations

from typing import Callable, Optional

from autoteardown.stop.bounded import run_bounded
from autoteardown.stop.posix_timer import HardDeadlineTimer
from autoteardown.unpatched import monotonic, sleep

# seconds before the deadline at which the deadline thread ends the process; the timer comes after it
_BEFORE = 0.1
_TIMER_BEFORE = 0.02
_FREE = 0.5  # seconds before the drain's kill by which the process has ended
_READING = 0.2  # seconds for the file in which a drain says when it kills
_LEAST = 1.0  # seconds for a stop, however late the drain began
_AGAIN = 1.0  # seconds between two checks of the deadline, which a drain may have moved


class Deadline:
    """The deadline of one stop; its clock starts now.

    Args:
        hard: seconds until the process must have ended.
        timer: ends the process without Python; may be running already.
    """

    def __init__(self, hard: float, timer: HardDeadlineTimer) -> None:
        self.hard = hard
        self.shortened = False  # by a drain of the node
        self._started = monotonic()
        self._timer = timer

    @property
    def now(self) -> float:
        """Seconds since the signal."""
        return monotonic() - self._started

    def arm(self, code: int, at: Optional[float] = None) -> None:
        """Have the timer end the process with this code at the deadline, or after `at` seconds if earlier."""
        self._timer.arm((self.hard if at is None else min(at, self.hard)) - _TIMER_BEFORE - self.now, code)

    def wait(self) -> None:
        """Wait until shortly before the deadline."""
        while (left := self.hard - _BEFORE - self.now) > 0:
            sleep(min(left, _AGAIN))

    def shorten(self, time_left: Callable[[], Optional[float]], code: int) -> None:
        """Move the deadline forward if a drain of the node kills this rank before its grace period ends.

        Args:
            time_left: returns the seconds that the drain leaves, None without one; reads a file, and a disk may be
                dead.
            code: the exit code.
        """
        found: list[Optional[float]] = []
        run_bounded(lambda: found.append(time_left()), _READING)
        left = found[0] if found else None
        if left is not None and self.now + left - _FREE < self.hard:
            self.hard = max(_LEAST, self.now + left - _FREE)
            self.shortened = True
            self.arm(code)
