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
# Seconds, and part of the time, for the file in which a drain says when it kills: a busy machine may take a while.
_READING, _READING_SHARE = 1.0, 0.1
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
        self.changed = False  # by a drain of the node
        self.longer = False  # it is that of the machine, not that of the grace period
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

    def give(self, seconds: float) -> None:
        """Move the deadline back: the machine of a signalled peer announces that the ranks have so many seconds."""
        if self.now + seconds > self.hard:
            self.hard, self.changed, self.longer = self.now + seconds, True, True

    def follow_drains(
        self, times_left: Callable[[], list[tuple[float, bool]]], signals: int, usual: float, code: int
    ) -> None:
        """Move the deadline to what the drains of this node have announced.

        A drain may kill this rank before its grace period ends. Another one, `autoteardown watch`, knows when the
        machine ends, and gives the rank all the time until then. If more signals have come than such drains have
        sent, one of them came from the platform, and the rank has its usual time from then on.

        Args:
            times_left: for each drain, the seconds until the kill, and whether the rank has all of them; reads files,
                and a disk may be dead.
            signals: how many eviction signals this rank has got.
            usual: seconds that a rank has after a signal.
            code: the exit code.
        """
        found: list[list[tuple[float, bool]]] = []
        run_bounded(lambda: found.append(times_left()), min(_READING, self.hard * _READING_SHARE))
        announced = found[0] if found else []
        given = [seconds for seconds, longer in announced if longer]
        hard = self.hard
        if given and len(given) >= signals:
            hard, self.longer = max(_LEAST, self.now + min(given) - _FREE), True
        elif self.longer:
            hard = min(hard, self.now + usual)
        for seconds, longer in announced:
            if not longer:
                hard = min(hard, max(_LEAST, self.now + seconds - _FREE))
        if hard != self.hard:
            self.hard, self.changed = hard, True
            self.arm(code)
