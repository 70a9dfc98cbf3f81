"""One rank of a simulated job: the real `Stop`, and models of its shell, its training thread and its device.

The thread steps in lock-step with the other ranks through one collective a step; a device is busy with a collective
until every participant has launched it, or until an abort.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any, Callable

from autoteardown.stop.protocol import Stop
from autoteardown.stop.types import Facts

if TYPE_CHECKING:
    from simulation import World

ONCE = frozenset(
    {
        "tell",
        "answer",
        "plan_now",
        "arrived",
        "halt",
        "yield_expired",
        "wedged",
        "callback_failed",
        "quiet",
        "left",
    }
)
POSTS = ONCE | {"at", "stalled", "ready", "saving"}
STILL = 0.5  # seconds without progress after which a thread that is blocked in C is said to wait
# Of the process: it crashes; freezes as by SIGSTOP; goes deaf: its line to the board is lost; a kernel that never ends
# (wedge); another thread saves (backup). Of the training thread, when it next begins a step: it waits in Python and
# joins nothing (loop), blocks in C, saves, ends.
FATES = ("crash", "freeze", "deaf", "wedge", "backup", "loop", "block", "save", "end")
BREAKABLE = ("drain", "abort", "destroy", "callbacks", "exit")  # drain raises, the others never return


@dataclass(frozen=True)
class Member:
    """What is particular about one rank."""

    signal: float | None = None  # when it gets one of its own
    role: str = "train"  # helper: in every collective, but never steps; idle: in none
    pace: float = 1.0  # how long its work takes, relative to the schedule's
    handler: bool = False  # the application has its own, and the agent yields to it
    fate: str = ""
    at: float = 0.0
    lasts: float = inf
    broken: frozenset[str] = frozenset()
    cannot: bool = False  # its steps are known to be too long to wait for
    offset: int = (
        0  # by how much its count of iterations is off: a step skipped long ago, an agent armed late
    )
    ignores: bool = False  # its handler only logs


class Rank:
    """One process."""

    def __init__(self, world: World, index: int, member: Member) -> None:
        self.world, self.index, self.member = world, index, member
        self.stop: Any = None  # the Stop, once there is a reason for it
        self.start = 0.0  # of the stop
        self.left_at = 0.0  # seconds after `start`
        self.cut_at = inf  # when it gave up a save
        self.alive = True
        self.left_by_itself = False
        self.delivered_at: int | None = None
        self.signalled = self.crashed = self.woken = False
        self.did: list[str] = []
        self.inbox, self.outbox = [0.0], [0.0]  # until when these lines are in use
        self._alarm = inf
        self._lost = self._saving = self._draining = False
        self._kernels: set[int] = set()
        self._accelerator = world.schedule.accelerator and member.role != "idle"
        # The training thread.
        self.completed = 0
        self._where = "python"  # or C, hook, parked, ended
        self._stalled = False
        self._until = 0
        self._joined = 0  # collectives
        self._nap = 0  # who comes to wake it must know which of its sleeps is meant
        self._awaits: int | None = None
        self._holding = self._closed = self._shielded = False
        self._last: int | None = None
        self._program = self._train()
        world.after(world.random.uniform(0, world.schedule.step), self._go, 0)
        if member.signal is not None:
            world.pending += 1
            world.after(member.signal, self._signal)
        if member.fate == "crash":
            world.after(member.at, self._vanish)
        if member.fate == "deaf":
            world.after(member.at, self._go_deaf)
        if member.fate == "backup":
            world.after(member.at, self._save, True)
            world.after(member.at + member.lasts, self._save, False)

    # -- the training thread ------------------------------------------------------------------------------------

    def _train(self) -> Iterator[tuple[str, float]]:
        """Each yield says where the thread is then, and for how long."""
        member, world = self.member, self.world
        work, fate = world.schedule.step * member.pace, member.fate
        for step in count():
            yield "python", work * world.random.uniform(0.3, 0.6)
            if fate in ("loop", "block", "save", "end") and world.now >= member.at:
                if fate == "end":
                    return
                if fate == "save":
                    self._shielded = True
                    self._save(True)
                yield ("python" if fate == "loop" else "C"), member.lasts
                if fate == "save":
                    self._shielded = False
                    self._save(False)
                    yield "python", 0.0
                fate = ""
            if member.role != "idle":
                if self._accelerator:
                    world.busy += not self._kernels
                    self._kernels.add(step)
                self._awaits = step - (world.schedule.ahead if self._accelerator else 0)
                self._joined += 1
                world.join(self, step)
                if self._awaits in self._kernels or not self._accelerator:
                    yield "C", inf
                self._awaits = None
            yield "python", work * world.random.uniform(0.2, 0.4)
            if member.role == "train":
                self.completed += 1
                there = self._last is None or (self.count >= self._last and self._joined >= self._until)
                if self._holding and (self._closed or there):
                    yield "hook", inf

    def _go(self, nap: int) -> None:
        if nap != self._nap or not self.alive or self._sleeps(self._go, nap):
            return
        self._nap += 1
        if self._closed and not self._shielded:
            self._where = "parked"
            self.event("parked", None)
            return
        where, seconds = next(self._program, ("ended", inf))
        if where == "ended":
            self.raises()
            return
        self._where = where
        self.world.after(seconds, self._go, self._nap)
        if where == "hook" and (self._closed or self._last is not None):
            self.event("stopped", self.count)
        self._look()

    @property
    def count(self) -> int:
        """Iterations completed, as far as this rank knows."""
        return max(0, self.completed + self.member.offset) if self.completed else 0

    def _look(self) -> None:
        """What the driver notices: whether this thread makes progress."""
        if self._stalled:
            self._stalled = False
            self.event("stalled", False)
        if self._where == "C" and self._holding:
            self.world.after(STILL, self._maybe_still, self._nap)

    def _maybe_still(self, nap: int) -> None:
        slow = self._awaits is None and self.member.lasts < inf  # in C, and seen to compute
        if nap == self._nap and self._where == "C" and not slow and not self._stalled and self.alive:
            self._stalled = True
            self.event("stalled", True)

    def raises(self) -> None:
        """The training thread ends."""
        if self._where not in ("ended", "parked"):
            self._nap += 1
            self._where = "ended"
            self.event("ended", None)

    def complete(self, step: int) -> None:
        """Everyone has joined that step's collective."""
        if self.member.fate == "wedge" and self.world.now >= self.member.at:
            return
        if step in self._kernels:
            self._kernels.remove(step)
            self.world.busy -= not self._kernels
            self._idle()
        if self._awaits == step and self._where == "C":
            self._go(self._nap)

    # -- the process --------------------------------------------------------------------------------------------

    def _sleeps(self, call: Callable[..., None], *args: Any) -> bool:
        """Whether the process is frozen; if so, the call is made when it wakes."""
        wakes = self.member.at + self.member.lasts
        if self.member.fate != "freeze" or not self.member.at <= self.world.now < wakes:
            return False
        self.world.pending += 1
        catch_up = 0.01 if call == self._tick else 0.0  # there are no ticks while there are events
        self.world.after(wakes - self.world.now + catch_up, self._wake, call, *args)
        return True

    def _wake(self, call: Callable[..., None], *args: Any) -> None:
        self.world.pending -= 1
        self.woken = True
        call(*args)

    def _save(self, value: bool) -> None:
        self._saving = value
        self.event("saving", value)

    def _go_deaf(self) -> None:
        self._lost = True
        self.event("down", "broken pipe")
        self.world.after(2.0, self.world.decide, self, "lost", False)

    def _signal(self, first: bool = True) -> None:
        self.world.pending -= first
        if self.alive and not self._sleeps(self._signal, False):
            self.signalled = True
            if self.stop is None:
                self._begin("signal", None)

    def hear(self, kind: str, value: Any, first: bool = True) -> None:
        """On the board's watcher thread."""
        self.world.pending -= first
        if self._lost or not self.alive or self._sleeps(self.hear, kind, value, False):
            return
        self._lost = kind == "down"
        if self.stop is not None:
            self.event(kind, value)
        elif kind == "notice":
            self._begin("peer", value)

    def _begin(self, cause: str, notice: Any) -> None:
        schedule = self.world.schedule
        self.world.pending += 1
        self.start = self.world.now
        facts = Facts(
            cause=cause,
            world=len(schedule.members),
            channel=schedule.board != "none",
            accelerator=self._accelerator,
            can_abort=self._accelerator,
            hub=self.index == schedule.host,
            step=schedule.stop_at_step,
            application_owns=self.member.handler,
            together=schedule.together,
        )
        self.stop = Stop(schedule.limits, facts)
        known = {
            "down": self._lost and "broken pipe",
            "saving": self._saving,
            "ended": self._where == "ended",
            "notice": notice,
        }
        for event in known:
            if known[event]:
                self.event(event, known[event])
        self.event("begin", None)

    def event(self, kind: str, value: Any) -> None:
        """To the machine, and what it wants done."""
        if not self.alive or self.stop is None or self._sleeps(self.event, kind, value):
            return
        # A clock that has struck does not show less than the time that was asked for.
        now = max(self.world.now - self.start, self.stop.wake if kind == "tick" else 0.0)
        for do, argument in self.stop.on(kind, value, now):
            self.did.append(do)
            if do in ("at", "stalled"):
                argument = (*argument, {"world": self._joined} if self._accelerator else {})
            if do in POSTS:
                self.world.send(self.outbox, self.world.receive, self, do, argument)
            else:
                getattr(self, "_do_" + do)(argument)
        if not self.alive:
            return
        if kind == "tick" and self.stop.wake <= now:
            self.world.spins.append(self)
        elif self.stop.wake != self._alarm:
            self._alarm = self.stop.wake
            self.world.after(max(0.0, self.start + self._alarm - self.world.now), self._tick, self._alarm)

    def _tick(self, alarm: float) -> None:
        if alarm == self._alarm and not self._sleeps(self._tick, alarm):
            self.event("tick", None)

    # -- what the machine wants done ----------------------------------------------------------------------------

    def _soon(self, call: Callable[..., None], *args: Any) -> None:
        self.world.after(self.world.random.uniform(0, 0.002), call, *args)

    def _do_hold(self, _: Any) -> None:
        self._holding = True
        self._soon(
            self.event, "steps", (self.count if self.member.role == "train" else None, self.member.cannot)
        )
        if self._where == "C":
            self.world.after(STILL, self._maybe_still, self._nap)

    def _do_stop_at(self, step: int) -> None:
        self._last = step
        if self._where == "hook" and self.count < step:
            self._soon(self._go, self._nap)
        elif self._where == "hook":
            self._soon(self.event, "stopped", self.count)

    def _do_advance(self, until: dict[str, int]) -> None:
        self._last, self._until = self.count + 1, until.get("world", 0)
        if self._where == "hook":
            self._soon(self._go, self._nap)
        elif self._where == "C":
            self.world.after(STILL, self._maybe_still, self._nap)

    def _do_deliver(self, _: Any) -> None:
        self.delivered_at = self.completed
        self._holding = False
        if self.member.handler and not self.member.ignores:
            self.world.after(self.world.random.uniform(0.01, 0.1), self._leave_by_itself)
        elif self._where == "hook":
            self._soon(self._go, self._nap)

    def _leave_by_itself(self) -> None:
        if self.alive and self.stop.state == "yield":
            self.world.send(self.outbox, self.world.receive, self, "left", None)
            self.left_by_itself = True
            self._exit()

    def _do_park(self, _: Any) -> None:
        self._closed = True
        if self._where == "python" and not self._shielded:
            self._soon(self._go, self._nap)
        elif self._where == "hook":
            self._soon(self.event, "parked", None)

    def _do_drain(self, _: Any) -> None:
        self._draining = True
        self._idle()

    def _idle(self) -> None:
        if self._draining and not self._kernels:
            self._draining = False
            failed = "drain" in self.member.broken
            self.did += [] if failed else ["drained"]
            self.world.after(0, self.event, "drained", "CUDA error" if failed else None)

    def _do_callbacks(self, _: Any) -> None:
        if "callbacks" not in self.member.broken:
            self._soon(self.event, "called", None)

    def _do_destroy(self, _: Any) -> None:
        self._release("destroy")
        if not self.world.schedule.accelerator:
            self._soon(self.event, "destroyed", None)
        elif "destroy" not in self.member.broken:
            self.world.destroy(self)

    def _do_abort(self, _: Any) -> None:
        if not self._kernels and "drain" not in self.member.broken:
            self._release("abort")
        if "abort" not in self.member.broken:
            self.world.after(0.05, self._aborted)

    def _aborted(self) -> None:
        if self.alive:
            self.world.busy -= bool(self._kernels)
            self._kernels.clear()
            self.event("aborted", None)

    def _do_stacks(self, _: Any) -> None:
        pass

    def _do_leave(self, soft: bool) -> None:
        if self._saving:
            self.cut_at = self.world.now - self.start
        if soft and "exit" not in self.member.broken:
            self.world.after(self.world.random.uniform(0, 0.1), self._exit)

    def _do_die(self, _: Any) -> None:
        self._exit()

    def _exit(self) -> None:
        if self.alive and not self._sleeps(self._exit):
            self._release("exit")
            self._gone()

    def _vanish(self) -> None:
        if self.alive:
            self.crashed = True
            self._gone()

    def _gone(self) -> None:
        self.alive = False
        self.left_at = self.world.now - self.start
        self.world.pending -= self.stop is not None
        self.world.busy -= bool(self._kernels)
        self.world.leave(self)
        self.world.after(self.world.random.uniform(0, 0.01), self.world.decide, self, "closed", None)
        if self.crashed:
            self.world.after(self.world.random.uniform(0.5, 2.5), self.world.decide, self, "lost", True)

    def _release(self, how: str) -> None:
        """From here on, a peer's kernel that touches this rank's memory is an error on the fabric."""
        if self._accelerator and self.world.busy > bool(self._kernels):
            self.world.unsafe.append((self, how, self.world.now - self.start))
