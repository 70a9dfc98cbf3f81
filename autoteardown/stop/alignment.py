"""Checks whether all ranks that step are really at the same iteration, and advances those that are behind.

1. No count is beyond doubt: a rank may have skipped a step long ago, or its agent may have been armed late. So each
   rank reports when it has reached the agreed iteration, and when it waits without progress.
2. A rank that waits while others have arrived waits for them: they advance by one iteration, and the waiting rank
   stops as soon as that lets it.

Pure, like the coordinator that uses it.
"""

from __future__ import annotations

from math import inf
from typing import Any, Callable, Optional

Verdict = tuple[Optional[int], str, Any]

CONFIRM = 0.5  # seconds for a rank to report progress again, after another has arrived
ROUNDS = 2  # how often ranks that have arrived advance by one iteration


class AlignmentCheck:
    """The check for one group, once it is known which ranks step.

    Args:
        steppers: the ranks that step.
        stepped: whether a rank had stepped when it answered.
    """

    def __init__(self, steppers: set[int], stepped: Callable[[int], bool]) -> None:
        self.wake = inf  # when to check again, whatever happens
        self.steppers = steppers
        self._stepped = stepped
        self._settled = 0.0  # when a rank last reported
        self._at: set[int] = set()
        self._stalled: set[int] = set()
        self._numbers: dict[int, dict[str, Optional[int]]] = {}
        # the current round of each rank; reports of an earlier round do not count
        self._round: dict[int, int] = {}
        self._rounds = 0
        self._preparing: set[int] = set()  # ranks that must report `ready` before `_next` is sent
        self._next: dict[int, dict[str, Any]] = {}

    def at(self, rank: int, number: int, numbers: Any, now: float) -> None:
        """The rank is at the agreed iteration of that round."""
        if number == self._round.get(rank, 0):
            self._settled = now
            self._stalled.discard(rank)
            self._at.add(rank)
            self._numbers[rank] = _numbers(numbers)

    def stalled(self, rank: int, waits: bool, number: int, numbers: Any, now: float) -> None:
        """The rank waits without progress, or does not any more."""
        if number == self._round.get(rank, 0):
            self._settled = now
            (self._stalled.add if waits else self._stalled.discard)(rank)
            self._numbers[rank] = _numbers(numbers)

    def ready(self, rank: int, number: int) -> None:
        """The rank knows where to stop in that round."""
        if number == self._round.get(rank, 0):
            self._preparing.discard(rank)

    def check(self, gone: set[int], all_present: Callable[[set[int]], bool], now: float) -> list[Verdict]:
        """What follows from what has been reported.

        Args:
            gone: ranks that have left, or are lost.
            all_present: whether these are all the ranks that are there, those that never step included.
            now: monotonic time in seconds.

        Returns:
            Messages as `(rank, kind, value)`: none, `advance` for some ranks, or for all ranks `aligned` or `halt`
            (value: why), after which there is nothing left to check.
        """
        # Counts first, sets only where the counts suffice: thousands of ranks post as many thousand messages.
        if not self._next and len(self._at) + len(self._stalled) + len(gone) < len(self.steppers):
            return []
        steppers = self.steppers - gone
        if self._next:
            return self._release(steppers)
        if not steppers or not steppers <= self._at | self._stalled:
            return []
        waiting = (self._stalled - self._at) & steppers
        # A rank with an optimizer that has not stepped, although the others advanced for its sake, does not step at
        # all.
        idle = {rank for rank in waiting if not self._stepped(rank) and rank in self._round}
        if idle and steppers - idle and steppers - idle <= self._at:
            self.steppers -= idle
            steppers, waiting = steppers - idle, waiting - idle
        behind = steppers - waiting if waiting else self._behind(steppers)
        if not behind and not waiting:
            return [(None, "aligned", None)]
        if waiting and now < self._settled + CONFIRM:
            # The rank that has just arrived may have unblocked it.
            self.wake = self._settled + CONFIRM
            return []
        if not behind:
            return [(None, "halt", "no rank makes progress")] if all_present(self._stalled) else []
        if self._rounds == ROUNDS:
            return [(None, "halt", "ranks wait for one another")]
        return self._another_round(steppers, waiting, behind)

    def _another_round(self, steppers: set[int], waiting: set[int], behind: set[int]) -> list[Verdict]:
        """Ranks that are behind advance; ranks that wait for them stop as soon as that lets them."""
        self._rounds += 1
        self._round.update(dict.fromkeys(behind | waiting, self._rounds))
        # Waiting ranks cannot move before those behind do: by then they must know where to stop.
        self._preparing = waiting
        until = self._most(steppers)
        self._next = {rank: {"round": self._rounds, "until": until} for rank in sorted(behind)}
        self._at -= behind
        self._stalled -= waiting
        prepare: list[Verdict] = [
            (rank, "advance", {"round": self._rounds, "until": {}}) for rank in sorted(waiting)
        ]
        return prepare + self._release(steppers)

    def _release(self, steppers: set[int]) -> list[Verdict]:
        if self._preparing & steppers:
            return []
        released, self._next = self._next, {}
        return [(rank, "advance", more) for rank, more in released.items()]

    def _most(self, steppers: set[int]) -> dict[str, int]:
        """The highest number of each group whose collectives follow the iterations on all its ranks."""
        most: dict[str, int] = {}
        irregular: set[str] = set()
        for rank in steppers:
            for group, number in self._numbers[rank].items():
                if number is None:
                    irregular.add(group)
                else:
                    most[group] = max(most.get(group, 0), number)
        return {group: number for group, number in most.items() if group not in irregular}

    def _behind(self, steppers: set[int]) -> set[int]:
        """The ranks that have launched fewer of a group's collectives than another: hosts run ahead of devices, and do
        not wait.
        """
        most = self._most(steppers)
        return {
            rank
            for rank in steppers
            if any((self._numbers[rank].get(group) or number) < number for group, number in most.items())
        }


def whole(value: Any) -> int:
    """The value, if it is a whole number from 0; it comes from another rank."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _numbers(value: Any) -> dict[str, Optional[int]]:
    """Sequence numbers by group; None: other threads than the training thread launch collectives there."""
    return {str(group): None if number is None else whole(number) for group, number in value.items()}
