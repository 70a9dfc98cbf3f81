"""The stops of many ranks against one another, in simulated time.

Every rank is a real `Stop` with models of what it works on around it (see `simulated_rank.py`). `Schedule` says what
happens to the job; the same schedule always runs the same way.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from itertools import count
from math import inf
from random import Random
from typing import Any, Callable

from simulated_rank import Member, Rank

from autoteardown.stop.terms import Limits

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
    host: int | None = 0  # the rank that hosts the store
    stop_at_step: bool = True


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
        self._said: set[str] = set()
        self._posts: Counter[str] = Counter()
        self._answers: list[int | None] = []
        self._steppers = 0
        self._clean = True
        self._heap: list[Any] = []
        self._order = count()
        self.ranks = [Rank(self, index, member) for index, member in enumerate(schedule.members)]
        if schedule.board == "lost":
            self.after(schedule.board_at, self.publish, "lost", "connection reset by peer")

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

    def publish(self, kind: str, value: Any) -> None:
        """First writer wins."""
        if kind not in self._said and self.schedule.board != "none":
            self._said.add(kind)
            for rank in self.ranks:
                self.send(rank.inbox, rank.hear, kind, value)

    def receive(self, rank: Rank, do: str, value: Any) -> None:
        self.pending -= 1
        schedule, size = self.schedule, len(self.ranks)
        if "lost" in self._said or (schedule.board == "silent" and self.now >= schedule.board_at):
            return
        if rank.crashed or rank.stop.forced:  # it did not get as far as sending it
            return
        self._posts[do] += not (do == "left" and rank.index == schedule.host)
        if do == "tell":
            self.publish("notice", {"left": value})
        elif do == "answer":
            completed, cannot = value
            self._answers.append(-1 if cannot else completed)
            if len(self._answers) == size:
                known = [step for step in self._answers if step is not None]
                self._steppers = len(known)
                self.publish("plan", None if not known or -1 in known else max(known) + 1)
        elif do in ("plan_now", "halt"):
            self.publish("plan", None)
            if do == "halt":
                self.publish("halt", None)
        elif do == "arrived" and self._posts[do] == self._steppers < size:
            self.publish("halt", None)
        elif do == "quiet":
            self._clean = self._clean and value
            if self._posts[do] == size:
                self.publish("quiet", self._clean)
        elif do == "left" and self._posts[do] == size - (schedule.host is not None):
            self.publish("gone", None)

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
        """A process is gone, and its sockets with it."""
        if rank.index == self.schedule.host:
            self.publish("lost", "connection reset by peer")
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
