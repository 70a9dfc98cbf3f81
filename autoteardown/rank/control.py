"""What the driver of a stop can do to this rank, and see of it (`stop/control.py` says what each means)."""

from __future__ import annotations

from typing import Any, Callable, Optional

from autoteardown import thread_stacks
from autoteardown.checkpoints import callbacks
from autoteardown.frameworks import ray
from autoteardown.process_groups import operations
from autoteardown.rank.main_thread import MainThread
from autoteardown.rank.state import Armed
from autoteardown.stop.control import Look, Problem
from autoteardown.stop.types import Facts
from autoteardown.training import optimizer_hooks
from autoteardown.training.async_exception import park_thread
from autoteardown.training.gate import Gate
from autoteardown.training.progress import Life


class RankHands:
    """Of one armed rank, for one stop of it."""

    def __init__(self, armed: Armed, main: MainThread, owner: bool) -> None:
        """`owner`: the application has a handler of its own, which is to be called."""
        self.settings = armed.settings
        self.log = armed.identity.log
        self.events = armed.events
        self._armed = armed
        self._main = main
        self._gate: Gate = armed.gate
        self._owner = owner
        self._life: Optional[Life] = None
        self.identity, self.mark = armed.identity.report, armed.identity.mark
        self.go_on, self.stop_at = self._gate.go_on, self._gate.let_run_to

    @property
    def alone(self) -> str:
        """See `stop.hands.Hands`."""
        world = self._armed.identity.world_size
        return self._armed.alone if self._armed.joined and world != 1 else ""

    def facts(self, cause: str) -> Facts:
        """See `stop.hands.Hands`."""
        armed, settings = self._armed, self.settings
        accelerator = bool(operations.accelerators())
        self._life = Life(self._gate, operations.progress, accelerator)
        polls = self._gate.polls > 0 and settings.yield_seconds > 0
        return Facts(
            cause=cause,
            world=armed.identity.world_size or 1,
            joined=armed.joined,
            channel=armed.channel is not None,
            accelerator=accelerator,
            can_abort=armed.joined and operations.can_abort(),
            hub=armed.channel is not None and armed.channel.is_hub,
            step=settings.stop_at == "step",
            owner=self._owner or polls,
            together=settings.handlers == "together",
            iterates=self._gate.begun or optimizer_hooks.any_optimizer(),
            callbacks=bool(callbacks.registered or settings.on_teardown),
            unwaitable=self.unwaitable(),
        )

    def unwaitable(self) -> str:
        """See `stop.hands.Hands`."""
        return ", ".join(operations.unwaitable())

    def look(self, stopping: bool) -> Look:
        """See `stop.hands.Hands`."""
        gate = self._gate
        gate.find_thread()
        ended = not thread_stacks.alive(gate.thread)
        still = self._life is not None and not ended and self._life.still()
        return Look(gate.saving, still, ended, operations.progress())

    def time_left(self) -> Optional[float]:
        """See `stop.hands.Hands`."""
        return self._armed.identity.time_left()

    def unlist(self, outcome: str, exit_code: int) -> None:
        """See `stop.hands.Hands`."""
        self._armed.identity.unlist(outcome, exit_code)

    def post(self, kind: str, value: Any) -> None:
        """See `stop.hands.Hands`."""
        channel = self._armed.channel
        if channel is not None:
            if kind in ("at", "still"):
                value = (*value, operations.comparable_numbers() if operations.accelerators() else {})
            channel.post(kind, value)

    def flush(self, seconds: float) -> None:
        """See `stop.hands.Hands`."""
        if self._armed.channel is not None:
            self._armed.channel.flush(seconds)

    def steps(self) -> tuple[Optional[int], bool]:
        """See `stop.hands.Hands`."""
        gate, patience = self._gate, self.settings.step_timeout
        gate.find_thread()
        if not gate.begun and not optimizer_hooks.any_optimizer():
            return None, False
        step, idle = gate.pace.usual() or 0.0, gate.pace.idle()
        blocked = idle > max(patience, 5 * step) and not gate.saving
        return gate.count, step > patience or blocked or not thread_stacks.alive(gate.thread)

    def hold(self) -> None:
        """See `stop.hands.Hands`."""
        self._gate.hold()

    def deliver(self) -> None:
        """See `stop.hands.Hands`."""
        self._gate.resume(self._main.delivery() if self._owner else None, requested=True)
        if thread_stacks.main_ident() not in self._gate.held:
            self._armed.listening.on_main(self._gate.delivery.call)

    def park(self) -> None:
        """See `stop.hands.Hands`."""
        gate = self._gate
        if self._life is not None and not gate.closed:
            self._life.begin_again()
        gate.close()
        self.ring()
        for thread in gate.to_park():
            if thread != thread_stacks.main_ident():
                park_thread(thread)
                gate.training.wake_loop()

    def drain(self) -> Problem:
        """See `stop.hands.Hands`."""
        return operations.drain()

    def call_back(self, say: Callable[[str], None]) -> Problem:
        """See `stop.hands.Hands`."""
        with self._gate.saves.on_this_thread(), operations.devices_of(self._gate.devices):
            problem = callbacks.run(self.settings.on_teardown, say)
            self._gate.saves.wait_for_background()  # while the group is alive, which it may need
            return problem

    def destroy(self) -> Problem:
        """See `stop.hands.Hands`."""
        return operations.destroy(self._armed.real_destroy)

    def abort(self, done: Callable[[Problem], object]) -> None:
        """See `stop.hands.Hands`."""
        operations.abort(done)

    def stuck_collective(self) -> Optional[dict[str, Any]]:
        """See `stop.hands.Hands`."""
        return operations.stuck_collective()

    def evidence(self, path: str, collective: Optional[dict[str, Any]]) -> list[str]:
        """See `stop.hands.Hands`."""
        return operations.evidence(path, collective)

    def is_stuck_outside(self) -> bool:
        """See `stop.hands.Hands`."""
        return ray.waits_for_method(
            thread_stacks.inside, self._gate.training.loop, self._gate.parking.stopped
        )

    def leave(self, exit_code: int) -> None:
        """See `stop.hands.Hands`."""
        self._gate.parking.open(ray.exit_code_in_method(exit_code))
        if thread_stacks.main_ident() not in self._gate.parking:
            self.ring()

    def ring(self) -> None:
        """See `stop.hands.Hands`."""
        self._armed.listening.on_main(self._main.stop)
