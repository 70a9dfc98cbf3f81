"""Watches thousands of connections through one epoll descriptor, which the event loop watches like any other.

The loop's own `poll` costs time for every descriptor at each turn; epoll costs time only for those with news.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from autoteardown import unpatched
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop

_BATCH = 1024  # events that are read at a time

_not_ours: list[object] = []


class ConnectionPoller:
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
            report_failure("a connection of the hub", error)
