"""Carries out on this process's rank what its stop asks for: hold, park, drain, destroy, abort, exit.

`stop/control.py` documents each method.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from autoteardown import thread_stacks
from autoteardown.checkpoints import callbacks
from autoteardown.children import termination
from autoteardown.fail_open import fail_open
from autoteardown.frameworks import ray
from autoteardown.process_groups import operations, watchdog_abort
from autoteardown.rank.main_thread import MainThread
from autoteardown.rank.state import RankState
from autoteardown.stop.control import Problem, Snapshot
from autoteardown.stop.types import Facts
from autoteardown.training import optimizer_hooks
from autoteardown.training.async_exception import park_thread
from autoteardown.training.gate import Gate
from autoteardown.training.progress import ProgressMonitor


class LocalRankControl:
    """Controls this process's rank, for one stop."""

    def __init__(self, armed: RankState, main: MainThread, application_owns: bool) -> None:
        """`application_owns`: the application's own handler is called, and ends the process."""
        self.settings = armed.settings
        self.log = armed.identity.log
        self.events = armed.events
        self._armed = armed
        self._main = main
        self._gate: Gate = armed.gate
        self._handler_owns = application_owns
        self._progress: Optional[ProgressMonitor] = None
        self._launched_until_quiet: dict[str, int] = {}
        self.identity, self.mark = armed.identity.report, armed.identity.mark
        self.advance, self.stop_at = self._gate.advance, self._gate.let_run_to

    @property
    def application_owns(self) -> bool:
        """See `stop.control.RankControl`."""
        return self._handler_owns or (self._gate.polls > 0 and self.settings.yield_seconds > 0)

    @property
    def saving(self) -> bool:
        """See `stop.control.RankControl`."""
        return self._gate.saving

    @property
    def alone(self) -> str:
        """See `stop.control.RankControl`."""
        world = self._armed.identity.world_size
        return self._armed.alone if self._armed.joined and world != 1 else ""

    def facts(self, cause: str) -> Facts:
        """See `stop.control.RankControl`."""
        armed, settings = self._armed, self.settings
        accelerator = bool(operations.accelerators())
        gate = self._gate
        self._progress = ProgressMonitor(
            gate, lambda: operations.progress(gate.launches.of_other_threads()), accelerator
        )
        return Facts(
            cause=cause,
            world=armed.identity.world_size or 1,
            joined=armed.joined,
            channel=armed.channel is not None,
            accelerator=accelerator,
            can_abort=armed.joined and operations.can_abort(),
            hub=armed.channel is not None and armed.channel.is_hub,
            step=settings.stop_at == "step",
            application_owns=self.application_owns,
            together=settings.handlers == "together",
            iterates=self._gate.begun or optimizer_hooks.any_optimizer(),
            callbacks=bool(callbacks.registered or settings.on_teardown),
            unwaitable=self.unwaitable(),
        )

    def unwaitable(self) -> str:
        """See `stop.control.RankControl`."""
        return ", ".join(operations.unwaitable())

    def snapshot(self, stopping: bool) -> Snapshot:
        """See `stop.control.RankControl`."""
        gate = self._gate
        gate.find_thread()
        ended = not thread_stacks.alive(gate.thread)
        stalled = self._progress is not None and not ended and self._progress.stalled()
        return Snapshot(gate.saving, stalled, ended, operations.progress())

    def times_left(self) -> list[tuple[float, bool]]:
        """See `stop.control.RankControl`."""
        return self._armed.identity.times_left()

    def unregister(self, outcome: str, exit_code: Optional[int], **fields: Any) -> None:
        """See `stop.control.RankControl`."""
        self._armed.identity.unregister(outcome, exit_code, **fields)

    def post(self, kind: str, value: Any) -> None:
        """See `stop.control.RankControl`."""
        channel = self._armed.channel
        if channel is not None:
            if kind in ("at", "stalled"):
                value = (*value, self._launched(stopped=kind == "at" and not self._gate.polls))
            channel.post(kind, value)

    def _launched(self, stopped: bool) -> dict[str, Optional[int]]:
        """Where hosts run ahead of devices: how many of each group's collectives this rank has launched."""
        if not operations.accelerators():
            return {}
        return self._gate.launches.regular(operations.comparable_numbers(), stopped)

    def end_children(self, seconds: float) -> None:
        """See `stop.control.RankControl`."""
        fail_open(termination.end_children)(seconds)

    def flush(self, seconds: float) -> None:
        """See `stop.control.RankControl`."""
        if self._armed.channel is not None:
            self._armed.channel.flush(seconds)

    def steps(self) -> tuple[Optional[int], bool]:
        """See `stop.control.RankControl`."""
        gate, patience = self._gate, self.settings.step_timeout
        gate.find_thread()
        if not gate.begun and not optimizer_hooks.any_optimizer():
            return None, False
        step, idle = gate.step_times.usual() or 0.0, gate.step_times.idle()
        blocked = idle > max(patience, 5 * step) and not gate.saving
        return gate.count, step > patience or blocked or not thread_stacks.alive(gate.thread)

    def hold(self) -> None:
        """See `stop.control.RankControl`."""
        self._gate.hold()

    def deliver(self) -> None:
        """See `stop.control.RankControl`."""
        self._gate.resume(self._main.delivery() if self._handler_owns else None, requested=True)
        if thread_stacks.main_ident() not in self._gate.held:
            self._armed.listener.run_on_main_thread(self._gate.delivery.call)

    def park(self) -> None:
        """See `stop.control.RankControl`."""
        gate = self._gate
        if self._progress is not None and not gate.closed:
            self._progress.reset()
        gate.close()
        self.interrupt_main_thread()
        self._park(gate.to_park())

    def _park(self, threads: list[int]) -> None:
        for thread in threads:
            if thread != thread_stacks.main_ident():
                park_thread(thread)
                self._gate.training.wake_loop()

    def drain(self) -> Problem:
        """See `stop.control.RankControl`."""
        self._launched_until_quiet = operations.sequence_numbers()
        return operations.drain()

    def run_callbacks(self, say: Callable[[str], None]) -> Problem:
        """See `stop.control.RankControl`."""
        with self._gate.saves.on_this_thread(), operations.devices_of(self._gate.devices):
            problem = callbacks.run(self.settings.on_teardown, say)
            self._gate.saves.wait_for_background()  # while the group is alive, which it may need
        if callbacks.registered or self.settings.on_teardown:
            self._launched_until_quiet = operations.sequence_numbers()
        return problem

    def destroy(self) -> Problem:
        """See `stop.control.RankControl`."""
        # Until an iteration has ended, it is not known which thread trains, and so whether the right one was parked.
        unexpected = not self._gate.begun and operations.sequence_numbers() != self._launched_until_quiet
        problem = operations.destroy(self._armed.real_destroy)
        return problem or ("a thread has launched a collective after the drain" if unexpected else None)

    def abort(self, done: Callable[[Problem], object], after: float) -> None:
        """See `stop.control.RankControl`."""
        # A thread that waits for the device comes back from there with data that is not reduced.
        self.interrupt_main_thread()
        self._park(self._gate.to_park_before_abort())
        operations.abort(done, after)

    def hold_off_watchdog(self) -> None:
        """See `stop.control.RankControl`."""
        watchdog_abort.hold_off()

    def stuck_collective(self) -> Optional[dict[str, Any]]:
        """See `stop.control.RankControl`."""
        return operations.stuck_collective()

    def evidence(self, path: str, collective: Optional[dict[str, Any]]) -> list[str]:
        """See `stop.control.RankControl`."""
        return operations.evidence(path, collective)

    def exit_is_blocked_by_framework(self) -> bool:
        """See `stop.control.RankControl`."""
        return ray.waits_for_method(
            thread_stacks.inside, self._gate.training.loop, self._gate.parking.stopped
        )

    def leave(self, exit_code: int) -> None:
        """See `stop.control.RankControl`."""
        self._gate.parking.open(ray.exit_code_in_method(exit_code))
        if thread_stacks.main_ident() not in self._gate.parking:
            self.interrupt_main_thread()

    def interrupt_main_thread(self) -> None:
        """See `stop.control.RankControl`."""
        self._armed.listener.run_on_main_thread(self._main.stop)
