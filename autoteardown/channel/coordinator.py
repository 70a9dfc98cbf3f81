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

BORN = frozenset({"joined", "lost", "back", "bye", "closed", "tick"})
"""Kinds that the hub itself makes; a rank that posts one is not listened to."""
FAREWELLS = frozenset({"left"})
"""Kinds after which a rank whose connection ends is not lost."""


class Coordinator(Protocol):
    """Decides, and tells."""

    @property
    def wake(self) -> float:
        """Monotonic time of the next `tick` wanted, or infinity."""

    def on(self, rank: int, kind: str, value: Any, now: float) -> list[tuple[Optional[int], str, Any]]:
        """Something has happened.

        Args:
            rank: whose; of no meaning for `tick`.
            kind: what that rank has posted, or one of `BORN`: `joined` (for the first time), `lost` (its connection
                ended without a farewell, and it has not come back; value: whether its process is known to be dead;
                again when that becomes known), `back` (it has after all), `bye` (it has left the group), `closed`
                (after a farewell), `tick`.
            value: as posted; None for what else the hub makes. Nobody has checked it.
            now: monotonic time in seconds.

        Returns:
            What to tell: to which rank, or None for all of them, of which kind, and with which value.
        """
        ...


class CoordinatorRunner:
    """See above. Everything happens on the loop thread.

    Args:
        loop: rank 0's.
        council: decides.
        spoken: called when its clock has had it say something.
    """

    def __init__(self, loop: Loop, coordinator: Coordinator, on_announcement: Callable[[], object]) -> None:
        self.log = MessageLog()
        self._loop, self._coordinator, self._spoken = loop, coordinator, on_announcement
        self._alarm: Optional[Timer] = None
        self._over = False

    def handle(self, rank: int, kind: str, value: Any) -> None:
        """Have the council hear it (see `Council.on`)."""
        try:
            for to, what, content in self._coordinator.on(rank, kind, value, unpatched.monotonic()):
                self.log.add(to, what, content)
        except Exception as error:
            report_failure("the council", error)
        self._set_alarm()

    def close(self) -> None:
        """No more of it."""
        self._over = True
        if self._alarm is not None:
            self._alarm.cancel()

    def _set_alarm(self) -> None:
        wake = self._coordinator.wake
        if self._alarm is not None:
            if self._alarm.due == wake and self._alarm.function is not None:
                return
            self._alarm.cancel()
            self._alarm = None
        if wake < inf and not self._over:
            self._alarm = self._loop.at(max(0.001, wake - unpatched.monotonic()), self._tick)
            self._alarm.due = wake

    def _tick(self) -> None:
        self._alarm = None
        self.handle(0, "tick", None)
        self._spoken()
