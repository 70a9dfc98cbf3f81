"""On the way to the hub: several of its addresses at a time, and the first that lets us in wins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown.channel import sockets
from autoteardown.channel.messages import Lines, Malformed, encode, name_of, proof, proven, whole
from autoteardown.channel.sockets import Ended, Stream
from autoteardown.node.record import printable, text

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import Card
    from autoteardown.rank.loop import Loop, Timer

_STAGGER = 0.25  # seconds until the next address is tried as well
_TIMEOUT = 8.0  # seconds for one address: time for three lost packets that would open the connection


class Link(Stream):
    """A connection with the hub, and the lines that come over it."""

    def __init__(self, sock: Any, where: str) -> None:
        super().__init__(sock)
        self.where = where  # for people
        self.lines = Lines()


class Dial:
    """One round of attempts. Everything happens on the loop thread.

    Args:
        loop: the rank's.
        card: who to look for, and where.
        hello: rank, world, member and heard, as the hub wants them.
        done: called once: with a link that has been let in, the posts that the hub has seen and the lines that came
            after its welcome; or with None and the reason why there is none.
    """

    def __init__(
        self,
        loop: Loop,
        card: Card,
        hello: tuple[int, int, str, int],
        done: Callable[[Optional[Link], int, list[list[Any]], str], object],
    ) -> None:
        self._loop, self.card, self._hello, self._done = loop, card, hello, done
        self._route = card.route()
        self._tried: dict[int, tuple[Link, str]] = {}  # and the proof that the hub owes us
        self._greeted: list[tuple[Link, Any]] = []  # with nonces: waiting for their turn
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
        for link, _ in self._tried.values():
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
            self._tried[link.fd] = (link, "")
            self._loop.watch(link.fd, sockets.WRITE, lambda events, link=link: self._arrived(link))  # type: ignore[misc]
            self._next = self._loop.at(_STAGGER, self._try_next)
            return
        if not self._tried:
            self._finish(None, 0, [], self._why)

    def _arrived(self, link: Link) -> None:
        try:
            link.connected()
            self._loop.watch(link.fd, sockets.READ, lambda events: self._hear(link))
        except Ended as error:
            self._drop(link, str(error))

    def _hear(self, link: Link) -> None:
        try:
            lines = link.lines.feed(link.receive())
            while lines:
                kind, *rest = lines.pop(0)
                if kind == "hub" and len(rest) == 2 and not self._tried[link.fd][1]:
                    self._greet(link, *rest)
                elif kind == "welcome" and len(rest) == 2 and proven(rest[0], self._tried[link.fd][1] or "-"):
                    self._finish(link, whole(rest[1]), lines, "")
                    return
                elif kind == "no" and len(rest) == 1:
                    raise Ended(printable(text(rest[0])))
                else:
                    raise Malformed("not what a hub says")
        except (Ended, Malformed) as error:
            self._drop(link, str(error))

    def _greet(self, link: Link, name: Any, nonce: Any) -> None:
        if name_of(name) != self.card.name:
            raise Ended("somebody else listens there")
        # One at a time: a second hello would end the connection of the first.
        if any(promised for _, promised in self._tried.values()):
            self._greeted.append((link, name_of(nonce)))
        else:
            self._introduce(link, name_of(nonce))

    def _introduce(self, link: Link, nonce: str) -> None:
        rank, world, member, heard = self._hello
        own = os.urandom(8).hex()
        said = (nonce, own, rank, world, member, heard)
        self._tried[link.fd] = (link, proof(self.card.token, "welcome", *said))
        link.send(encode("hello", own, *self._hello, proof(self.card.token, "hello", *said)))

    def _drop(self, link: Link, why: str) -> None:
        self._why = f"{link.where}: {why}"
        _, promised = self._tried.pop(link.fd)
        self._loop.unwatch(link.fd)
        link.close()
        self._greeted = [each for each in self._greeted if each[0] is not link]
        if promised and self._greeted:
            other, nonce = self._greeted.pop(0)
            try:
                self._introduce(other, nonce)
            except Ended as error:
                self._drop(other, str(error))
        self._try_next()

    def _time_out(self) -> None:
        self._route.clear()
        where = ", ".join(link.where for link, _ in self._tried.values())
        self._finish(None, 0, [], f"{where}: timed out")

    def _finish(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        if self._over:
            return
        if link is not None:
            self._tried.pop(link.fd)
            self._loop.unwatch(link.fd)
        self.cancel()
        self._done(link, seen, lines, why)
