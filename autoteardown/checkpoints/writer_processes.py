"""Whether a process that the program started writes a checkpoint: Megatron-core's asynchronous writer is one (F20).

A writer is started as the worker of a pool is, or an evaluator, or an environment of reinforcement learning. What tells
it from them is what it does: it has a file open to write. Not one that this process has open as well, which it was
born with (where its output goes); not one that is appended to (a log); nothing that lies in memory only.
A writer that is between two files, or on its way to the first, is one for a moment longer.

Asked in a stop only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import inf

from autoteardown.node import procfs
from autoteardown.unpatched import monotonic

_LOOK = 0.1  # seconds from one look at the processes to the next
_MOMENT = 0.5  # seconds from one file of a checkpoint to the next
_YOUNG = 5.0  # seconds after its start in which a process that computes may be on its way to its first file
# Workers that are no daemons are joined at the exit. Those that are, the program's own end may kill at any time.
_STARTED_BY = "multiprocessing.process"
_IN_MEMORY = ("/dev/", "/proc/", "/memfd:")
_TO_WRITE = os.O_WRONLY | os.O_RDWR


class WriterProcesses:
    """The children of this process that write."""

    def __init__(self) -> None:
        self._looked = -inf
        self._any = False
        self._used: dict[int, float] = {}  # processor time of each child and its own, at the last look
        self._until: dict[int, float] = {}  # when each ceases to be one, if it shows nothing more

    def any(self) -> bool:
        """Whether there is one."""
        now = monotonic()
        if now >= self._looked + _LOOK:
            self._looked = now
            # At all of them, whatever the first ones do: who computes shows from one look to the next.
            writing = [child for child in _children() if self._writes(child, now)]
            self._any = bool(writing)
        return self._any

    def _writes(self, child: int, now: float) -> bool:
        life = procfs.age_and_use(child)
        if life is None:
            return False
        offspring = procfs.descendants(child)  # Megatron-core's has writers of its own
        lives = [life, *filter(None, map(procfs.age_and_use, offspring))]
        used, before = sum(use for _, use in lives), self._used.get(child)
        self._used[child] = used
        computes = used != before and min(lives)[0] < _YOUNG
        if computes or any(map(_has_file_to_write, [child, *offspring])):
            self._until[child] = now + _MOMENT
        return now < self._until.get(child, -inf)


def _children() -> Iterator[int]:
    for child in list(getattr(sys.modules.get(_STARTED_BY), "_children", ())):
        popen = getattr(child, "_popen", None)
        # Not by waiting for it: its exit code is the program's to read.
        if popen is not None and not child.daemon and popen.returncode is None:
            yield popen.pid


def _has_file_to_write(pid: int) -> bool:
    try:
        files = procfs.open_files(pid)
    except FileNotFoundError:
        return False  # it has ended
    except OSError:
        return True  # it cannot be seen: time is worth less than a checkpoint
    to_write = {path for path, flags in files if flags & _TO_WRITE and not flags & os.O_APPEND}
    to_write = {path for path in to_write if not path.startswith(_IN_MEMORY)}
    return bool(to_write) and not to_write <= {path for path, _ in procfs.open_files(os.getpid())}
