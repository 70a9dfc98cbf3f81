"""Decides for all ranks of a group together, as a pure state machine: messages of the ranks in, decisions out.

One coordinator for a group, in the process that is its hub (see `channel/`); `tests/simulation` runs it against many
ranks. Level-triggered, like `protocol.py`: a message that comes late, early or twice is never an error.

A rank posts:

- `tell` (a dict: which rank is being evicted, how many seconds it has `left`, and whether its machine gives it a
  `longer` time than the grace period), `answer` (`[completed or None,
  cannot, application_owns]`), `plan_now`;
- `at` (`[iteration, round, numbers]`), `stalled` (`[whether it waits without progress, round, numbers]`), `ready`
  (round: it knows where to stop); `numbers` are the sequence numbers of the groups' collectives where hosts run
  ahead of devices, else empty;
- `saving` (whether it saves), `callback_failed` (why: what the group saves is incomplete);
- `arrived` (its device is idle at the agreed iteration), `halt`, `yield_expired` (its application's time is over),
  `wedged`, `quiet` (whether clean), `left`.

Its connection adds `joined`, `lost` (whether it is known to be dead; again when that is known), `back`, `bye`,
`closed` (after `left`); the clock adds `tick`, when `wake` has come.

The ranks are told:

- `notice`; `plan` (`{"stop": iteration or None, "owned": bool, "why": words}`);
- `advance` (`{"round": n, "until": numbers}`: stop at the end of the next iteration that has reached these numbers),
  `aligned` (all are at the same iteration), `halt`, `busy` (whether any rank saves);
- `callback_failed` (`{"rank": rank, "why": words}`, the first one);
- `owners_done` (the ranks whose applications end by themselves have left), `abort` (the moment, by the hub's
  monotonic clock), `quiet` (whether clean);
- `departed` (the first rank that left), `lost` (a rank), `back` (a rank that was lost), `all_left` (all but the
  hub).
"""

from __future__ import annotations

from math import inf
from typing import Any, Optional

from autoteardown.stop.alignment import AlignmentCheck, whole
from autoteardown.stop.message_types import MOST

Messages = list[tuple[Optional[int], str, Any]]

LEAD = 0.15  # seconds from the decision to abort until all ranks do
ABSENT = 10.0  # seconds after the first rank by which every rank that can connect has done so


class Coordinator:
    """The coordinator of a group of `world` ranks; `hub` is the rank in whose process it runs."""

    def __init__(self, world: int, hub: int = 0) -> None:
        self._now = 0.0
        self.world = world
        self.hub = hub
        self.lost: set[int] = set()
        self._dead: set[int] = set()  # ranks whose processes are known to have ended
        self._left: set[int] = set()
        self._joined: set[int] = set()  # ranks that have ever connected
        self._since = inf  # when the first rank connected
        self._announced: dict[str, Any] = {}  # announced to all ranks
        self._answers: dict[int, tuple[Optional[int], bool, bool]] = {}
        # ranks whose applications end by themselves, as answered when the plan was made
        self._owners: set[int] = set()
        self._alignment = AlignmentCheck(set(), lambda rank: bool(self._answers[rank][0]))
        self._saving: set[int] = set()
        self._arrived: set[int] = set()
        self._over: set[int] = set()
        self._wedged: set[int] = set()
        self._quiet: dict[int, bool] = {}
        self._out: Messages = []

    @property
    def wake(self) -> float:
        """When the next `tick` is wanted: see `channel.coordinator.Coordinator`."""
        return self._alignment.wake

    def on(self, rank: int, kind: str, value: Any = None, now: float = 0.0) -> Messages:
        """Take in what a rank has posted, or what its connection says.

        A value that does not make sense is ignored: anyone with the group's token could send anything.

        Returns:
            Messages as `(rank, kind, value)`; rank None: to all ranks.
        """
        self._out, self._now = [], now
        hear = getattr(self, "_on_" + kind, None)
        if hear is not None and 0 <= rank < self.world:
            try:
                hear(rank, value)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                return self._out
            self._decide()
        return self._out

    # -- what is heard ------------------------------------------------------------------------------------------

    def _on_lost(self, rank: int, dead: Any) -> None:
        if rank not in self._left and rank not in self.lost:
            self.lost.add(rank)
            self._out.append((None, "lost", rank))
        if dead:
            self._dead.add(rank)

    def _on_bye(self, rank: int, _: Any) -> None:
        self._on_left(rank, None)  # its process group is destroyed, or its process is ending
        self._dead.add(rank)

    def _on_closed(self, rank: int, _: Any) -> None:
        self._dead.add(rank)

    def _on_joined(self, rank: int, _: Any) -> None:
        # For the first time, or as a new process: an elastic framework has made the group whole again.
        self._joined.add(rank)
        self._since = min(self._since, self._now)
        self._left.discard(rank)
        self._on_back(rank, None)

    def _on_back(self, rank: int, _: Any) -> None:
        if rank in self.lost:
            self.lost.discard(rank)
            self._out.append((None, "back", rank))
        self._dead.discard(rank)

    def _on_tick(self, rank: int, _: Any) -> None:
        self._alignment.wake = inf

    def _on_tell(self, rank: int, notice: Any) -> None:
        if "notice" not in self._announced and self._now >= self._since + ABSENT:
            # Dead before it connected, behind a firewall, or without an agent: it cannot answer. Decided only now: it
            # may be alive, and its peers must not be torn down because of it.
            self.lost |= set(range(self.world)) - self._joined
        self._announce("notice", notice if isinstance(notice, dict) else {})

    def _on_answer(self, rank: int, value: Any) -> None:
        completed, cannot, owner = value
        if completed is not None:
            completed = whole(completed)
        self._answers.setdefault(rank, (completed, bool(cannot), bool(owner)))

    def _on_plan_now(self, rank: int, _: Any) -> None:
        self._plan(None, "not every rank has answered")

    def _on_at(self, rank: int, value: Any) -> None:
        _, number, numbers = value
        self._alignment.at(rank, number, numbers, self._now)

    def _on_stalled(self, rank: int, value: Any) -> None:
        waits, number, numbers = value
        self._alignment.stalled(rank, bool(waits), number, numbers, self._now)

    def _on_ready(self, rank: int, number: Any) -> None:
        self._alignment.ready(rank, number)

    def _on_saving(self, rank: int, value: Any) -> None:
        before = bool(self._saving)
        (self._saving.add if value else self._saving.discard)(rank)
        if before != bool(self._saving):
            self._out.append((None, "busy", bool(value)))

    def _on_arrived(self, rank: int, _: Any) -> None:
        self._arrived.add(rank)

    def _on_halt(self, rank: int, _: Any) -> None:
        self._halt("a rank cannot get to the agreed iteration")

    def _on_yield_expired(self, rank: int, _: Any) -> None:
        self._over.add(rank)

    def _on_callback_failed(self, rank: int, why: Any) -> None:
        self._announce("callback_failed", {"rank": rank, "why": str(why)[:MOST]})

    def _on_wedged(self, rank: int, _: Any) -> None:
        self._wedged.add(rank)

    def _on_quiet(self, rank: int, clean: Any) -> None:
        self._quiet.setdefault(rank, bool(clean))

    def _on_left(self, rank: int, _: Any) -> None:
        if not self._left and "notice" in self._announced:
            self._announce("departed", rank)
        self._left.add(rank)

    # -- what is decided ----------------------------------------------------------------------------------------

    @property
    def _present(self) -> set[int]:
        return set(range(self.world)) - self._left - self.lost

    def _announce(self, kind: str, value: Any = None) -> None:
        """Tell all ranks, once."""
        if kind not in self._announced:
            self._announced[kind] = value
            self._out.append((None, kind, value))

    def _plan(self, stop: Optional[int], why: str = "") -> None:
        if "plan" not in self._announced:
            self._owners = {rank for rank, (_, _, owner) in self._answers.items() if owner}
            self._alignment.steppers = {
                rank for rank, (steps, _, _) in self._answers.items() if steps is not None
            }
            self._announce("plan", {"stop": stop, "owned": bool(self._owners), "why": why})

    def _halt(self, why: str) -> None:
        self._plan(None, why)
        self._announce("halt", why)

    def _decide(self) -> None:
        if "notice" not in self._announced:
            return
        # Counts first, sets only where the counts suffice: thousands of ranks post as many thousand messages.
        gone = len(self._left) + len(self.lost)
        if "plan" not in self._announced and len(self._answers) + gone >= self.world:
            self._agree()
        if self._announced.get("plan", {}).get("stop") is not None and not self._announced.keys() & {
            "aligned",
            "halt",
        }:
            self._check()
        if len(self._arrived) + gone >= len(self._alignment.steppers) < self.world and self._arrived:
            self._halt_helpers()
        if self._owners and not self._owners - self._left - self.lost - self._over:
            self._announce("owners_done")
        if self._wedged and len(self._wedged) + len(self._quiet) + gone >= self.world:
            self._abort()
        if self._quiet and len(self._quiet) + len(self._dead) >= self.world:
            self._all_quiet()
        if self._left and gone >= self.world - 1 and self._present <= {self.hub}:
            self._announce("all_left")

    def _halt_helpers(self) -> None:
        if self._alignment.steppers - self._left - self.lost <= self._arrived:
            self._announce("halt", "")  # ranks that never step need not wait any longer

    def _abort(self) -> None:
        if self._present <= self._wedged | self._quiet.keys():
            # A moment, not an order: the hub's own rank hears of it some 20 ms before the others on a busy machine.
            self._announce("abort", self._now + LEAD)

    def _all_quiet(self) -> None:
        # A device whose rank is only out of reach may still touch this one's memory: then the floor decides
        # (ai2cm/ace#1398).
        if "quiet" not in self._announced and set(range(self.world)) - self._dead <= self._quiet.keys():
            self._plan(None)  # for ranks that are told late, and wait for a plan that was never made
            self._announce("quiet", all(self._quiet.values()) and not self.lost)

    def _agree(self) -> None:
        if not self._present <= self._answers.keys():
            return
        answers = [self._answers[rank] for rank in sorted(self._present)]
        known = [completed for completed, _, _ in answers if completed is not None]
        if not known:
            self._plan(None)
        elif self.lost:
            rank = min(self.lost)
            self._plan(None, f"rank {rank} {'is lost' if rank in self._joined else 'has never connected'}")
        elif any(cannot for _, cannot, _ in answers):
            self._plan(None, "a rank will not step again in time")
        else:
            # At least the second: a rank in its first iteration does not know yet where the iteration ends.
            self._plan(max(max(known) + 1, 2))

    def _check(self) -> None:
        gone = self._left | self.lost
        for rank, kind, value in self._alignment.check(gone, lambda ranks: self._present <= ranks, self._now):
            if kind == "halt":
                self._halt(value)
            elif kind == "aligned":
                self._announce("aligned")
            else:
                self._out.append((rank, kind, value))
