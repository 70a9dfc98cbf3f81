"""Decides what to do about a source's readings, as a pure state machine: readings and a clock in, steps out.

1. A notice may tell when the machine ends, or the vendor documents how long it takes. In the second case the time
   counts from the last reading without the notice, so that a slow reading costs time and never adds any.
2. The same notice never moves the end back.
3. A notice that leaves more than `lead` seconds is waited with: it may be withdrawn, and the job trains on meanwhile.
4. A source that cannot be read withdraws nothing.

Times are seconds of a monotonic clock, so this machine's wall clock may be wrong.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from autoteardown.cloud_notice.source import Notice

RESERVE = 5.0
"""Seconds before the end of the machine by which its ranks have exited."""
LEAST = 2.0
"""Seconds that ranks get in any case."""

_LATENCY = 5.0  # seconds by which an answer's own clock is at most older than the answer


class Step(NamedTuple):
    """Something that has happened, and is to be logged; `do` is `notice`, `changed`, `withdrawn` or `drain`."""

    do: str
    notice: Notice
    left: Optional[float]
    """Seconds until the machine ends; None: not known."""


class Decisions:
    """The state of one watcher.

    Args:
        lead: seconds before the end of the machine at which the drain begins.
        assumed: replaces what the vendor documents; None: does not.
        now: the clock.
    """

    def __init__(self, lead: float, assumed: Optional[float], now: float) -> None:
        self._lead, self._assumed = lead, assumed
        self._without = now  # when the source was last read without a notice
        self._seen = False  # whether it ever was
        self.notice: Optional[Notice] = None
        self.end: Optional[float] = None
        self.drained = False  # a drain has begun for this notice

    def read(self, notice: Optional[Notice], asked: float, now: float) -> list[Step]:
        """Take in a reading, which was asked for at `asked`."""
        steps: list[Step] = []
        before = self.notice
        if notice is None:
            self._without, self._seen = asked, True
            if before is not None:
                steps.append(Step("withdrawn", before, self._left(now)))
            self.notice, self.end, self.drained = None, None, False
            return steps
        end = self._end(notice, asked, now)
        if before is None or before.key != notice.key:
            steps.append(Step("notice", notice, None if end is None else max(0.0, end - now)))
            if self.drained and self.end is not None and (end is None or end > self.end):
                end = self.end  # the ranks have been told
        elif self.end is not None and (end is None or end > self.end - 1.0):
            end = self.end
        elif end is not None:
            steps.append(Step("changed", notice, max(0.0, end - now)))
        self.notice, self.end = notice, end
        return steps + self.tick(now)

    def tick(self, now: float) -> list[Step]:
        """The clock has advanced."""
        left = self._left(now)
        if self.notice is None or self.drained or (left is not None and left > self._lead):
            return []
        self.drained = True
        return [Step("drain", self.notice, left)]

    def wake(self, now: float) -> Optional[float]:
        """Seconds until `tick` is wanted; None: not at all."""
        left = self._left(now)
        return None if left is None or self.drained else max(0.0, left - self._lead)

    def _left(self, now: float) -> Optional[float]:
        return None if self.end is None else max(0.0, self.end - now)

    def _end(self, notice: Notice, asked: float, now: float) -> Optional[float]:
        if notice.seconds is not None:
            return max(asked, now - _LATENCY) + notice.seconds
        assumed = notice.assumed if self._assumed is None else self._assumed
        if assumed is None:
            return None
        if notice.key == (self.notice.key if self.notice else None) and self.end is not None:
            return self.end
        return (self._without if self._seen else asked) + assumed


def for_ranks(left: Optional[float]) -> Optional[float]:
    """The seconds that the ranks get; None: their own grace period."""
    return None if left is None else max(LEAST, left - RESERVE)
