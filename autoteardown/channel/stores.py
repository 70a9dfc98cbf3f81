"""The stores that a process group can have, and a line to each: pushed on a TCPStore, polled on any other."""

from __future__ import annotations

import os
import queue
import resource
import socket
import stat
import sys
import weakref
from typing import Any, Callable, NamedTuple

from autoteardown.channel.relay import Over, Relay

_IDLE_POLL, _BUSY_POLL = 1.0, 0.05
_SPARE_FDS = 256


class NoLine(Exception):
    """Why there is none, in words for a person."""


class Line(NamedTuple):
    """How to reach a group's store."""

    line: Relay | Polled
    namespace: str  # goes into the keys: the line may lead to a store that other groups share
    is_host: bool  # this process hosts the store's server


def line_to(store: Any, rank: int, world: int) -> Line:
    """The line to the store of a group. One operation on that store itself if it is a TCPStore, else none."""
    c10d = sys.modules["torch.distributed"]
    root = store
    while isinstance(root, c10d.PrefixStore):
        root = root.underlying_store
    if root is None or type(root) is c10d.Store:
        raise NoLine("this process group has no store (MPI)")
    if not isinstance(root, c10d.TCPStore):
        return Line(Polled(store), "", False)
    _afford(world)
    # Prefixes cannot be read, and our clients know only the root. So the group's own store, prefixes and all, holds a
    # name that is the same for all of its ranks and no other group's.
    name = store.compare_set("autoteardown", "", os.urandom(8).hex()).decode()
    return Line(Relay(c10d.TCPStore, root.host, root.port, rank), name, _hosts(root.port, rank))


def _afford(world: int) -> None:
    # The process that hosts the store needs three descriptors a rank instead of one, and one that runs out of them
    # fails in the application's code. Its limit is not known here: take ours, ranks of a job are made alike.
    limit, need = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 3 * world + _SPARE_FDS
    if limit != resource.RLIM_INFINITY and limit < need:
        raise NoLine(
            f"the store's host needs {need} file descriptors for {world} ranks, the limit is {limit}"
        )


def _hosts(port: int, rank: int) -> bool:
    """Does this process listen on the store's port?"""
    try:
        fds = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return any(_listens(fd, port) for fd in fds)


def _listens(fd: int, port: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as copy:
            return (
                copy.family in (socket.AF_INET, socket.AF_INET6)
                and copy.getsockname()[1] == port
                and bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            )
    except OSError:
        return False


class Polled:
    """What `Relay` is for a TCPStore, for any other store: nobody pushes, so look now and then."""

    def __init__(self, store: Any) -> None:
        self.over: str | None = None  # why the line is no more
        # Weakly: a FileStore removes its file when its last reference goes, and that must not wait for us.
        self._store = weakref.ref(store)
        self._interval = _IDLE_POLL
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended: Callable[[str], None] | None = None
        self._ending = [True]  # popped by whoever ends the line: only one can

    def connect(self, ended: Callable[[str], None]) -> None:
        """`ended` is called once, with a reason, if the line is lost. No operation."""
        self._ended = ended
        self.check()

    def check(self) -> None:
        """Raise `Over` if the line is closed or lost."""
        if self.over is not None:
            raise Over(self.over)

    def read(self, key: str) -> bytes:
        """Wait for a key and return its value. One operation a look, and one more."""
        while True:
            store = self.store()
            if store.check([key]):
                return bytes(store.get(key))
            del store
            try:
                self._wake.get(timeout=self._interval)
            except queue.Empty:
                pass

    def store(self) -> Any:
        """The store to post with."""
        self.check()
        store = self._store()
        if store is None:
            raise Over("the store is gone")
        return store

    def hurry(self) -> None:
        """Something is going on: look more often from now on."""
        self._interval = _BUSY_POLL
        self._wake.put(None)

    def end(self, reason: str, lost: bool = True) -> None:
        """End the line, from any thread; a thread in `read` comes back."""
        try:
            self._ending.pop()
        except IndexError:
            return
        self.over = reason
        if lost and self._ended is not None:
            self._ended(reason)
        self._wake.put(None)

    def abandon(self) -> None:
        """Nobody waits in C++ here."""

    def forget(self) -> None:
        """In a forked child: this is the parent's."""
        self.over = self.over or "forked"
