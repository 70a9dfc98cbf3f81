"""Whether the ranks that step really are at the same iteration: the agreement is checked, not believed.

No count is beyond doubt (a step that one rank skipped long ago, an agent that was armed late). So each rank says when
it has got to the agreed one, and when it waits without progress. One that waits while others have arrived waits for
them: they go on for one iteration more, and it stops as soon as that lets it. Pure, like the `council` that asks.
"""

from __future__ import annotations

from math import inf
from typing import Any, Callable, Optional

Verdict = tuple[Optional[int], str, Any]

CONFIRM = 0.5  # seconds for a rank to say that it does not wait any more, when another has arrived
ROUNDS = 2  # how often ranks that arrived go on for one iteration more


class AlignmentCheck:
    """Of one group, once it is known who steps.

    Args:
        steppers: the ranks that do.
        stepped: whether that rank had stepped when it was asked.
    """

    def __init__(self, steppers: set[int], stepped: Callable[[int], bool]) -> None:
        self.wake = inf  # when to look again, whatever happens
        self.steppers = steppers
        self._stepped = stepped
        self._settled = 0.0  # when it was last said that a rank waits, or does not, or has arrived
        self._at: set[int] = set()
        self._stalled: set[int] = set()
        self._numbers: dict[int, dict[str, int]] = {}
        self._round: dict[int, int] = {}  # what was said in an earlier one does not count any more
        self._rounds = 0
        self._preparing: set[int] = set()  # who has yet to say that it is ready, before `_next` may go on
        self._next: dict[int, dict[str, Any]] = {}

    def at(self, rank: int, number: int, numbers: Any, now: float) -> None:
        """That rank is at the agreed iteration of that round."""
        if number == self._round.get(rank, 0):
            self._settled = now
            self._stalled.discard(rank)
            self._at.add(rank)
            self._numbers[rank] = _whole_numbers(numbers)

    def stalled(self, rank: int, waits: bool, number: int, numbers: Any, now: float) -> None:
        """That rank waits without progress, or does not any more."""
        if number == self._round.get(rank, 0):
            self._settled = now
            (self._stalled.add if waits else self._stalled.discard)(rank)
            self._numbers[rank] = _whole_numbers(numbers)

    def ready(self, rank: int, number: int) -> None:
        """That rank knows where to stop in that round."""
        if number == self._round.get(rank, 0):
            self._preparing.discard(rank)

    def check(self, gone: set[int], all_present: Callable[[set[int]], bool], now: float) -> list[Verdict]:
        """What follows from what has been said.

        Args:
            gone: ranks that have left, or are lost.
            all_present: whether these are all the ranks that are there, those that never step included.
            now: monotonic time in seconds.

        Returns:
            Whom to tell what: nothing, `more` for some, or for all `even` or `halt` (value: why), after which there is
            nothing left to check.
        """
        # Counts first, sets only where those suffice: thousands of ranks say as many thousand words.
        if not self._next and len(self._at) + len(self._stalled) + len(gone) < len(self.steppers):
            return []
        steppers = self.steppers - gone
        if self._next:
            return self._release(steppers)
        if not steppers or not steppers <= self._at | self._stalled:
            return []
        waiting = (self._stalled - self._at) & steppers
        # Who has an optimizer, and has not stepped although the others went on for its sake, does not step at all.
        idle = {rank for rank in waiting if not self._stepped(rank) and rank in self._round}
        if idle and steppers - idle and steppers - idle <= self._at:
            self.steppers -= idle
            steppers, waiting = steppers - idle, waiting - idle
        behind = steppers - waiting if waiting else self._behind(steppers)
        if not behind and not waiting:
            return [(None, "aligned", None)]
        if waiting and now < self._settled + CONFIRM:
            # It may have what it waited for from the one that has just arrived.
            self.wake = self._settled + CONFIRM
            return []
        if not behind:
            return [(None, "halt", "no rank makes progress")] if all_present(self._stalled) else []
        if self._rounds == ROUNDS:
            return [(None, "halt", "ranks wait for one another")]
        return self._another_round(steppers, waiting, behind)

    def _another_round(self, steppers: set[int], waiting: set[int], behind: set[int]) -> list[Verdict]:
        """Those that are behind go on, and those that wait for them stop as soon as that lets them."""
        self._rounds += 1
        self._round.update(dict.fromkeys(behind | waiting, self._rounds))
        # Those that wait cannot move before those that are behind do: by then they must know where to stop.
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
        most: dict[str, int] = {}
        for rank in steppers:
            for group, number in self._numbers[rank].items():
                most[group] = max(most.get(group, 0), number)
        return most

    def _behind(self, steppers: set[int]) -> set[int]:
        """Who has joined fewer of a group's collectives than another: hosts run ahead of devices, and do not wait."""
        most = self._most(steppers)
        return {
            rank
            for rank in steppers
            if any(number < most[group] for group, number in self._numbers[rank].items())
        }


def whole(value: Any) -> int:
    """The number, if that is what it is: it comes from another rank."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _whole_numbers(value: Any) -> dict[str, int]:
    return {str(group): whole(number) for group, number in value.items()}
