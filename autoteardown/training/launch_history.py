"""Tells which groups' collectives follow the program's iterations, and which ones other threads launch, too.

1. Hosts run ahead of devices, so a rank whose count of iterations is off is found by comparing how many collectives
   each rank has launched. That works only for groups on which the training thread trains.
2. A checkpoint writer, a logger or a data service may launch collectives on a thread of its own, at its own pace:
   torch.distributed.checkpoint's `async_save` does so on the default group's gloo half. Its ranks may be one
   collective apart at any moment. A rank that was taken to be behind because of that would enter an iteration that its
   peers never join.
3. The training thread launches the same number of collectives in each iteration. So a group counts only if its number
   has grown by the same amount, not zero, in each of the last iterations, and not since the training thread stopped.
4. Nor is a collective of another thread progress of the training thread, which may be blocked for good: a rank whose
   count is off would be taken for slow, and waited for until the time for an iteration has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sized
from typing import Callable, Optional

_ITERATIONS = 4  # ends of iterations that are remembered
_KNOWN = 3  # ends after which a group is known not to follow the iterations

Counters = dict[str, Callable[[], int]]


class LaunchHistory:
    """The counts of launched collectives at the ends of the last iterations, recorded by the optimizer hook.

    Args:
        look: returns the counters by the name of their group (none: record nothing), and torch's table of all groups.
    """

    def __init__(self, look: Callable[[], tuple[Counters, Sized]] = lambda: ({}, ())) -> None:
        self._look = look
        self._counters: Counters = {}
        self._table: Sized = ()
        self._groups = 0
        self._ends: deque[list[int]] = deque(maxlen=_ITERATIONS)

    def look(self) -> None:
        """Find out which groups there are."""
        counters, self._table = self._look()
        self._groups = len(self._table)
        if counters.keys() != self._counters.keys():
            self._ends.clear()
        self._counters = counters

    def iteration_ended(self) -> None:
        """Record the counters."""
        if len(self._table) != self._groups:  # the program has made a group, or destroyed one
            self.look()
        if self._counters:
            self._ends.append([count() for count in self._counters.values()])

    def of_other_threads(self) -> set[str]:
        """The groups that are known not to follow the iterations."""
        ends = list(self._ends)
        columns = zip(self._counters, zip(*ends)) if len(ends) >= _KNOWN else ()
        return {group for group, column in columns if not _even(column)}

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


def _even(ends: tuple[int, ...]) -> bool:
    growth = {later - earlier for earlier, later in zip(ends, ends[1:])}
    return len(growth) == 1 and growth != {0}


def _follows(ends: tuple[int, ...], number: int, stopped: bool) -> bool:
    return _even(ends) and (number == ends[-1] or not stopped)
