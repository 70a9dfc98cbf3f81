"""The stops of many ranks against one another, in simulated time.

Every rank is a real `Stop` with models of what it works on around it (see `simulated_rank.py`). `Schedule` says what
happens to the job; the same schedule always runs the same way.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import count
from math import inf
from random import Random
from typing import Any, Callable

from simulated_rank import Member, Rank

from autoteardown.stop.coordinator import Coordinator
from autoteardown.stop.message_types import understood
from autoteardown.stop.types import Limits

DEFAULT = Limits()


@dataclass(frozen=True)
class Schedule:
    """A job, and what happens to it."""

    members: tuple[Member, ...]
    seed: int = 0
    limits: Limits = DEFAULT
    accelerator: bool = True  # else gloo
    ahead: int = 0  # steps that a host may be ahead of its device
    step: float = 0.2  # seconds
    delay: float = 0.002  # longest of a message, in seconds
    board: str = "ok"  # none; or from `board_at` on: lost, silent
    board_at: float = 0.0
    host: int = 0  # the rank whose process is the hub
    stop_at_step: bool = True
    together: bool = True  # the applications' handlers act at the same iteration


class World:
    """All ranks of a job, their clock, their board and their network."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.random = Random(schedule.seed)
        self.now = 0.0
        self.pending = 0  # signals, messages and stops that are under way: the run ends with the last
        self.busy = 0  # devices with a kernel in flight
        self.unsafe: list[tuple[Rank, str, float]] = []  # releases under another rank's kernels
        self.spins: list[Rank] = []  # ranks that ask to be woken at a time that has passed
        self.collectives: dict[int, dict[Rank, None]] = {}  # the incomplete ones, and who has joined
        self.participants = sum(member.role != "idle" for member in schedule.members)
        self.gone: list[Rank] = []
        self._destroying: set[Rank] = set()
        self._down = False
        self._alarm = inf  # of the coordinator
        self.coordinator = Coordinator(len(schedule.members), schedule.host)
        self._heap: list[Any] = []
        self._order = count()
        self.ranks = [Rank(self, index, member) for index, member in enumerate(schedule.members)]
        if schedule.board == "lost":
            self.after(schedule.board_at, self._drop)

    def run(self) -> World:
        while self._heap and self.pending:
            self.now, _, call, args = heapq.heappop(self._heap)
            call(*args)
        return self

    def after(self, delay: float, call: Callable[..., object], *args: Any) -> None:
        if delay < inf:
            heapq.heappush(self._heap, (self.now + delay, next(self._order), call, args))

    # -- the board ----------------------------------------------------------------------------------------------

    def send(self, line: list[float], call: Callable[..., object], *args: Any) -> None:
        """Messages on one line do not overtake one another."""
        line[0] = max(line[0], self.now + self.random.uniform(0, self.schedule.delay))
        self.pending += 1
        self.after(line[0] - self.now, call, *args)

    def _drop(self) -> None:
        """The hub has ended, or no rank can reach it."""
        if not self._down and self.schedule.board != "none":
            self._down = True
            for rank in self.ranks:
                self.send(rank.inbox, rank.hear, "down", "connection reset by peer")

    def receive(self, rank: Rank, do: str, value: Any) -> None:
        self.pending -= 1
        if not rank.crashed and not (
            rank.stop.forced and not rank.left_by_itself
        ):  # it got as far as sending it
            self.decide(rank, do, value)

    def decide(self, rank: Rank, kind: str, value: Any) -> None:
        """What comes of it at the hub."""
        schedule = self.schedule
        silent = schedule.board == "silent" and self.now >= schedule.board_at
        if self._down or silent or schedule.board == "none":
            return
        for to, what, about in self.coordinator.on(rank.index, kind, value, self.now):
            assert understood(what, about), (what, about)
            for each in self.ranks if to is None else [self.ranks[to]]:
                self.send(each.inbox, each.hear, what, about)
        if self.coordinator.wake not in (inf, self._alarm):
            self._alarm = self.coordinator.wake
            self.after(self._alarm - self.now, self._tick, rank)

    def _tick(self, rank: Rank) -> None:
        self._alarm = inf
        self.decide(rank, "tick", None)

    # -- the network --------------------------------------------------------------------------------------------

    def join(self, rank: Rank, step: int) -> None:
        joined = self.collectives.setdefault(step, {})
        joined[rank] = None
        if len(joined) == self.participants:
            self.after(0.001, self._complete, step)
        elif not self.schedule.accelerator and any(gone not in joined for gone in self.gone):
            self.after(0.001, rank.raises)

    def _complete(self, step: int) -> None:
        for rank in self.collectives.pop(step):
            rank.complete(step)

    def leave(self, rank: Rank) -> None:
        """A process has ended, and the kernel has closed its sockets."""
        if rank.index == self.schedule.host:
            self._drop()
        if rank.member.role != "idle":
            self.gone.append(rank)
            if not self.schedule.accelerator:
                for step in [step for step, joined in self.collectives.items() if rank not in joined]:
                    for peer in self.collectives.pop(step):
                        self.after(0.001, peer.raises)
        self.destroy(rank)

    def destroy(self, rank: Rank) -> None:
        """A collective: it returns when everyone is in it, or gone."""
        last = rank not in self._destroying and len(self._destroying) == len(self.ranks) - 1
        self._destroying.add(rank)
        for each in self._destroying if last else ():
            self.after(0.001, each.event, "destroyed", None)
