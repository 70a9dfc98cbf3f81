"""The state of an armed rank, shared by its guard, its main thread, and the control that a stop gets."""

from __future__ import annotations

import _queue
import os
import signal
from collections.abc import Sized
from typing import Any, Callable, Optional

from autoteardown import settings
from autoteardown.channel.channel import Channel
from autoteardown.process_groups import operations
from autoteardown.rank.identity import Identity
from autoteardown.signals import interception
from autoteardown.stop.driver import Teardown
from autoteardown.training import gate
from autoteardown.training.launch_history import Counters


def _launch_counters() -> tuple[Counters, Sized]:
    table = operations.table()
    # A thread beside the training has a group of its own, or the other half of a device's group.
    several = len(table) > 1 or operations.accelerators()
    return operations.launch_counters(comparable=True) if several else {}, table


class RankState:
    """The state of one process, whose rank may come and go with each init and destroy.

    Args:
        real_destroy: torch's own `destroy_process_group`.
    """

    def __init__(self, real_destroy: Callable[[], object]) -> None:
        self.real_destroy = real_destroy
        self.settings, problems = settings.load(os.environ)
        self.identity = Identity(self.settings)
        for problem in problems:
            self.identity.log.line(problem)
        self.interceptor = interception.install(signal)
        self.listener = self.interceptor.prepare()
        self.joined = False  # init has returned: there is a process group
        self.unshared = ""  # why the group has no channel, in words
        self.teardown: Optional[Teardown] = None
        self.channel: Optional[Channel] = None
        self.events: _queue.SimpleQueue[tuple[str, Any]] = _queue.SimpleQueue()
        self.gate = gate.renew(
            self.events.put, operations.comparable_numbers, operations.current_devices, _launch_counters
        )
        self.signum: Optional[int] = None  # the eviction signal, if this rank got one

    @property
    def alone(self) -> str:
        """Why the peers cannot be told of an eviction, in words; empty if they can."""
        if self.channel is not None:
            return self.channel.why
        if self.unshared:
            return self.unshared
        return "AUTOTEARDOWN_PEERS is off" if not self.settings.peers else "the agent's thread has ended"
