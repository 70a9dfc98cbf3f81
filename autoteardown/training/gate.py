"""Stops the program's own threads: at the end of an iteration, in the agent's signal handler, or at the end of a save.

1. `parking.py` has what a stopped thread does, and how it exits.
2. Everything here runs on threads of the program, on the hot path or between any two bytecodes. So there is no lock
   that another, frozen thread may hold, and nothing is raised but the SystemExit with which a parked thread exits.
"""

from __future__ import annotations

import os
from collections.abc import Sized
from typing import Any, Callable, Optional

from autoteardown import thread_stacks
from autoteardown.checkpoints import in_progress
from autoteardown.fail_open import fail_open
from autoteardown.training.handler_delivery import HandlerDelivery
from autoteardown.training.iterations import IterationCounter
from autoteardown.training.launch_history import Counters, LaunchHistory
from autoteardown.training.parking import Parking, ThreadWaits
from autoteardown.training.step_times import StepTimes
from autoteardown.training.thread import TrainingThread
from autoteardown.unpatched import get_ident, monotonic


class Gate:
    """The threads of one armed process, and whether they may run on.

    The hold flag and the iteration count make the agreement on an iteration safe without a lock: the hook counts
    first and reads the flag afterwards; the guard sets the flag first and reads the count afterwards. So an
    iteration that the guard has not counted finds the flag set, and its thread waits until the last iteration is
    known.

    Args:
        tell: called with an event and its value, between any two bytecodes (`SimpleQueue.put` is safe there).
        numbers: returns the sequence numbers of the groups' collectives.
        devices: returns the calling thread's current device of each kind.
        launch_counters: returns functions that count launched collectives, by group (none where no other thread can
            have any to launch), and torch's table of groups.
    """

    def __init__(
        self,
        tell: Callable[[tuple[str, Any]], None],
        numbers: Callable[[], dict[str, int]] = dict,
        devices: Callable[[], dict[str, int]] = dict,
        launch_counters: Callable[[], tuple[Counters, Sized]] = lambda: ({}, ()),
    ) -> None:
        self.clock = IterationCounter()
        self.polls = 0  # calls of `stop_requested()`: they count the iterations of a program that polls
        self.step_times = StepTimes()
        self.waits = ThreadWaits()
        self.parking = Parking(self.waits, tell)
        self.devices: dict[str, int] = {}  # the current devices of the training thread when it stopped
        self.training = TrainingThread()
        # Never held, resumed or closed: all that a poll in a healthy program looks at.
        self.calm = True
        self.holding = False
        self.closed = False
        self.requested = False  # what `stop_requested()` returns
        self.held: set[int] = set()  # threads that wait at the end of an iteration
        self.delivery = HandlerDelivery(self.waits.wake)
        self.saves = in_progress.SavesInProgress()
        self._tell = tell
        self.launches = LaunchHistory(launch_counters)
        self._numbers, self._devices, self._launch_counters = numbers, devices, launch_counters
        self._last: Optional[int] = None
        self._until: dict[str, int] = {}
        self._resumed = False

    def begin(self, thread: int) -> None:
        """Start counting anew for a new process group, which this thread joins."""
        self.training.set_from_init(thread)
        self.saves.does_more()
        self.clock = IterationCounter()
        self.polls = 0
        self.step_times = StepTimes()
        self.launches = LaunchHistory(self._launch_counters)

    @property
    def thread(self) -> Optional[int]:
        """The identity of the training thread."""
        return self.training.ident

    # -- asked by the guard ---------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Completed iterations."""
        return self.polls or self.clock.count

    @property
    def begun(self) -> bool:
        """Whether this rank has taken an optimizer step, or polled."""
        return self.polls > 0 or self.clock.begun

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.saves.going_on(self._may_save())

    def _may_save(self) -> set[int]:
        # A thread that is stopped at the end of an iteration is not in a save.
        watched = {ident for ident in (self.thread, thread_stacks.main_ident()) if ident is not None}
        return watched - self.parking.stopped - self.held

    def hold(self) -> None:
        """From now on, a thread that completes an iteration waits."""
        self.clock.frozen = True
        self.holding, self.calm = True, False

    def let_run_to(self, count: int) -> None:
        """The last iteration is known: waiting threads run on, up to the end of it."""
        self._last = count
        self.waits.wake()

    def advance(self, until: dict[str, int]) -> None:
        """Run to the end of the next iteration that has launched that many of each group's collectives."""
        self._until = until
        self.let_run_to(self.count + 1)

    def resume(self, delivery: Optional[Callable[[], object]], requested: bool) -> None:
        """Let all threads run on: the application ends the process by itself.

        Args:
            delivery: calls the application's handler; run on the main thread first.
            requested: what `stop_requested()` returns from now on.
        """
        if delivery is not None:
            self.delivery.put(delivery)
        self.requested = requested
        self.calm = self.holding = False
        self._resumed = True
        self.waits.wake()

    def close(self) -> None:
        """From now on, a thread that reaches a stopping point is parked."""
        self.closed, self.calm = True, False
        self.waits.wake()

    def to_park(self) -> list[int]:
        """The threads that train, or may train, and are not stopped yet."""
        self.find_thread()
        stopped = self.parking.stopped | self.held
        return [i for i in self.training.candidates() if i not in stopped and not self.shielded(i)]

    def to_park_before_abort(self) -> list[int]:
        """All further threads: an abort ends what they wait for on the device, or will ask it, and torch raises
        nothing there. While a save continues in the background, a thread that may write it is left alone.
        """
        stopped = self.parking.stopped | self.held
        threads = self.training.candidates() if self.saves.continues else thread_stacks.of_program()
        return [i for i in threads if i not in stopped and not self.shielded(i)]

    def shielded(self, ident: int) -> bool:
        """Whether that thread is writing a checkpoint, of which one file may be only a part."""
        return ident not in self.parking and self.saves.shields(ident)

    def find_thread(self) -> None:
        """Find out which thread trains."""
        self.training.find(self.begun)

    # -- on the program's threads ---------------------------------------------------------------------------------

    def end_of_iteration(self) -> None:
        """In the optimizer hook, after an iteration was counted. A program that polls stops in its polls instead."""
        self.step_times.ends.append(monotonic())
        self.launches.iteration_ended()
        self.training.ident = ident = get_ident()
        if (self.holding or self.closed) and not self.polls:
            self._stop_here(ident)

    def look_around(self) -> None:
        """At the end of some iterations: notice what seldom changes."""
        self.saves.does_more()
        self.launches.look()

    def before_step(self) -> None:
        """Before an optimizer step, once the gate is closed: no step begins after the stop."""
        if get_ident() not in self.saves.open:
            self.park()

    def end_of_poll(self) -> None:
        """In a poll, once the hold flag is set."""
        self.training.ident = ident = get_ident()
        self._stop_here(ident)

    def _stop_here(self, ident: int) -> None:
        if (ident in self.saves.open and not self.closed) or ident in self.held:
            return
        if self._until and not self.closed and not _reached(self._numbers(), self._until):
            return
        told: Optional[int] = None
        self.devices = self._devices()
        self.held.add(ident)
        while not (self.closed or self._resumed):
            last, count = self._last, self.count
            if last is not None and count < last:
                break
            if last is not None and told != last:
                told = last
                self._tell(("stopped", count))
            self.waits.wait(ident)
        if self._resumed and not self.closed:
            self._wait_for_delivery(ident)
        self.held.discard(ident)
        if self.closed:
            if told is None:
                self._tell(("stopped", self.count))
            self.park()

    def _wait_for_delivery(self, ident: int) -> None:
        if ident == thread_stacks.main_ident():
            self.held.discard(ident)
            self.delivery.call()
            return
        while self.delivery.awaited and not self.closed:
            self.waits.wait(ident)

    def park(self) -> None:
        """Stop this thread until the process exits; it then raises SystemExit."""
        self.parking.park(lambda ident: ident == self.thread or not self.training.is_known(self.begun))

    def wait_for_plan(self, limit: float, ends: bool = False) -> None:
        """Wait until it is known whether this thread runs on, at most `limit` seconds.

        Args:
            limit: seconds.
            ends: the program has ended itself here (it has raised the signal under the default action). Only the
                training thread runs on from here, and only to the end of the last iteration.
        """
        ident, until = get_ident(), monotonic() + limit
        while not self.closed and monotonic() < until:
            needed = not ends or (self.count > 0 and ident == self.thread and not self._resumed)
            if needed and (self._resumed or self._last is not None):
                break
            self.waits.wait(ident)

    def enter_save(self, collective: bool = False) -> None:
        """A save begins on this thread; `collective`: it needs the other ranks."""
        ident = get_ident()
        # After the stop the group may be released: a rank that then saves alone overwrites a good checkpoint with its
        # own part. A save that needs no other rank, on the program's way out, is allowed.
        legitimate = self.parking.left(ident) and not collective and self.parking.on_way_out()
        if self.closed and not legitimate and not self.shielded(ident):
            self.park()
        self.saves.enter(ident)

    def leave_save(self) -> None:
        """A save ends on this thread."""
        self.saves.leave(get_ident())


def _reached(numbers: dict[str, int], until: dict[str, int]) -> bool:
    return all(numbers.get(group, number) >= number for group, number in until.items())


gate = Gate(lambda event: None)
"""The gate of this process; replaced when the process is armed, and in a forked child."""


def renew(
    tell: Callable[[tuple[str, Any]], None] = lambda event: None,
    numbers: Callable[[], dict[str, int]] = dict,
    devices: Callable[[], dict[str, int]] = dict,
    launch_counters: Callable[[], tuple[Counters, Sized]] = lambda: ({}, ()),
) -> Gate:
    """Replace the gate with one that has seen nothing."""
    global gate
    gate = Gate(tell, numbers, devices, launch_counters)
    return gate


def poll() -> bool:
    """What `autoteardown.stop_requested()` does."""
    g = gate
    g.polls += 1
    if g.polls == 1:
        g.saves.does_more()
    if g.calm:
        return False
    if g.holding or g.closed:
        g.end_of_poll()
    return g.requested


os.register_at_fork(after_in_child=fail_open(renew))
