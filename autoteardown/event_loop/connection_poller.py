"""Watches thousands of connections through one epoll descriptor, which the event loop watches like any other.

The loop's own `poll` costs time for every descriptor at each turn; epoll costs time only for those with events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from autoteardown import unpatched
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop

_BATCH = 1024  # events that are read at a time

_abandoned: list[object] = []


class ConnectionPoller:
    """Calls a callback for each watched descriptor that has events.

    Args:
        loop: the rank's event loop.
        after_batch: called after the callbacks of one batch of events.
    """

    def __init__(self, loop: Loop, after_batch: Callable[[], object]) -> None:
        self._loop, self._after_batch = loop, after_batch
        self._callbacks: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._epoll = unpatched.epoll() if unpatched.epoll is not None else None
        if self._epoll is not None:
            self._fd: int = self._epoll.fileno()
            self._identity = sockets.identity(self._fd)
            loop.watch(self._fd, 1, self._on_batch)  # POLLIN

    def watch(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(events)` while the descriptor has such events (as `Loop.watch`)."""
        known = self._callbacks.get(fd)
        self._callbacks[fd] = (events, callback)
        if self._epoll is None:
            self._loop.watch(fd, events, lambda events: self._on_one(fd, events))
        elif known is None:
            self._epoll.register(fd, events)
        elif known[0] != events:
            self._epoll.modify(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Change the events that a descriptor is watched for; one that is not watched is ignored."""
        known = self._callbacks.get(fd)
        if known is not None and known[0] != events:
            self.watch(fd, events, known[1])

    def unwatch(self, fd: int) -> None:
        """Stop watching a descriptor (as `Loop.unwatch`)."""
        if self._callbacks.pop(fd, None) is None:
            return
        if self._epoll is None:
            self._loop.unwatch(fd)
            return
        try:
            self._epoll.unregister(fd)
        except OSError:  # the program has closed the descriptor
            pass

    @property
    def quiet(self) -> bool:
        """Whether no descriptor has events. If one has, `after_batch` will be called again."""
        return self._epoll is None or not self._epoll.poll(0, 1)

    def close(self) -> None:
        """Stop watching. In a forked child this touches nothing but the epoll descriptor's copy."""
        self._callbacks.clear()
        if self._epoll is not None:
            self._loop.unwatch(self._fd)
            try:
                known = sockets.identity(self._fd) == self._identity
            except OSError:
                known = False
            if known:
                self._epoll.close()
            else:
                # The program has closed the descriptor, and may have a file of its own at that number. The epoll object
                # would close that file when it is freed, so it is kept.
                _abandoned.append(self._epoll)
                self._epoll = None

    def _on_batch(self, events: int) -> None:
        assert self._epoll is not None
        for fd, found in self._epoll.poll(0, _BATCH):
            self._call(fd, found)
        self._after_batch()

    def _on_one(self, fd: int, events: int) -> None:
        self._call(fd, events)
        self._after_batch()

    def _call(self, fd: int, events: int) -> None:
        known = self._callbacks.get(fd)
        if known is None:
            return
        try:
            known[1](events)
        except BaseException as error:
            self.unwatch(fd)
            report_failure("a connection of the hub", error)
