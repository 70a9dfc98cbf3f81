"""Descriptors for a hub with thousands of connections, in a program that may be allowed 1,024.

The soft limit is 1,024 for the sake of programs that call select(2), which cannot take higher numbers; the hard limit
is what an administrator means. So the hub raises the soft limit as far as it needs, and keeps the low numbers for the
program: its connections get numbers from 1,024 on. Rejected: one rank a node that relays for the others. It is one
more thing to die, to be found again and to be told of, for a limit that the images in use do not have.
"""

from __future__ import annotations

import fcntl
import os
import resource
import termios
from typing import TYPE_CHECKING, Callable

from autoteardown import unpatched
from autoteardown.event_loop import sockets
from autoteardown.fail_open import failed

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop

SPARE = 256
"""Descriptors that the hub leaves to the program."""
_SELECT = 1024
_BATCH = 1024

_not_ours: list[object] = []


def afford(wanted: int) -> int:
    """Raise the soft limit if so many connections need it.

    Returns:
        How many of them there is room for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = SPARE
    if used + wanted + SPARE > soft:
        need = max(_SELECT, used) + wanted + SPARE
        most = need if hard == resource.RLIM_INFINITY else min(need, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
            soft = max(soft, most)
        except (OSError, ValueError):
            pass
    return max(0, min(wanted, soft - used - SPARE))


def high(fd: int) -> int:
    """The same open file at a number that select(2) has no use for, where there is one."""
    if fd >= _SELECT:
        return fd
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SELECT)
    except OSError:
        return fd
    os.close(fd)
    return moved


def make_room(count: int) -> None:
    """Have the kernel make its table of descriptors long enough at once: in a program with threads, each time takes
    it a while.
    """
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _SELECT + count))
    except OSError:  # no descriptor 0, or not that many
        pass


def unsent(fd: int) -> int:
    """Bytes in the kernel that the other end has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), "little")


class Crowd:
    """Many descriptors for the loop to watch, at the price of those with news.

    Args:
        loop: the rank's.
        after: called when all the news of one moment have been told.
    """

    def __init__(self, loop: Loop, after: Callable[[], object]) -> None:
        self._loop, self._after = loop, after
        self._callbacks: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._epoll = unpatched.epoll() if unpatched.epoll is not None else None
        if self._epoll is not None:
            self._fd: int = self._epoll.fileno()
            self._identity = sockets.identity(self._fd)
            loop.watch(self._fd, 1, self._news)  # POLLIN

    def watch(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """As the loop's."""
        known = self._callbacks.get(fd)
        self._callbacks[fd] = (events, callback)
        if self._epoll is None:
            self._loop.watch(fd, events, lambda events: self._one(fd, events))
        elif known is None:
            self._epoll.register(fd, events)
        elif known[0] != events:
            self._epoll.modify(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Have one that is watched watched for these events."""
        known = self._callbacks.get(fd)
        if known is not None and known[0] != events:
            self.watch(fd, events, known[1])

    def unwatch(self, fd: int) -> None:
        """As the loop's."""
        if self._callbacks.pop(fd, None) is None:
            return
        if self._epoll is None:
            self._loop.unwatch(fd)
            return
        try:
            self._epoll.unregister(fd)
        except OSError:  # closed under us
            pass

    @property
    def quiet(self) -> bool:
        """Whether there is no news just now. If there is, `after` will be called again."""
        return self._epoll is None or not self._epoll.poll(0, 1)

    def close(self) -> None:
        """Watch nothing any more. In a forked child nothing but our descriptor is touched."""
        self._callbacks.clear()
        if self._epoll is not None:
            self._loop.unwatch(self._fd)
            try:
                known = sockets.identity(self._fd) == self._identity
            except OSError:
                known = False
            if known:
                self._epoll.close()
            else:  # the program has closed it, and may have a file of its own there: nobody may close that
                _not_ours.append(self._epoll)
                self._epoll = None

    def _news(self, events: int) -> None:
        assert self._epoll is not None
        for fd, found in self._epoll.poll(0, _BATCH):
            self._tell(fd, found)
        self._after()

    def _one(self, fd: int, events: int) -> None:
        self._tell(fd, events)
        self._after()

    def _tell(self, fd: int, events: int) -> None:
        known = self._callbacks.get(fd)
        if known is None:
            return
        try:
            known[1](events)
        except BaseException as error:
            self.unwatch(fd)
            failed("a connection of the hub", error)
