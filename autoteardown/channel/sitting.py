"""The council in session: it hears what happens, has a clock, and what it says is kept for those who are to hear it."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import unpatched
from autoteardown.channel.coordinator import Council
from autoteardown.channel.message_log import Said
from autoteardown.fail_open import failed

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop, Timer


class Sitting:
    """See above. Everything happens on the loop thread.

    Args:
        loop: rank 0's.
        council: decides.
        spoken: called when its clock has had it say something.
    """

    def __init__(self, loop: Loop, council: Council, spoken: Callable[[], object]) -> None:
        self.said = Said()
        self._loop, self._council, self._spoken = loop, council, spoken
        self._alarm: Optional[Timer] = None
        self._over = False

    def happened(self, rank: int, kind: str, value: Any) -> None:
        """Have the council hear it (see `Council.on`)."""
        try:
            for to, what, content in self._council.on(rank, kind, value, unpatched.monotonic()):
                self.said.add(to, what, content)
        except Exception as error:
            failed("the council", error)
        self._set_alarm()

    def close(self) -> None:
        """No more of it."""
        self._over = True
        if self._alarm is not None:
            self._alarm.cancel()

    def _set_alarm(self) -> None:
        wake = self._council.wake
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
        self.happened(0, "tick", None)
        self._spoken()
