"""What the hub asks what to do: a council, made on rank 0. Pure, so that it needs no network to be tested."""

from __future__ import annotations

from typing import Any, Optional, Protocol

BORN = frozenset({"joined", "lost", "back", "bye", "closed", "tick"})
"""Kinds that the hub itself makes; a rank that posts one is not listened to."""
FAREWELLS = frozenset({"left"})
"""Kinds after which a rank whose connection ends is not lost."""


class Council(Protocol):
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
