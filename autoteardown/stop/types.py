"""The terms in which the protocol and the driver of a stop speak to each other."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional


class Limits(NamedTuple):
    """Time budgets in seconds, already scaled to fit the grace period (see `settings.py`)."""

    hard: float = 24.0
    yield_: float = 0.0
    step: float = 8.0
    drain: float = 5.0
    destroy: float = 5.0
    abort: float = 3.0
    exit: float = 3.0

    def within(self, seconds: float) -> Limits:
        """These, made shorter together where they do not fit into so many seconds."""
        total = self.step + self.drain + self.destroy + self.abort + self.exit
        scale = min(1.0, max(0.0, seconds) / total) if total else 1.0
        return Limits(self.hard, self.yield_, *(limit * scale for limit in self[2:]))


class Facts(NamedTuple):
    """What is true of this rank when its stop begins."""

    cause: str = "signal"  # or "peer", "lost"
    joined: bool = True  # init has returned: there is a process group
    world: int = 1
    channel: bool = False  # this rank can speak to its peers
    accelerator: bool = False  # this process has initialised one
    can_abort: bool = False  # its communicators can be aborted
    hub: bool = False  # its peers speak to one another through this process
    step: bool = True  # AUTOTEARDOWN_STOP_AT is `step`
    application_owns: bool = (
        False  # the application ends by itself: it has a handler of its own, or polls `stop_requested()`
    )
    together: bool = True  # AUTOTEARDOWN_HANDLERS is `together`
    iterates: bool = False  # this rank steps or polls
    callbacks: bool = False  # `on_teardown` has been given some
    unwaitable: str = ""  # the devices in use that nobody can wait for


class Action(NamedTuple):
    """Something for the shell to do. `do` is one of:

    tell (seconds until this rank is gone), answer, plan_now, at, still, ready, saving, arrived, halt, over, wedged,
    quiet, left: to the council; hold: raise the hold flag, then report `steps`; stop_at: let the training thread run
    to that iteration; go_on: let it run to the end of its next one; deliver: let it run on, with the application's
    handler called first; park, drain, callbacks, destroy, abort: start it, report when it is over; stacks: record the
    stacks of the threads in the way; leave: end the process, gently; die: end it now.
    """

    do: str
    value: Any = None


class Phase:
    """One line of the report."""

    __slots__ = ("detail", "end", "name", "outcome", "start")

    def __init__(self, name: str, start: float) -> None:
        self.name = name
        self.start = start
        self.end: Optional[float] = None
        self.outcome = ""
        self.detail = ""

    def as_dict(self) -> dict[str, object]:
        """As it is in the report."""
        return {key: getattr(self, key) for key in ("name", "start", "end", "outcome", "detail")}
