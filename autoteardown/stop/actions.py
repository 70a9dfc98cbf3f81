"""Carries out the protocol's actions on the armed rank, each that may block on a thread of its own."""

from __future__ import annotations

from typing import Any, Callable, Optional

from autoteardown import spare_threads
from autoteardown.stop.control import RankControl
from autoteardown.stop.coordinator import LEAD
from autoteardown.stop.record import StopRecord
from autoteardown.stop.types import Action
from autoteardown.unpatched import monotonic


class ActionRunner:
    """Runs the actions of one stop.

    Args:
        control: the armed rank.
        record: keeps what the report needs.
        say: called with a line for the log.
    """

    def __init__(self, control: RankControl, record: StopRecord, say: Callable[[str], None]) -> None:
        self._control, self._record, self._say = control, record, say

    def carry_out(self, action: Action) -> None:
        """Start the action; its result arrives as an event. An action without a method here is posted to the
        coordinator.
        """
        do, value, control = action.do, action.value, self._control
        special = getattr(self, "_do_" + do, None)
        if special is not None:
            special(value)
        elif do in ("park", "deliver"):
            getattr(control, do)()
        elif do in ("stop_at", "advance"):
            getattr(control, do)(value)
        else:
            control.post(do, value)

    def _do_tell(self, left: float) -> None:
        lost = {"lost": True} if self._record.cause == "lost" else {}
        longer = {"longer": True} if self._record.longer else {}
        self._control.post("tell", {**self._record.origin, "left": left, **lost, **longer})

    def _do_hold(self, _: Any) -> None:
        self._control.hold()  # first the flag, then the count: see `Gate`
        self._control.events.put(("steps", self._control.steps()))

    def _do_drain(self, _: Any) -> None:
        self._control.mark(state="parked")
        self.start("drained", self._drain)

    def _drain(self) -> Any:
        problem = self._control.drain()
        # Asked again: some devices only turn out to be unwaitable when they are waited for.
        unwaitable = self._control.unwaitable()
        if unwaitable:
            self._control.events.put(("unwaitable", unwaitable))
            self._control.events.put(("fault", f"this device cannot be waited for: {unwaitable}"))
        return problem

    def _do_callbacks(self, budget: float) -> None:
        self.start("called", lambda: self._control.run_callbacks(self._say))

    def _do_destroy(self, _: Any) -> None:
        self.start("destroyed", self._control.destroy)

    def _do_abort(self, moment: Optional[float]) -> None:
        self._record.abort_begins()
        after = _seconds_until(moment)
        self._control.abort(lambda problem: self._control.events.put(("aborted", problem)), after)

    def _do_stacks(self, phase: str) -> None:
        self.start(None, lambda: self._record.take_stacks(f"{phase} timed out"))
        if phase in ("step", "park", "drain"):
            self.start(None, self._record.find_collective)

    def start(self, event: Optional[str], function: Callable[[], Any]) -> None:
        """Run `function` on a thread, as it may never return; put its result, or its error, into the event queue."""

        def run() -> None:
            try:
                problem = function()
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            if event is not None:
                self._control.events.put((event, problem))

        if not spare_threads.start(run) and event is not None:
            run()  # unbounded, on the driver's thread: the hard deadline ends the process in time


_LATE = 10.0  # seconds by which a message may be late


def _seconds_until(moment: Optional[float]) -> float:
    """How long to wait for a moment of the hub's monotonic clock; None: not at all.

    Ranks on the hub's host have the same clock. On another host the clock tells nothing, and there is no memory that
    the hub's devices reach over NVLink either: there the lead begins when the message arrives.
    """
    if moment is None:
        return 0.0
    left = moment - monotonic()
    return max(0.0, left) if -_LATE < left <= LEAD else LEAD
