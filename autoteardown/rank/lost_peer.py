"""Stops a rank that is blocked on a lost peer, after `AUTOTEARDOWN_LOST` seconds without progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import native_calls, thread_stacks
from autoteardown.process_groups import operations
from autoteardown.training.gate import Gate
from autoteardown.unpatched import monotonic

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop, Timer

_LOOK = 0.5  # seconds between two checks


class LostPeerTimer:
    """Watches a rank that knows of a lost peer, on the loop thread. Costs nothing while no peer is lost.

    Args:
        loop: of the rank.
        gate: the rank's threads.
        patience: seconds without progress, blocked; None: unlimited.
        over: called with the lost rank when that time has passed.
    """

    def __init__(
        self, loop: Loop, gate: Gate, patience: Optional[float], over: Callable[[int], object]
    ) -> None:
        self.ranks: set[int] = set()
        self._loop = loop
        self._gate = gate
        self._patience = patience
        self._over = over
        self._timer: Optional[Timer] = None
        self._seen: Any = None
        self._since = 0.0

    def hear(self, kind: str, rank: int) -> None:
        """A peer is `lost`, or `back`."""
        (self.ranks.add if kind == "lost" else self.ranks.discard)(rank)
        if self.ranks and self._timer is None and self._patience is not None:
            self._since = monotonic()
            self._look()

    def close(self) -> None:
        """Stop watching."""
        self.ranks.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if not self.ranks or self._patience is None:
            return
        self._gate.find_thread()
        try:
            progress = native_calls.call(operations.progress)
        except native_calls.InterpreterExiting:
            return
        seen = (thread_stacks.position(self._gate.thread), progress, self._gate.count)
        # A device that waits for a peer shows in any thread that waits for the device; a thread that waits for a peer
        # shows in a collective only.
        blocked = bool(operations.accelerators()) or thread_stacks.place(self._gate.thread) == "peers"
        if seen != self._seen or not blocked or self._gate.saving:
            self._seen, self._since = seen, monotonic()
        if monotonic() - self._since >= self._patience:
            self._over(min(self.ranks))
        else:
            self._timer = self._loop.at(_LOOK, self._look)
