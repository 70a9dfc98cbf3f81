"""On the way to the hub: several of its addresses at a time, and the first that lets us in wins."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown.channel.wire import FIRST, Lines, Malformed, encode, proof, proven, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.sockets import ConnectionClosed, Stream
from autoteardown.node.entry import printable, text

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

_STAGGER = 0.25  # seconds until the next address is tried as well
# The same where the connection is there, and its other end is yet to speak: a hub that thousands come to at once is not
# helped by a second connection of each.
_ANSWER = 2.0
_TIMEOUT = 8.0  # seconds for one address: time for three lost packets that would open the connection


class Link(Stream):
    """A connection with the hub, and the lines that come over it."""

    def __init__(self, sock: Any, where: str) -> None:
        super().__init__(sock)
        self.where = where  # for people
        self.lines = Lines()


class Connector:
    """One round of attempts. Everything happens on the loop thread.

    Args:
        loop: the rank's.
        card: who to look for, and where.
        hello: rank, world, member, attempt, heard and near, as the hub wants them. Each attempt uses up a number.
        done: called once: with a link that has been let in, the posts that the hub has seen and the lines that came
            after its welcome; or with None and the reason why there is none.
    """

    def __init__(
        self,
        loop: Loop,
        address: HubAddress,
        hello: Callable[[], tuple[int, int, str, int, int, int]],
        done: Callable[[Optional[Link], int, list[list[Any]], str], object],
    ) -> None:
        self._loop, self.address, self._hello, self._done = loop, address, hello, done
        self._route = address.route()
        self._tried: dict[int, Link] = {}
        # One of them at a time says hello: the hub takes a second one as the end of the first.
        self._speaking: Optional[Link] = None
        self._promised = ""  # the proof that the hub owes it
        self._arrivals: list[Link] = []  # wait for their turn
        self._next: Optional[Timer] = None
        self._over = False
        self._why = "it has published no address"
        self._end = loop.at(_TIMEOUT, self._time_out)
        self._try_next()

    def cancel(self) -> None:
        """No more of it; `done` is not called."""
        self._over = True
        self._end.cancel()
        if self._next is not None:
            self._next.cancel()
        for link in list(self._tried.values()):
            self._loop.unwatch(link.fd)
            link.close()
        self._tried.clear()

    def _try_next(self) -> None:
        if self._over:
            return
        if self._next is not None:
            self._next.cancel()
        while self._route:
            host, port = self._route.pop(0)
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            try:
                link = Link(sockets.connect(host, port), where)
            except OSError as error:
                self._why = f"{where}: {sockets.words(error)}"
                continue
            self._tried[link.fd] = link
            self._loop.watch(link.fd, sockets.WRITE, functools.partial(self._arrived, link))
            self._next = self._loop.at(_STAGGER, self._try_next)
            return
        if not self._tried:
            self._finish(None, 0, [], self._why)

    def _arrived(self, link: Link, events: int) -> None:
        try:
            link.connected()
            self._loop.watch(link.fd, sockets.READ, functools.partial(self._hear, link))
            if self._speaking is None:
                self._speak(link)
            else:
                self._arrivals.append(link)
        except ConnectionClosed as error:
            self._drop(link, str(error))

    def _speak(self, link: Link) -> None:
        hello = self._hello()
        self._speaking = link
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.at(_ANSWER, self._try_next)
        self._promised = proof(self.address.token, "welcome", *hello)
        link.send(encode("hello", *hello, proof(self.address.token, "hello", *hello)))

    def _hear(self, link: Link, events: int) -> None:
        try:
            lines = link.lines.feed(link.receive(FIRST))
            if not lines:
                return
            kind, *rest = lines.pop(0)
            if kind == "no" and len(rest) == 1:
                raise ConnectionClosed(printable(text(rest[0])))
            # A stranger may listen at an address that was the hub's.
            if link is not self._speaking or kind != "welcome" or len(rest) != 2:
                raise Malformed("not what a hub says")
            if not proven(rest[1], self._promised):
                raise Malformed("a hub without this group's token")
            self._finish(link, whole(rest[0]), lines, "")
        except (ConnectionClosed, Malformed) as error:
            self._drop(link, str(error))

    def _drop(self, link: Link, why: str) -> None:
        self._why = f"{link.where}: {why}"
        self._tried.pop(link.fd)
        self._loop.unwatch(link.fd)
        link.close()
        if link in self._arrivals:
            self._arrivals.remove(link)
        if link is self._speaking:
            self._speaking = None
            if self._arrivals:
                other = self._arrivals.pop(0)
                try:
                    self._speak(other)
                except ConnectionClosed as error:
                    self._drop(other, str(error))
        self._try_next()

    def _time_out(self) -> None:
        self._route.clear()
        where = ", ".join(link.where for link in self._tried.values())
        self._finish(None, 0, [], f"{where}: timed out")

    def _finish(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        if self._over:
            return
        if link is not None:
            self._tried.pop(link.fd)
            self._loop.unwatch(link.fd)
        self.cancel()
        self._done(link, seen, lines, why)
