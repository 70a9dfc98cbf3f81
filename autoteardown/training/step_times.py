"""Measures how long the program's iterations take. Written to in the optimizer hook, so it costs one append."""

from __future__ import annotations

from collections import deque
from typing import Optional

from autoteardown.unpatched import monotonic


class StepTimes:
    """The ends of the last few iterations."""

    def __init__(self) -> None:
        self.ends: deque[float] = deque(maxlen=9)  # monotonic times

    def _gaps(self) -> list[float]:
        ends = list(self.ends)
        return [later - earlier for earlier, later in zip(ends, ends[1:])]

    def usual(self) -> Optional[float]:
        """Median seconds of an iteration; None before two have ended."""
        gaps = sorted(self._gaps())
        return gaps[len(gaps) // 2] if gaps else None

    def longest(self) -> float:
        """Seconds of the longest of these iterations."""
        return max(self._gaps(), default=0.0)

    def idle(self) -> float:
        """Seconds since the last iteration ended; 0 before the first."""
        return monotonic() - self.ends[-1] if self.ends else 0.0
