"""Tells whether a child process of the program writes a checkpoint, as Megatron-core's asynchronous writer does.

1. A writer is started like the worker of a pool, an evaluator, or an environment of reinforcement learning. It
   differs in what it does: it has a file open for writing. A file that this process has open, too, does not count:
   the child inherited it (its output goes there). Nor does one opened for appending (a log), or one that lies in
   memory only.
2. A child that is between two files, or on its way to the first, counts for a moment longer.
3. Used during a stop only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import inf

from autoteardown.node import procfs
from autoteardown.unpatched import monotonic

_LOOK = 0.1  # seconds between two checks of the processes
_MOMENT = 0.5  # seconds from one file of a checkpoint to the next
_YOUNG = 5.0  # seconds after its start in which a process that computes may be on its way to its first file
# multiprocessing joins children that are not daemons at exit. Daemons may be killed at any time, also by the program's
# own end.
_STARTED_BY = "multiprocessing.process"
_IN_MEMORY = ("/dev/", "/proc/", "/memfd:")
_TO_WRITE = os.O_WRONLY | os.O_RDWR


class WriterProcesses:
    """The child processes that write a checkpoint."""

    def __init__(self) -> None:
        self._looked = -inf
        self._any = False
        # processor seconds of each child and its descendants, at the last check
        self._used: dict[int, float] = {}
        self._until: dict[int, float] = {}  # until when each counts as a writer, without new evidence

    def any(self) -> bool:
        """Whether a child process writes a checkpoint."""
        now = monotonic()
        if now >= self._looked + _LOOK:
            self._looked = now
            # Check every child, also after one that writes: two checks are needed to see that a child computes.
            writing = [child for child in _children() if self._writes(child, now)]
            self._any = bool(writing)
        return self._any

    def _writes(self, child: int, now: float) -> bool:
        life = procfs.age_and_use(child)
        if life is None:
            return False
        offspring = procfs.descendants(child)  # Megatron-core's writer has writers of its own
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
        # Not by waitpid: the exit code is the program's to read.
        if popen is not None and not child.daemon and popen.returncode is None:
            yield popen.pid


def _has_file_to_write(pid: int) -> bool:
    try:
        files = procfs.open_files(pid)
    except FileNotFoundError:
        return False  # the process has ended
    except OSError:
        return True  # it cannot be inspected; waiting is better than a torn checkpoint
    to_write = {path for path, flags in files if flags & _TO_WRITE and not flags & os.O_APPEND}
    to_write = {path for path in to_write if not path.startswith(_IN_MEMORY)}
    return bool(to_write) and not to_write <= {path for path, _ in procfs.open_files(os.getpid())}
