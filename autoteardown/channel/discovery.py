"""A rank in search of its group's hub: the card in the store, then the addresses on it, again and again if need be."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Optional, Protocol

from autoteardown.channel.connect import Connector, Link

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress, Rendezvous
    from autoteardown.event_loop.loop import Loop, Timer

# Seconds until the next try: the first, the longest, that after some minutes in vain, the longest while posts wait.
# The hub counts on the second: see hub.DEAD_AFTER.
_SOON, _IDLE_WAIT, _LONG_WAIT, _BUSY_WAIT = 0.02, 2.0, 30.0, 0.5
_STUCK_WAIT = 1.5
_SURE = 3  # tries, 0.1 s: a rank that dies may be the store's server, and c10d prints a page if one asks it just then
_MANY_TRIES = 60
_ENOUGH = 20  # tries after rank 0 has left
_AFTERWARDS = 7  # where the waits begin then: 2 s, in which the other ranks leave as well
_LATE_WAIT = 5.0  # seconds, the longest of those: all ranks look in the store then, which has one thread


class DiscoveryClient(Protocol):
    """For whom a search is made."""

    @property
    def connected(self) -> bool:
        """Whether there is a line to the hub."""

    @property
    def waiting(self) -> bool:
        """Whether there are posts that no hub has said that it has."""

    def hello(self, address: HubAddress) -> tuple[int, int, str, int, int, int]:
        """Rank, world, member, attempt, heard and near (see `Dial`)."""

    def found(self, link: Link, seen: int, lines: list[list[Any]]) -> object:
        """This one has let us in (see `Dial`)."""


class Discovery:
    """See above. Everything happens on the loop thread.

    Args:
        loop: the rank's.
        desk: where the hub's card is.
        seeker: who wants it.
        world: how many do.
    """

    def __init__(self, loop: Loop, rendezvous: Rendezvous, client: DiscoveryClient, world: int) -> None:
        self.address: Optional[HubAddress] = None
        self.why = "rank 0 has not published its hub"  # why nothing was found
        self._loop, self._rendezvous, self._client = loop, rendezvous, client
        self._soon = max(_SOON, world * 50e-6)  # a store's server has one thread
        self._attempt: Optional[Connector] = None
        self._retry: Optional[Timer] = None
        self._tries = 0
        self._ended = False
        self._closed = False

    def set_out(self) -> None:
        """Begin, unless it is under way or not needed."""
        if self._closed or self._attempt is not None or (self._client.connected and not self._client.waiting):
            return
        if self._retry is not None:
            self._retry.cancel()
        address = self.address
        if address is None:
            self._look()
            # The thread that looks may be stuck in the store for long: then no answer comes, and none is needed.
            self._retry = self._loop.at(_STUCK_WAIT, self._again)
            return
        done: list[tuple[Any, ...]] = []

        def finished(*result: Any) -> None:
            if self._attempt is None:
                done.append(result)  # at once, in the constructor
            else:
                self._attempt_ended(*result)

        attempt = Connector(self._loop, address, lambda: self._client.hello(address), finished)
        if done:
            self._attempt_ended(*done[0])
        else:
            self._attempt = attempt

    def hurry(self) -> None:
        """Something waits for it."""
        if self._attempt is None and self._retry is not None and self._tries > 1:
            self._tries = 1
            self._again()

    def after_the_end(self) -> None:
        """The hub is no more, as its rank has left: look whether there is another, without haste and not for ever."""
        self._ended = True
        self._tries = _AFTERWARDS
        self.address = None
        self._again()

    def close(self) -> None:
        """No more of it."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._attempt is not None:
            self._attempt.cancel()

    def _look(self) -> None:
        if self._closed:
            return
        looking = self._rendezvous.look(
            lambda address, why: self._loop.call(lambda: self._looked(address, why))
        )
        if not looking and self.address is None:
            self.why = "the store does not answer"  # or the program itself waits in it

    def _looked(self, address: Optional[HubAddress], why: str) -> None:
        if self._closed or self._client.connected:
            return
        if address is None:
            if self.address is None:
                self.why = why
                self._again()
            return
        news = address != self.address
        self.address = address
        if news:
            if self._attempt is not None:
                self._attempt.cancel()
                self._attempt = None
            self._tries = 0
            self.set_out()

    def _again(self) -> None:
        """Try again later: soon at first, and soon while posts wait."""
        waiting = self._client.waiting
        if self._closed or (self._ended and not waiting and self._tries > _ENOUGH):
            return
        longest = _IDLE_WAIT if self._tries < _MANY_TRIES else _LONG_WAIT
        if self._ended:
            longest = _LATE_WAIT
        if waiting:
            longest = _BUSY_WAIT
        wait = min(longest, self._soon * 2.0 ** min(self._tries, 12)) * random.uniform(0.7, 1.3)
        self._tries += 1
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.at(wait, self.set_out)

    def _attempt_ended(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        self._attempt = None
        if link is None:
            if not self._client.connected:
                self.why = f"the hub cannot be reached: {why}"
                if self._tries >= _SURE:
                    self._look()  # it may be another group's that was here before
            self._again()
            return
        self._ended = False
        self._tries = 0
        self._client.found(link, seen, lines)
