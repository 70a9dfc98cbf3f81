"""The stops of many ranks against one another, in simulated time.

A rank is the real `Stop`, and around it models of what it works on: a training thread that steps in lock-step with
the others through collectives, a device whose kernels end only when every participant has launched them, and a board
whose messages take time. `Schedule` says what happens; the same schedule always runs the same way.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from itertools import count
from math import inf
from random import Random
from typing import Any

from autoteardown.protocol import Facts, Limits, Stop

DEFAULT = Limits()


@dataclass(frozen=True)
class Member:
    """What is particular about one rank."""

    signal: float | None = None  # when it gets one of its own
    role: str = "train"  # helper: in every collective, but never steps; idle: in none
    pace: float = 1.0  # seconds that its work takes, relative to the schedule's
    handler: bool = False  # the application has its own: the agent yields to it first
    # crash; freeze: as by SIGSTOP; wedge: a kernel that never ends; backup: another thread saves; or the training thread
    # comes to loop: waits in Python, joins nothing; block: in C; save; end.
    fate: str = ""
    at: float = 0.0
    lasts: float = inf
    broken: frozenset[str] = frozenset()  # drain raises; abort, destroy, callbacks, exit never return
    cannot: bool = False  # its steps are known to be too long to wait for


@dataclass(frozen=True)
class Schedule:
    """A job, and what happens to it."""

    members: tuple[Member, ...]
    seed: int = 0
    limits: Limits = DEFAULT
    accelerator: bool = True
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
        self.pending = 0  # signals, messages and stops that are still under way
        self.busy = 0  # devices with a kernel in flight
        self.unsafe: list[tuple[Rank, str, float]] = []  # releases under another's running kernels
        self.spins: list[Rank] = []
        self.posts: Counter[str] = Counter()
        self.said: set[str] = set()
        self.answers: list[int | None] = []
        self.steppers = 0
        self.clean = True
        self.gone: list[Rank] = []
        self.destroying: set[Rank] = set()
        self.collectives: dict[int, dict[Rank, None]] = {}  # the incomplete ones, and who has joined
        self._heap: list[Any] = []
        self._order = count()
        self.participants = sum(member.role != "idle" for member in schedule.members)
        self.ranks = [Rank(self, index, member) for index, member in enumerate(schedule.members)]
        if schedule.board == "lost":
            self.at(schedule.board_at, self.publish, "lost", "connection reset by peer")

    def run(self) -> World:
        while self._heap and self.pending:
            self.now, _, call, args = heapq.heappop(self._heap)
            call(*args)
        return self

    def at(self, delay: float, call: Any, *args: Any) -> None:
        if delay < inf:
            heapq.heappush(self._heap, (self.now + delay, next(self._order), call, args))

    # -- the board ----------------------------------------------------------------------------------------------

    def receive(self, rank: Rank, do: str, value: Any) -> None:
        self.pending -= 1
        schedule, size = self.schedule, len(self.ranks)
        if "lost" in self.said or (schedule.board == "silent" and self.now >= schedule.board_at):
            return
        if rank.crashed or rank.stop.forced:  # it did not get as far as sending it
            return
        self.posts[do] += 1
        if do == "tell":
            self.publish("notice", {"left": value})
        elif do in ("plan_now", "halt"):
            self.publish("plan", None)
            if do == "halt":
                self.publish("halt", None)
        elif do == "answer":
            completed, cannot = value
            self.answers.append(-1 if cannot else completed)
            if len(self.answers) == size:
                known = [step for step in self.answers if step is not None]
                self.steppers = len(known)
                self.publish("plan", None if not known or -1 in known else max(known) + 1)
        elif do == "arrived":
            if self.posts[do] == self.steppers < size:  # else nobody waits for it
                self.publish("halt", None)
        elif do == "quiet":
            self.clean = self.clean and value
            if self.posts[do] == size:
                self.publish("quiet", self.clean)
        elif do == "left" and rank.index == schedule.host:
            self.posts[do] -= 1  # it waits for the others
        elif do == "left" and self.posts[do] == size - (schedule.host is not None):
            self.publish("gone", None)

    def publish(self, kind: str, value: Any) -> None:
        """First writer wins."""
        if kind not in self.said and self.schedule.board != "none":
            self.said.add(kind)
            for rank in self.ranks:
                self.send(rank.inbox, rank.hear, kind, value)

    def send(self, line: list[float], call: Any, *args: Any) -> None:
        """Messages of one line do not overtake one another."""
        line[0] = max(line[0], self.now + self.random.uniform(0, self.schedule.delay))
        self.pending += 1
        self.at(line[0] - self.now, call, *args)

    # -- the network --------------------------------------------------------------------------------------------

    def join(self, rank: Rank, step: int) -> None:
        joined = self.collectives.setdefault(step, {})
        joined[rank] = None
        if len(joined) == self.participants:
            self.at(0.001, self.complete, step)
        elif not self.schedule.accelerator and any(gone not in joined for gone in self.gone):
            self.at(0.001, rank.end)

    def complete(self, step: int) -> None:
        for rank in self.collectives.pop(step):
            rank.complete(step)

    def leave(self, rank: Rank) -> None:
        """A process is gone, and its sockets with it."""
        if rank.member.role != "idle":
            self.gone.append(rank)
        if rank.index == self.schedule.host:
            self.publish("lost", "connection reset by peer")
        if not self.schedule.accelerator:  # with gloo, those who wait for it see it go
            for joined in self.collectives.values():
                for peer in joined if rank not in joined else ():
                    self.at(0.001, peer.end)
        self.destroy(rank)

    def destroy(self, rank: Rank) -> None:
        """It is collective: it returns when everyone is in it, or gone."""
        last = rank not in self.destroying and len(self.destroying) == len(self.ranks) - 1
        self.destroying.add(rank)
        if last:
            for each in self.destroying:
                self.at(0.001, each.event, "destroyed", None)


class Rank:
    """One process: the machine, its shell, its training thread and its device."""

    def __init__(self, world: World, index: int, member: Member) -> None:
        self.world = world
        self.index = index
        self.member = member
        self.stop: Any = None  # the Stop, once there is a reason
        self.start = self.left_at = 0.0
        self.signalled = self.crashed = self.late = False
        self.alive = True
        self.code: int | None = None
        self.inbox, self.outbox = [0.0], [0.0]
        self.alarm = inf
        self.did: list[str] = []
        self.kernels: set[int] = set()
        self.draining = self.lost = self.saving = False
        # The training thread.
        self.completed = 0
        self.where = "python"  # or C, hook, parked, ended
        self.nap = 0  # whoever comes to wake it has to know which of its sleeps is meant
        self.awaits: int | None = None
        self.holding = self.closed = self.shielded = False
        self.last: int | None = None
        self.program = self.train()
        world.at(world.random.uniform(0, world.schedule.step), self.go, 0)
        if member.signal is not None:
            world.pending += 1
            world.at(member.signal, self.signal)
        if member.fate == "crash":
            world.at(member.at, self.vanish)
        if member.fate == "backup":
            world.at(member.at, self.save, True)
            world.at(member.at + member.lasts, self.save, False)

    # -- the training thread ------------------------------------------------------------------------------------

    def train(self) -> Any:
        """Each yield says where the thread is then, and for how long."""
        member, world = self.member, self.world
        work, fate = world.schedule.step * member.pace, member.fate
        for step in count():
            yield "python", work * world.random.uniform(0.3, 0.6)
            if world.now >= member.at and fate in ("loop", "block", "save", "end"):
                if fate == "end":
                    break
                if fate == "save":
                    self.shielded = True
                    self.save(True)
                yield ("python" if fate == "loop" else "C"), member.lasts
                if fate == "save":
                    self.shielded = False
                    self.save(False)
                    yield "python", 0.0
                fate = ""
            if member.role != "idle":
                if world.schedule.accelerator:
                    world.busy += not self.kernels
                    self.kernels.add(step)
                self.awaits = step - world.schedule.ahead * world.schedule.accelerator
                world.join(self, step)
                if self.awaits in self.kernels or not world.schedule.accelerator:
                    yield "C", inf
                self.awaits = None
            yield "python", work * world.random.uniform(0.2, 0.4)
            if member.role == "train":
                self.completed += 1
                if self.holding and (self.closed or self.last is None or self.completed >= self.last):
                    yield "hook", inf

    def go(self, nap: int) -> None:
        if nap != self.nap or not self.alive or self.sleeps(self.go, nap):
            return
        self.nap += 1
        if self.closed and not self.shielded:
            self.where = "parked"
            return self.event("parked", None)
        where, seconds = next(self.program, ("ended", inf))
        if where == "ended":
            return self.end()
        self.where = where
        self.world.at(seconds, self.go, self.nap)
        if where == "hook" and (self.closed or self.last is not None):
            self.event("stopped", self.completed)

    def end(self) -> None:
        if self.where not in ("ended", "parked"):
            self.nap += 1
            self.where = "ended"
            self.event("ended", None)

    def save(self, value: bool) -> None:
        self.saving = value
        self.event("saving", value)

    def complete(self, step: int) -> None:
        if self.member.fate == "wedge" and self.world.now >= self.member.at:
            return
        if step in self.kernels:
            self.kernels.remove(step)
            self.world.busy -= not self.kernels
            self.drained()
        if self.awaits == step and self.where == "C":
            self.go(self.nap)

    # -- the process --------------------------------------------------------------------------------------------

    def sleeps(self, call: Any, *args: Any) -> bool:
        """Whether the process is frozen: then it does so when it wakes."""
        wakes = self.member.at + self.member.lasts
        if self.member.fate != "freeze" or not self.member.at <= self.world.now < wakes:
            return False
        self.world.pending += 1
        self.world.at(wakes - self.world.now, self.catch_up, call, *args)
        return True

    def catch_up(self, call: Any, *args: Any) -> None:
        self.world.pending -= 1
        self.late = True
        call(*args)

    def signal(self, first: bool = True) -> None:
        self.world.pending -= first
        if self.alive and not self.sleeps(self.signal, False):
            self.signalled = True
            self.event("signal", None) if self.stop else self.begin("signal", None)

    def hear(self, kind: str, value: Any, first: bool = True) -> None:
        self.world.pending -= first
        if not self.alive or self.sleeps(self.hear, kind, value, False):
            return
        self.lost = self.lost or kind == "lost"
        if self.stop:
            self.event(kind, value)
        elif kind == "notice":
            self.begin("peer", value)

    def begin(self, cause: str, notice: Any) -> None:
        schedule = self.world.schedule
        self.world.pending += 1
        self.start = self.world.now
        facts = Facts(
            cause=cause,
            world=len(schedule.members),
            board=schedule.board != "none",
            accelerator=schedule.accelerator,
            can_abort=schedule.accelerator,
            hosts_store=self.index == schedule.host,
            step=schedule.stop_at_step,
        )
        self.stop = Stop(schedule.limits._replace(yield_=schedule.limits.yield_ * self.member.handler), facts)
        for known, event in ((self.lost, "lost"), (self.saving, "saving"), (self.where == "ended", "ended")):
            if known:
                self.event(event, True)
        if notice:
            self.event("notice", notice)
        self.event("begin", None)

    def event(self, kind: str, value: Any) -> None:
        if not self.alive or self.stop is None or self.sleeps(self.event, kind, value):
            return
        # A clock is read again when it has struck: not before the time that was asked for.
        now = max(self.world.now - self.start, self.stop.wake if kind == "tick" else 0.0)
        for do, argument in self.stop.on(kind, value, now):
            self.did.append(do)
            act = getattr(self, "do_" + do, None)
            act(argument) if act else self.world.send(self.outbox, self.world.receive, self, do, argument)
        if kind == "tick" and self.alive and self.stop.wake <= now:
            self.world.spins.append(self)
        elif self.stop.wake != self.alarm:
            self.alarm = self.stop.wake
            self.world.at(self.start + self.alarm - self.world.now, self.tick, self.alarm)

    def tick(self, alarm: float) -> None:
        if alarm == self.alarm and not self.sleeps(self.tick, alarm):
            self.event("tick", None)

    # -- what the machine wants done ----------------------------------------------------------------------------

    def soon(self, kind: str, value: Any = None) -> None:
        self.world.at(self.world.random.uniform(0, 0.002), self.event, kind, value)

    def do_hold(self, _: Any) -> None:
        self.holding = True
        self.soon("steps", (self.completed or None, self.member.cannot))

    def do_stop_at(self, step: int) -> None:
        self.last = step
        if self.where == "hook" and self.completed < step:
            self.world.at(0.0, self.go, self.nap)
        elif self.where == "hook":
            self.soon("stopped", self.completed)

    def do_park(self, _: Any) -> None:
        self.closed = True
        if self.where == "python" and not self.shielded:
            self.world.at(self.world.random.uniform(0, 0.002), self.go, self.nap)
        elif self.where == "hook":
            self.soon("parked")

    def do_drain(self, _: Any) -> None:
        self.draining = True
        self.drained()

    def drained(self) -> None:
        if self.draining and not self.kernels:
            self.draining = False
            self.did.append("drained")
            self.soon("drained", "CUDA error" if "drain" in self.member.broken else None)

    def do_callbacks(self, _: Any) -> None:
        if "callbacks" not in self.member.broken:
            self.soon("called")

    def do_destroy(self, _: Any) -> None:
        self.release("destroy")
        if not self.world.schedule.accelerator:
            self.soon("destroyed")
        elif "destroy" not in self.member.broken:
            self.world.destroy(self)

    def do_abort(self, _: Any) -> None:
        if not self.kernels and "drain" not in self.member.broken:
            self.release("abort")  # frees what a peer's kernel may still poll
        if "abort" not in self.member.broken:
            self.world.at(0.05, self.aborted)

    def aborted(self) -> None:
        self.world.busy -= bool(self.kernels)
        self.kernels.clear()
        self.event("aborted", None)

    def do_stacks(self, _: Any) -> None:
        pass

    def do_leave(self, code: Any) -> None:
        if "exit" not in self.member.broken:
            self.world.at(self.world.random.uniform(0, 0.1), self.exit)

    def do_die(self, code: Any) -> None:
        self.exit()

    def exit(self) -> None:
        if self.alive and not self.sleeps(self.exit):
            self.release("exit")
            self.gone()

    def vanish(self) -> None:
        """Ended from outside, without a word."""
        if self.alive:
            self.crashed = True
            self.gone()

    def gone(self) -> None:
        self.alive = False
        self.left_at = self.world.now - self.start
        self.world.pending -= self.stop is not None
        self.world.busy -= bool(self.kernels)
        self.world.leave(self)

    def release(self, what: str) -> None:
        """From here on a peer's kernel that touches this rank's memory is an error on the fabric."""
        if self.world.busy > bool(self.kernels):
            self.world.unsafe.append((self, what, self.world.now - self.start))
