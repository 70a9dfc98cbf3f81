"""Tells which groups' collectives follow the program's iterations, and which ones other threads launch, too.

1. Hosts run ahead of devices, so a rank whose count of iterations is off is found by comparing how many collectives
   each rank has launched. That works only for groups on which the training thread trains.
2. A checkpoint writer, a logger or a data service may launch collectives on a thread of its own, at its own pace:
   torch.distributed.checkpoint's `async_save` does so on the default group's gloo half. Its ranks may be one
   collective apart at any moment. A rank that was taken to be behind because of that would enter an iteration that its
   peers never join.
3. The training thread launches the same number of collectives in each iteration. So a group counts only if its number
   has grown by the same amount, not zero, in each of the last iterations, and not since the training thread stopped.
"""

from __future__ import annotations

from collections import deque
from typing import Callable, Optional

_ITERATIONS = 4  # ends of iterations that are remembered


class LaunchHistory:
    """The counts of launched collectives at the ends of the last iterations, recorded by the optimizer hook."""

    def __init__(self) -> None:
        self._counters: dict[str, Callable[[], int]] = {}
        self._ends: deque[list[int]] = deque(maxlen=_ITERATIONS)

    def watch(self, counters: dict[str, Callable[[], int]]) -> None:
        """Record these counters from now on, by the name of their group; if there are none, record nothing."""
        if counters.keys() != self._counters.keys():
            self._ends.clear()
        self._counters = counters

    def iteration_ended(self) -> None:
        """Record the counters."""
        if self._counters:
            self._ends.append([count() for count in self._counters.values()])

    def regular(self, numbers: dict[str, int], stopped: bool) -> dict[str, Optional[int]]:
        """These sequence numbers, and None for groups whose collectives do not follow the iterations.

        Args:
            numbers: the present ones, by group.
            stopped: the training thread waits where its last iteration ended; the numbers must not have changed since.
        """
        ends = list(self._ends)
        if len(ends) < 2:  # nothing known: a program without optimizers, or its first iterations
            return {group: None if group.endswith("/cpu") else number for group, number in numbers.items()}
        columns = dict(zip(self._counters, zip(*ends)))
        return {
            group: number if group in columns and _follows(columns[group], number, stopped) else None
            for group, number in numbers.items()
        }


def _follows(ends: tuple[int, ...], number: int, stopped: bool) -> bool:
    growth = {later - earlier for earlier, later in zip(ends, ends[1:])}
    return len(growth) == 1 and growth != {0} and (number == ends[-1] or not stopped)
