"""A page of memory that an armed rank shares with its child processes: it says whether the rank is being evicted.

1. It is a memfd: it needs no folder, and works with a full disk and a read-only root. A forked child has it mapped; a
   spawned one finds it among the open files of its parent.
2. Beside it there is a pipe, whose writing end only the rank holds. The kernel closes that end when the rank ends,
   whatever ends it.
3. Each process has two bytes of its own, found by its pid, so no two processes ever have to agree on who writes where.
   The memory is sparse: only what has been written takes room.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Optional

from autoteardown.unpatched import monotonic

_NAME = "autoteardown-children"
_EVICTED = struct.Struct(
    "=d"
)  # at offset 0: until when (CLOCK_MONOTONIC) a signal is part of the rank's eviction
_ARMED = 8
_RANK = struct.Struct("=qq")  # at offset 16: the pid of the rank, and its number of the pipe's reading end
_RANK_AT = 16
_CHILDREN_AT = 4096
_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT of 64-bit Linux
_SIZE = _CHILDREN_AT + 2 * _MOST_PIDS

# What a child's first byte says.
SIGNALS_ARE_ITS_OWN = 0  # the application handles its signals, or it is not attached
WAITS = 1  # a signal that its rank gets, too, does not end it
ENDS_WITH_RANK = 2  # as WAITS; and it is to end when its rank does


class EvictionPage:
    """The page, in the rank that has made it or in a child."""

    def __init__(self, memory: mmap.mmap, pipe: int, writing: int = -1) -> None:
        self._memory = memory
        self.pipe = pipe
        """The reading end of the pipe that closes with the rank."""
        self._writing = writing

    @classmethod
    def create(cls) -> EvictionPage:
        """Make the page of this rank.

        Raises:
            OSError: the kernel has no memfd, or this process may open no more files.
            AttributeError: this platform has no memfd.
        """
        file = os.memfd_create(_NAME)
        try:
            os.ftruncate(file, _SIZE)
            memory = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)  # the map has a duplicate of its own
        reading, writing = os.pipe()
        _RANK.pack_into(memory, _RANK_AT, os.getpid(), reading)
        return cls(memory, reading, writing)

    @classmethod
    def of_parent(cls) -> Optional[EvictionPage]:
        """Open the page that the parent of this process has; None if the parent has none.

        Raises:
            OSError: the parent's files cannot be read, or the rank has ended.
        """
        folder = f"/proc/{os.getppid()}/fd"
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            try:
                if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                    continue
            except OSError:  # closed meanwhile
                continue
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                memory = mmap.mmap(file, _SIZE)
            finally:
                os.close(file)
            rank, reading = _RANK.unpack_from(memory, _RANK_AT)
            pipe = os.open(f"/proc/{rank}/fd/{reading}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return cls(memory, pipe)
        return None

    # -- the rank ----------------------------------------------------------------------------------------------------

    @property
    def armed(self) -> bool:
        """Whether the rank is armed."""
        return bool(self._memory[_ARMED])

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._memory[_ARMED] = armed

    def evicted_for(self, seconds: float) -> None:
        """The rank has got an eviction signal, and will have ended in so many seconds."""
        _EVICTED.pack_into(self._memory, 0, monotonic() + seconds)

    @property
    def evicted(self) -> bool:
        """Whether the rank has got an eviction signal."""
        return bool(monotonic() < _EVICTED.unpack_from(self._memory, 0)[0])

    def close_writing_end(self) -> None:
        """In a forked child: the pipe closes with the rank, and not with this process."""
        writing, self._writing = self._writing, -1
        if writing != -1:
            os.close(writing)

    # -- a child -----------------------------------------------------------------------------------------------------

    def state(self, pid: int) -> int:
        """What has been noted of a child."""
        return self._memory[_CHILDREN_AT + 2 * pid] if 0 < pid < _MOST_PIDS else SIGNALS_ARE_ITS_OWN

    def set_state(self, pid: int, state: int) -> None:
        """Note what holds for a child from now on. Only the child itself does so.

        Raises:
            IndexError: this pid has no place.
        """
        self._memory[_CHILDREN_AT + 2 * pid] = state

    def terminated(self, pid: int) -> bool:
        """Whether a process of the rank has sent this child a signal itself."""
        return bool(self._memory[_CHILDREN_AT + 2 * pid + 1])

    def set_terminated(self, pid: int, terminated: bool) -> None:
        """Note that a process of the rank sends this child a signal itself."""
        self._memory[_CHILDREN_AT + 2 * pid + 1] = terminated
