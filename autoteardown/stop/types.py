"""Types that the protocol and the driver of a stop exchange: limits, facts, actions, phases."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from autoteardown.settings import automatic_step

_SAVE_SHARE = 1 / 3  # the part of the time for an iteration that a callback or the application's handler gets
_SAVE_SECONDS = 30.0  # at most


class Limits(NamedTuple):
    """Time budgets in seconds, scaled to fit the grace period (see `settings.py`)."""

    hard: float = 24.0
    yield_: float = 0.0
    step: float = 8.0
    drain: float = 5.0
    destroy: float = 5.0
    abort: float = 3.0
    exit: float = 3.0
    auto: bool = False  # `step` is what the grace period leaves
    saves: bool = False  # callbacks or the application's handler need a share of it

    def within(self, seconds: float) -> Limits:
        """These limits, made to fit into so many seconds: all in proportion, or `step` as what is left (`auto`)."""
        step, drain, destroy, abort, exit_ = self.step, self.drain, self.destroy, self.abort, self.exit
        if self.auto:
            step, scale = automatic_step(max(0.0, seconds), drain, abort, exit_)
            step -= min(_SAVE_SECONDS, step * _SAVE_SHARE) if self.saves else 0.0
        else:
            total = step + drain + destroy + abort + exit_
            scale = min(1.0, max(0.0, seconds) / total) if total else 1.0
            step *= scale
        return self._replace(
            step=step, drain=drain * scale, destroy=destroy * scale, abort=abort * scale, exit=exit_ * scale
        )


class Facts(NamedTuple):
    """What is true of this rank when its stop begins."""

    cause: str = "signal"  # or "peer", "lost"
    joined: bool = True  # init has returned: there is a process group
    world: int = 1
    channel: bool = False  # there is a channel to the peers
    accelerator: bool = False  # this process uses one
    can_abort: bool = False  # its communicators can be aborted
    hub: bool = False  # its peers are connected through this process
    step: bool = True  # AUTOTEARDOWN_STOP_AT is `step`
    application_owns: bool = (
        # the application ends the process by itself: it has a handler of its own, or polls `stop_requested()`
        False
    )
    together: bool = True  # AUTOTEARDOWN_HANDLERS is `together`
    iterates: bool = False  # this rank steps or polls
    callbacks: bool = False  # `on_teardown` callbacks are registered
    unwaitable: str = ""  # the devices in use that cannot be waited for


class Action(NamedTuple):
    """Something for the driver to do. `do` is one of:

    - to the coordinator: tell (seconds until this rank exits), answer, plan_now, at, stalled, ready, saving,
      arrived, halt, yield_expired, wedged, quiet, left;
    - to the training thread: hold: set the hold flag, then report `steps`; stop_at: run to the end of that
      iteration; advance: run to the end of the next one; deliver: run on, after the application's handler has been
      called;
    - park, drain, callbacks, destroy, abort: start it, and report when it has returned;
    - stacks: record the stacks of the threads that are in the way; leave: ask the program to exit; die: end the
      process now.
    """

    do: str
    value: Any = None


class Phase:
    """One phase of the report."""

    __slots__ = ("detail", "end", "name", "outcome", "start")

    def __init__(self, name: str, start: float) -> None:
        self.name = name
        self.start = start
        self.end: Optional[float] = None
        self.outcome = ""
        self.detail = ""

    def as_dict(self) -> dict[str, object]:
        """The phase in the JSON report."""
        return {key: getattr(self, key) for key in ("name", "start", "end", "outcome", "detail")}
