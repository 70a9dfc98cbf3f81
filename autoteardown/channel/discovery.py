"""Finds the group's hub for a rank: reads its address from the store and connects, with retries and back-off."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Optional, Protocol

from autoteardown.channel.connect import Connector, Link
from autoteardown.channel.rendezvous import STORE_CLOSED

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress, Rendezvous
    from autoteardown.event_loop.loop import Loop, Timer

# Seconds until the next try: at first, at most, at most after some minutes of failures, at most while posts wait.
# The hub depends on the second: see hub.DEAD_AFTER.
_FIRST_WAIT, _IDLE_WAIT, _LONG_WAIT, _BUSY_WAIT = 0.02, 2.0, 30.0, 0.5
_STORE_WAIT = 1.5  # seconds for the thread that reads the store
# Failed tries (0.1 s) before the store is read again: the rank that died may have been the store's server, and c10d
# prints a long backtrace when a client asks at that moment.
_TRIES_BEFORE_STORE = 3
_MANY_TRIES = 60
_TRIES_AFTER_LEAVE = 20  # after rank 0 has left
_FIRST_TRY_AFTER_LEAVE = (
    7  # the count at which the back-off starts then: 2 s, in which the other ranks leave as well
)
_WAIT_AFTER_LEAVE = 5.0  # seconds, at most, then: all ranks read the store, which has one thread


class DiscoveryClient(Protocol):
    """What `Discovery` needs from the connection that it serves."""

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated connection to the hub."""

    @property
    def waiting(self) -> bool:
        """Whether there are posts that no hub has acknowledged."""

    def hello(self, address: HubAddress) -> tuple[int, int, str, int, int, int]:
        """Return the fields of the first line (see `Connector`)."""

    def found(self, link: Link, seen: int, lines: list[list[Any]]) -> object:
        """Take over an authenticated link (arguments as `Connector`'s `done`)."""


class Discovery:
    """Finds the hub and connects to it, again whenever the connection is lost. Every method runs on the loop thread.

    Args:
        loop: the rank's event loop.
        rendezvous: reads the hub's address from the store.
        client: the connection that takes over the link.
        world: number of ranks that search.
    """

    def __init__(self, loop: Loop, rendezvous: Rendezvous, client: DiscoveryClient, world: int) -> None:
        self.address: Optional[HubAddress] = None
        self.why = "rank 0 has not published its hub"  # why there is no connection
        self._loop, self._rendezvous, self._client = loop, rendezvous, client
        self._first_wait = max(_FIRST_WAIT, world * 50e-6)  # a store's server has one thread
        self._attempt: Optional[Connector] = None
        self._retry: Optional[Timer] = None
        self._tries = 0
        self._rank_0_left = False
        self.store_closed = False
        """Whether the process that serves the store has ended: rank 0, or its launcher."""
        self._closed = False

    def start(self) -> None:
        """Start a try, unless one is in progress or none is needed."""
        if self._closed or self._attempt is not None or (self._client.connected and not self._client.waiting):
            return
        if self._retry is not None:
            self._retry.cancel()
        address = self.address
        if address is None:
            self._read_store()
            # The thread that reads may block in the store for long, so the retry does not depend on its answer.
            self._retry = self._loop.at(_STORE_WAIT, self._schedule)
            return
        done: list[tuple[Any, ...]] = []

        def finished(*result: Any) -> None:
            if self._attempt is None:
                done.append(result)  # called from the constructor
            else:
                self._attempt_ended(*result)

        attempt = Connector(self._loop, address, lambda: self._client.hello(address), finished)
        if done:
            self._attempt_ended(*done[0])
        else:
            self._attempt = attempt

    def expedite(self) -> None:
        """Shorten the wait for the next try, because a post waits."""
        if self._attempt is None and self._retry is not None and self._tries > 1:
            self._tries = 1
            self._schedule()

    def after_rank_0_left(self) -> None:
        """Look for another hub after rank 0 has closed this one: slowly, and for a limited number of tries."""
        self._rank_0_left = True
        self._tries = _FIRST_TRY_AFTER_LEAVE
        self.address = None
        self._schedule()

    def close(self) -> None:
        """Stop searching."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._attempt is not None:
            self._attempt.cancel()

    def _read_store(self) -> None:
        if self._closed:
            return
        reading = self._rendezvous.look(
            lambda address, why: self._loop.call(lambda: self._store_read(address, why))
        )
        if not reading and self.address is None:
            self.why = "the store does not answer"  # or the program itself waits in it

    def _store_read(self, address: Optional[HubAddress], why: str) -> None:
        if self._closed or self._client.connected:
            return
        self.store_closed = why == STORE_CLOSED
        if address is None:
            if self.address is None:
                self.why = why
                self._schedule()
            return
        changed = address != self.address
        self.address = address
        if changed:
            if self._attempt is not None:
                self._attempt.cancel()
                self._attempt = None
            self._tries = 0
            self.start()

    def _schedule(self) -> None:
        """Schedule the next try with exponential back-off; the wait stays short while posts wait."""
        waiting = self._client.waiting
        if self._closed or (self._rank_0_left and not waiting and self._tries > _TRIES_AFTER_LEAVE):
            return
        longest = _IDLE_WAIT if self._tries < _MANY_TRIES else _LONG_WAIT
        if self._rank_0_left:
            longest = _WAIT_AFTER_LEAVE
        if waiting:
            longest = _BUSY_WAIT
        wait = min(longest, self._first_wait * 2.0 ** min(self._tries, 12)) * random.uniform(0.7, 1.3)
        self._tries += 1
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.at(wait, self.start)

    def _attempt_ended(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        self._attempt = None
        if link is None:
            if not self._client.connected:
                self.why = f"the hub cannot be reached: {why}"
                if self._tries >= _TRIES_BEFORE_STORE:
                    self._read_store()  # the address may be that of an earlier group
            self._schedule()
            return
        self._rank_0_left = False
        self._tries = 0
        self._client.found(link, seen, lines)
