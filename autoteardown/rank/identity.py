"""Identifies this rank (rank, world size, host, job), in its reports and in its entry of the node's registry."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Callable, Optional

from autoteardown import spare_threads
from autoteardown.fail_open import fail_open
from autoteardown.node import registration
from autoteardown.process_groups.operations import World
from autoteardown.settings import Settings
from autoteardown.stop.report import Log

SCHEMA = 2


class Identity:
    """The identity of one process, whose rank may come and go with each init and destroy."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.host = socket.gethostname()
        self.program = sys.argv[0] if getattr(sys, "argv", None) else ""
        self.rank: Optional[int] = None
        self.world_size: Optional[int] = None
        self.backend: Optional[str] = None
        self.log = Log(settings.log, self.host, settings.job, settings.log_format)
        self._entry: Optional[registration.Registration] = None

    def joining(self) -> None:
        """Before torch's init: take what the launcher's environment says."""
        self._is(_environment_int("RANK"), _environment_int("WORLD_SIZE"))
        self._entry = registration.enter(self.settings.runtime_dir, self._fields(), self.log.line, _soon)

    def joined(self, world: World) -> None:
        """After torch's init: take the real rank and world size. The registry is updated by `mark_joined`."""
        self.backend = world.backend
        self._is(world.rank, world.size)

    def mark_joined(self, alone: Optional[str]) -> None:
        """Update the node's registry: this rank, and why it is alone (None: not known yet)."""
        self.mark(**self._fields(), **({} if alone is None else {"alone": alone}))

    def _is(self, rank: Optional[int], world_size: Optional[int]) -> None:
        self.rank, self.world_size = self.log.rank, self.log.world_size = rank, world_size

    def report(self) -> dict[str, Any]:
        """The first fields of the report."""
        return {
            "schema": SCHEMA,
            "job": self.settings.job,
            "host": self.host,
            "pid": os.getpid(),
            "program": self.program,
            "rank": self.rank,
            "local_rank": _environment_int("LOCAL_RANK"),
            "world_size": self.world_size,
            "backend": self.backend,
            "python": sys.version.split()[0],
            "torch": str(getattr(sys.modules.get("torch"), "__version__", None)),
        }

    def _fields(self) -> dict[str, Any]:
        keep = ("job", "host", "program", "rank", "local_rank", "world_size", "backend")
        fields = {key: value for key, value in self.report().items() if key in keep}
        return {**fields, "signal": self.settings.signals[0]}  # what `autoteardown drain` must send

    def mark(self, **fields: Any) -> None:
        """Update the entry in the node's registry; never waits for a disk."""
        if self._entry is not None:
            self._entry.update(**fields)

    def times_left(self) -> list[tuple[float, bool]]:
        """What each drain of this node has announced: see `Registration.times_left`."""
        return self._entry.times_left() if self._entry is not None else []

    def unregister(
        self, outcome: Optional[str] = None, exit_code: Optional[int] = None, **fields: Any
    ) -> None:
        """Remove the entry from the node's registry."""
        if self._entry is not None:
            self._entry.leave(outcome, exit_code, **fields)


def _soon(function: Callable[[], object]) -> None:
    """Run it on a thread of its own: neither init nor the loop thread, which hears signals, may wait for a disk."""
    if not spare_threads.start(fail_open(function)):
        function()


def _environment_int(name: str) -> Optional[int]:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 20 else None
