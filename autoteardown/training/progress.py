"""Decides whether a rank that has not reached the agreed iteration still makes progress.

Seen from outside the training thread, by the evidence there is: the thread runs bytecode; the process computes, or
would if it had a processor; its device or its collectives advance.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Optional

from autoteardown import thread_stacks
from autoteardown.node import procfs
from autoteardown.training.gate import Gate
from autoteardown.unpatched import monotonic

_FOR_PEERS = 0.5  # seconds without a sign of life, at least: blocked in a collective
_STOPPING = 0.2  # the same, once every rank has been asked to stop where it is: its peers come no more
_ELSEWHERE = 2.5  # and blocked in anything else: a stall in the data, a lock
# Processor seconds a second that are more than our own looking takes; on a starved machine, that it waits for one.
_COMPUTES = 0.3


class ProgressMonitor:
    """Watches one rank during its stop.

    Args:
        gate: the rank's threads.
        progress: returns a value that differs when the device or the collectives have advanced; must not wait.
        accelerator: whether the process uses one. A thread that waits for a device may use a whole core.
    """

    def __init__(self, gate: Gate, progress: Callable[[], Any], accelerator: bool) -> None:
        self._gate = gate
        self._progress = progress
        self._accelerator = accelerator
        self._position: Optional[tuple[int, int]] = None
        self._seen: Any = None
        self._since: Optional[float] = None  # without a sign of life
        self._looked = self._computed = 0.0

    def reset(self) -> None:
        """The rank has been asked to stop where it is: evidence from before does not count."""
        self._since = None

    def stalled(self) -> bool:
        """Whether the training thread has shown no progress for longer than it usually would."""
        gate, now = self._gate, monotonic()
        if gate.thread in gate.held or gate.thread in gate.parking:
            self._since = None
            return False
        moved = self._moved(now)
        if moved or self._since is None:
            self._since = now
            return False
        place, step = thread_stacks.place(gate.thread), gate.step_times.usual() or 0.0
        if place == "work" or gate.saving:
            return False
        if place == "peers":
            # It was there before anybody looked, if its last iteration is that old.
            seen = now - self._since
            waited = max(seen, gate.step_times.idle()) if seen > _STOPPING and not gate.closed else seen
            return waited > (
                _STOPPING if gate.closed else max(_FOR_PEERS, 5 * step, 2 * gate.step_times.longest())
            )
        return now - self._since > max(_ELSEWHERE, 5 * step, 3 * gate.step_times.longest())

    def _moved(self, now: float) -> bool:
        position, seen = thread_stacks.position(self._gate.thread), self._progress()
        moved = position != self._position or seen != self._seen
        self._position, self._seen = position, seen
        elapsed = now - self._looked
        if elapsed > 0.2:
            computed = time.process_time() + procfs.queued(thread_stacks.native_id(self._gate.thread))
            busy = computed - self._computed > _COMPUTES * elapsed
            self._looked, self._computed = now, computed
            moved = moved or (busy and not self._accelerator)
        return moved
