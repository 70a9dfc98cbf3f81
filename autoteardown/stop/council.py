"""What the ranks of a group decide together, as a pure state machine: what each rank says in, who is told what out.

One council a group, in the process that is its hub (see `channel/`); `tests/simulation` runs it against many ranks.
Level-triggered, like `protocol.py`: a word that comes late, early or twice is never an error.

A rank says: `tell` (a dict: who is being evicted, and how long it has `left`), `answer` (`[completed or None, cannot,
owner]`), `plan_now`, `at` (`[iteration, round, numbers]`), `still` (`[whether it waits without progress, round,
numbers]`), `ready` (round: it knows where to stop), `saving` (whether it saves), `arrived` (its device is idle at the
agreed iteration), `halt`, `over` (the time of its application is), `wedged`, `quiet` (whether clean), `left`. Its
connection says: `joined`, `lost` (whether it is known to be dead; again when that is), `back`, `bye`, `closed` (after
`left`); the clock: `tick`, when `wake` has come. `numbers` are the sequence numbers of the groups' collectives where
hosts run ahead of devices, else empty.

It is told: `notice`, `plan` (`{"stop": iteration or None, "owned": bool, "why": words}`), `more` (`{"round": n,
"until": numbers}`: stop at the end of your next iteration that has got there), `even` (all are at the same one),
`halt`, `busy` (whether somebody saves), `rest` (those whose applications end by themselves are gone), `abort`, `quiet`
(whether clean), `departed` (the first that left), `lost` (a rank), `gone` (all but the hub).
"""

from __future__ import annotations

from math import inf
from typing import Any, Optional

Told = list[tuple[Optional[int], str, Any]]

CONFIRM = 0.5  # seconds for a rank to say that it does not wait any more, when another has arrived
ROUNDS = 2  # how often ranks that arrived go on for one iteration more


class Council:
    """Of a group with so many ranks; `hub` is the rank in whose process it is."""

    def __init__(self, world: int, hub: int = 0) -> None:
        self.wake = inf  # when to hear a `tick`
        self._now = 0.0
        self._settled = 0.0  # when it was last said that a rank waits, or does not, or has arrived
        self.world = world
        self.hub = hub
        self.lost: set[int] = set()
        self._dead: set[int] = set()  # who is known not to run any more
        self._left: set[int] = set()
        self._said: dict[str, Any] = {}  # to all
        self._answers: dict[int, tuple[Optional[int], bool, bool]] = {}
        self._owners: set[int] = (
            set()
        )  # of the ranks that had answered when the plan was made: who ends by itself
        self._steppers: set[int] = set()  # and who steps
        self._at: set[int] = set()
        self._numbers: dict[int, dict[str, int]] = {}
        self._round: dict[int, int] = {}  # what was said in an earlier one does not count any more
        self._still: set[int] = set()
        self._saving: set[int] = set()
        self._rounds = 0
        self._preparing: set[int] = set()  # who has yet to say that it is ready, before `_next` may go on
        self._next: dict[int, dict[str, Any]] = {}
        self._arrived: set[int] = set()
        self._over: set[int] = set()
        self._wedged: set[int] = set()
        self._quiet: dict[int, bool] = {}
        self._out: Told = []

    def on(self, rank: int, kind: str, value: Any = None, now: float = 0.0) -> Told:
        """Take in what a rank has said, or its connection; return who is to be told what. `None`: everybody.

        What does not make sense is not heard: whoever has the group's token could say anything.
        """
        self._out, self._now = [], now
        hear = getattr(self, "_hear_" + kind, None)
        if hear is not None and 0 <= rank < self.world:
            try:
                hear(rank, value)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                return self._out
            self._decide()
        return self._out

    # -- what is heard ------------------------------------------------------------------------------------------

    def _hear_lost(self, rank: int, dead: Any) -> None:
        if rank not in self._left and rank not in self.lost:
            self.lost.add(rank)
            self._out.append((None, "lost", rank))
        if dead:
            self._dead.add(rank)

    def _hear_bye(self, rank: int, _: Any) -> None:
        self._hear_left(rank, None)  # its process group is gone, or its process is at its end
        self._dead.add(rank)

    def _hear_closed(self, rank: int, _: Any) -> None:
        self._dead.add(rank)

    def _hear_joined(self, rank: int, _: Any) -> None:
        # For the first time, or in its next life: an elastic framework has made the group whole again.
        self._left.discard(rank)
        self._hear_back(rank, None)

    def _hear_back(self, rank: int, _: Any) -> None:
        self.lost.discard(rank)
        self._dead.discard(rank)

    def _hear_tick(self, rank: int, _: Any) -> None:
        self.wake = inf

    def _hear_tell(self, rank: int, notice: Any) -> None:
        self._tell("notice", notice if isinstance(notice, dict) else {})

    def _hear_answer(self, rank: int, value: Any) -> None:
        completed, cannot, owner = value
        if completed is not None:
            completed = _whole(completed)
        self._answers.setdefault(rank, (completed, bool(cannot), bool(owner)))

    def _hear_plan_now(self, rank: int, _: Any) -> None:
        self._plan(None, "not every rank has answered")

    def _hear_at(self, rank: int, value: Any) -> None:
        _, number, numbers = value
        if number == self._round.get(rank, 0):
            self._settled = self._now
            self._still.discard(rank)
            self._at.add(rank)
            self._numbers[rank] = _numbers(numbers)

    def _hear_still(self, rank: int, value: Any) -> None:
        still, number, numbers = value
        if number == self._round.get(rank, 0):
            self._settled = self._now
            (self._still.add if still else self._still.discard)(rank)
            self._numbers[rank] = _numbers(numbers)

    def _hear_ready(self, rank: int, number: Any) -> None:
        if number == self._round.get(rank, 0):
            self._preparing.discard(rank)

    def _hear_saving(self, rank: int, value: Any) -> None:
        before = bool(self._saving)
        (self._saving.add if value else self._saving.discard)(rank)
        if before != bool(self._saving):
            self._out.append((None, "busy", bool(value)))

    def _hear_arrived(self, rank: int, _: Any) -> None:
        self._arrived.add(rank)

    def _hear_halt(self, rank: int, _: Any) -> None:
        self._halt("a rank cannot get to the agreed iteration")

    def _hear_over(self, rank: int, _: Any) -> None:
        self._over.add(rank)

    def _hear_wedged(self, rank: int, _: Any) -> None:
        self._wedged.add(rank)

    def _hear_quiet(self, rank: int, clean: Any) -> None:
        self._quiet.setdefault(rank, bool(clean))

    def _hear_left(self, rank: int, _: Any) -> None:
        if not self._left and "notice" in self._said:
            self._tell("departed", rank)
        self._left.add(rank)

    # -- what is decided ----------------------------------------------------------------------------------------

    @property
    def _present(self) -> set[int]:
        return set(range(self.world)) - self._left - self.lost

    def _tell(self, kind: str, value: Any = None) -> None:
        """Everybody, and once."""
        if kind not in self._said:
            self._said[kind] = value
            self._out.append((None, kind, value))

    def _plan(self, stop: Optional[int], why: str = "") -> None:
        if "plan" not in self._said:
            self._owners = {rank for rank, (_, _, owner) in self._answers.items() if owner}
            self._steppers = {rank for rank, (steps, _, _) in self._answers.items() if steps is not None}
            self._tell("plan", {"stop": stop, "owned": bool(self._owners), "why": why})

    def _halt(self, why: str) -> None:
        self._plan(None, why)
        self._tell("halt", why)

    def _decide(self) -> None:
        if "notice" not in self._said:
            return
        # Counts first, sets only where those suffice: thousands of ranks say as many thousand words.
        gone = len(self._left) + len(self.lost)
        if "plan" not in self._said and len(self._answers) + gone >= self.world:
            self._agree()
        if self._next or len(self._at) + len(self._still) + gone >= len(self._steppers):
            self._check()
        if len(self._arrived) + gone >= len(self._steppers) < self.world and self._arrived:
            self._halt_helpers()
        if self._owners and not self._owners - self._left - self.lost - self._over:
            self._tell("rest")
        if self._wedged and len(self._wedged) + len(self._quiet) + gone >= self.world:
            self._abort()
        if self._quiet and len(self._quiet) + len(self._dead) >= self.world:
            self._all_quiet()
        if self._left and gone >= self.world - 1 and self._present <= {self.hub}:
            self._tell("gone")

    def _halt_helpers(self) -> None:
        if self._steppers - self._left - self.lost <= self._arrived:
            self._tell("halt", "")  # ranks that never step need not wait any longer

    def _abort(self) -> None:
        if self._present <= self._wedged | self._quiet.keys():
            self._tell("abort")

    def _all_quiet(self) -> None:
        # A device whose rank is only out of reach may still touch this one's memory: that takes the floor (F9).
        if "quiet" not in self._said and set(range(self.world)) - self._dead <= self._quiet.keys():
            self._plan(None)  # for ranks that hear us late, and wait for what nobody decided
            self._tell("quiet", all(self._quiet.values()) and not self.lost)

    def _agree(self) -> None:
        if not self._present <= self._answers.keys():
            return
        answers = [self._answers[rank] for rank in sorted(self._present)]
        known = [completed for completed, _, _ in answers if completed is not None]
        if not known:
            self._plan(None)
        elif self.lost:
            self._plan(None, f"rank {min(self.lost)} is lost")
        elif any(cannot for _, cannot, _ in answers):
            self._plan(None, "a rank will not step again in time")
        else:
            # At least the second: a rank in its first iteration does not know yet where that ends.
            self._plan(max(max(known) + 1, 2))

    def _check(self) -> None:
        """The agreement is checked, not believed: no count is beyond doubt (a step skipped on one rank long ago)."""
        if self._said.get("plan", {}).get("stop") is None or self._said.keys() & {"even", "halt"}:
            return
        steppers = self._steppers - self._left - self.lost
        if self._next:
            if not self._preparing & steppers:
                self._out += [(rank, "more", more) for rank, more in self._next.items()]
                self._next = {}
            return
        if not steppers or not steppers <= self._at | self._still:
            return
        waiting = (self._still - self._at) & steppers
        # Who has an optimizer, and has not stepped although the others went on for its sake, does not step at all.
        idle = {rank for rank in waiting if not self._answers[rank][0] and rank in self._round}
        if idle and steppers - idle and steppers - idle <= self._at:
            self._steppers -= idle
            steppers, waiting = steppers - idle, waiting - idle
        behind = steppers - waiting if waiting else self._behind(steppers)
        if not behind and not waiting:
            self._tell("even")
        elif waiting and self._now < self._settled + CONFIRM:
            self.wake = (
                self._settled + CONFIRM
            )  # it may have what it waited for from the one that has just arrived
        elif not behind:
            if self._present <= self._still:
                self._halt("no rank makes progress")
        elif self._rounds == ROUNDS:
            self._halt("ranks wait for one another")
        else:
            self._another_round(steppers, waiting, behind)

    def _another_round(self, steppers: set[int], waiting: set[int], behind: set[int]) -> None:
        """Those that are behind go on, and those that wait for them stop as soon as that lets them."""
        self._rounds += 1
        self._round.update(dict.fromkeys(behind | waiting, self._rounds))
        # Those that wait cannot move before those that are behind do: by then they must know where to stop.
        self._preparing = waiting
        self._out += [(rank, "more", {"round": self._rounds, "until": {}}) for rank in sorted(waiting)]
        until = self._most(steppers)
        self._next = {rank: {"round": self._rounds, "until": until} for rank in sorted(behind)}
        self._at -= behind
        self._still -= waiting
        self._check()

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
            r for r in steppers if any(number < most[group] for group, number in self._numbers[r].items())
        }


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _numbers(value: Any) -> dict[str, int]:
    return {str(group): _whole(number) for group, number in value.items()}
