"""How much time a stop has, counted from its signal, and the fuse that burns meanwhile."""

from __future__ import annotations

from typing import Callable, Optional

from autoteardown.stop.bounded import run_bounded
from autoteardown.stop.posix_timer import HardDeadlineTimer
from autoteardown.unpatched import monotonic, sleep

_BEFORE = 0.1  # seconds before the deadline when a thread of ours ends the process; the fuse comes after it
_FUSE = 0.02
_FREE = 0.5  # seconds before whoever drains the node kills that the process is gone by
_READING = 0.2  # seconds for the file in which a drain says when
_LEAST = 1.0  # seconds for a stop, however late its drain is
_AGAIN = 1.0  # seconds between looks at the deadline, which a drain may have moved


class Deadline:
    """Of one stop; its clock starts now.

    Args:
        hard: seconds until the process is gone.
        fuse: of this process; may burn already.
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
        """Have the fuse end the process with that exit code at the deadline, or `at` so many seconds, if less."""
        self._timer.arm((self.hard if at is None else min(at, self.hard)) - _FUSE - self.now, code)

    def wait(self) -> None:
        """Until shortly before it."""
        while (left := self.hard - _BEFORE - self.now) > 0:
            sleep(min(left, _AGAIN))

    def shorten(self, time_left: Callable[[], Optional[float]], code: int) -> None:
        """A drain of the node may be over before this rank's own grace period is: then it is killed.

        Args:
            time_left: how many seconds the drain leaves, if it has said so; reads a file, and a disk may be dead.
            code: the exit code.
        """
        found: list[Optional[float]] = []
        run_bounded(lambda: found.append(time_left()), _READING)
        left = found[0] if found else None
        if left is not None and self.now + left - _FREE < self.hard:
            self.hard = max(_LEAST, self.now + left - _FREE)
            self.shortened = True
            self.arm(code)
