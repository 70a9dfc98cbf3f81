"""Runs the coordinator on rank 0: feeds it events and timer ticks, and appends its decisions to the message log.

The coordinator itself is passed in (`stop/coordinator.py`) and does no I/O, so it is tested without a network.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from autoteardown import unpatched
from autoteardown.channel.message_log import MessageLog
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop, Timer

HUB_EVENTS = frozenset({"joined", "lost", "back", "bye", "closed", "tick"})
"""Kinds that only the hub makes; a post of one by a rank is ignored."""
LEAVING = frozenset({"left"})
"""Posts after which a rank whose connection ends does not count as lost."""


class Coordinator(Protocol):
    """Decides what the ranks do, from the events that it is given."""

    @property
    def wake(self) -> float:
        """Monotonic time at which the next `tick` is wanted, or infinity."""

    def on(self, rank: int, kind: str, value: Any, now: float) -> list[tuple[Optional[int], str, Any]]:
        """Handle one event.

        Args:
            rank: the rank that the event is about; without meaning for `tick`.
            kind: the kind of the rank's post, or one of `HUB_EVENTS`: `joined` (this incarnation of the rank has
                connected for the first time), `lost` (its connection ended before it left, and it has not reconnected;
                value: whether its process is known to be dead; sent again when that becomes known), `back` (a lost rank
                has reconnected), `bye` (it has left the group), `closed` (its connection ended after it left), `tick`.
            value: as posted, unchecked; None for the other events of the hub.
            now: monotonic time in seconds.

        Returns:
            The messages to send: to which rank (None: to all), of which kind, with which value.
        """
        ...


class CoordinatorRunner:
    """Feeds the coordinator and keeps its message log. Every method runs on the loop thread.

    Args:
        loop: rank 0's event loop.
        coordinator: decides what the ranks do.
        on_messages: called after each timer tick, which may have added messages to the log.
    """

    def __init__(self, loop: Loop, coordinator: Coordinator, on_messages: Callable[[], object]) -> None:
        self.log = MessageLog()
        self._loop, self._coordinator, self._on_messages = loop, coordinator, on_messages
        self._alarm: Optional[Timer] = None
        self._closed = False

    def handle(self, rank: int, kind: str, value: Any) -> None:
        """Pass an event to the coordinator (see `Coordinator.on`), and log the messages that it returns."""
        try:
            for to, what, content in self._coordinator.on(rank, kind, value, unpatched.monotonic()):
                self.log.add(to, what, content)
        except Exception as error:
            report_failure("the coordinator", error)
        self._set_alarm()

    def close(self) -> None:
        """Stop the timer."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()

    def _set_alarm(self) -> None:
        wake = self._coordinator.wake
        if self._alarm is not None:
            if self._alarm.due == wake and self._alarm.function is not None:
                return
            self._alarm.cancel()
            self._alarm = None
        if wake < inf and not self._closed:
            self._alarm = self._loop.at(max(0.001, wake - unpatched.monotonic()), self._tick)
            self._alarm.due = wake

    def _tick(self) -> None:
        self._alarm = None
        self.handle(0, "tick", None)
        self._on_messages()
