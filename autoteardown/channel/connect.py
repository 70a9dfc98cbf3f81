"""Connects a rank to the hub: tries the published addresses in parallel, and keeps the first that authenticates."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown.channel.wire import FIRST, Lines, Malformed, encode, is_proof, proof, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.sockets import ConnectionClosed, Stream
from autoteardown.node.entry import printable, text

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

_STAGGER = 0.25  # seconds until the next address is tried in parallel
# The same once a connection is established and the hub has not answered: when thousands of ranks connect at once, a
# second connection from each would slow the hub down further.
_ANSWER = 2.0
_TIMEOUT = 8.0  # seconds for all attempts of one round: enough for three lost SYN packets


class Link(Stream):
    """A connection to the hub, and the parser of the lines that it receives."""

    def __init__(self, sock: Any, where: str) -> None:
        super().__init__(sock)
        self.where = where  # host and port, for messages
        self.lines = Lines()


class Connector:
    """One round of connection attempts. Every method runs on the loop thread.

    Args:
        loop: the rank's event loop.
        address: the hub's published address, with the token.
        hello: returns rank, world, incarnation, attempt, received and same_host (see `admission.Hello`). Each call uses
            up an attempt number.
        done: called once: with an authenticated link, the number of the last post that the hub has, and the lines that
            followed its welcome; or with None, 0, no lines, and the reason for the failure.
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
        # Only one link at a time sends a hello: the hub closes a rank's first connection when a second authenticates.
        self._authenticating: Optional[Link] = None
        self._expected_proof = ""  # that the hub knows the token
        self._established: list[Link] = []  # links that wait until they may send a hello
        self._next: Optional[Timer] = None
        self._finished = False
        self._why = "it has published no address"
        self._timeout = loop.at(_TIMEOUT, self._time_out)
        self._try_next()

    def cancel(self) -> None:
        """Close every attempt; `done` is not called."""
        self._finished = True
        self._timeout.cancel()
        if self._next is not None:
            self._next.cancel()
        for link in list(self._tried.values()):
            self._loop.unwatch(link.fd)
            link.close()
        self._tried.clear()

    def _try_next(self) -> None:
        if self._finished:
            return
        if self._next is not None:
            self._next.cancel()
        while self._route:
            host, port = self._route.pop(0)
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            try:
                link = Link(sockets.connect(host, port), where)
            except OSError as error:
                self._why = f"{where}: {sockets.reason(error)}"
                continue
            self._tried[link.fd] = link
            self._loop.watch(link.fd, sockets.WRITE, functools.partial(self._on_established, link))
            self._next = self._loop.at(_STAGGER, self._try_next)
            return
        if not self._tried:
            self._finish(None, 0, [], self._why)

    def _on_established(self, link: Link, events: int) -> None:
        try:
            link.check_connected()
            self._loop.watch(link.fd, sockets.READ, functools.partial(self._on_readable, link))
            if self._authenticating is None:
                self._send_hello(link)
            else:
                self._established.append(link)
        except ConnectionClosed as error:
            self._drop(link, str(error))

    def _send_hello(self, link: Link) -> None:
        hello = self._hello()
        self._authenticating = link
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.at(_ANSWER, self._try_next)
        self._expected_proof = proof(self.address.token, "welcome", *hello)
        link.send(encode("hello", *hello, proof(self.address.token, "hello", *hello)))

    def _on_readable(self, link: Link, events: int) -> None:
        try:
            lines = link.lines.feed(link.receive(FIRST))
            if not lines:
                return
            kind, *rest = lines.pop(0)
            if kind == "no" and len(rest) == 1:
                raise ConnectionClosed(printable(text(rest[0])))
            # Another program may listen at an address that was the hub's.
            if link is not self._authenticating or kind != "welcome" or len(rest) != 2:
                raise Malformed("the answer is not a hub's")
            if not is_proof(rest[1], self._expected_proof):
                raise Malformed("a hub without this group's token")
            self._finish(link, whole(rest[0]), lines, "")
        except (ConnectionClosed, Malformed) as error:
            self._drop(link, str(error))

    def _drop(self, link: Link, why: str) -> None:
        self._why = f"{link.where}: {why}"
        self._tried.pop(link.fd)
        self._loop.unwatch(link.fd)
        link.close()
        if link in self._established:
            self._established.remove(link)
        if link is self._authenticating:
            self._authenticating = None
            if self._established:
                other = self._established.pop(0)
                try:
                    self._send_hello(other)
                except ConnectionClosed as error:
                    self._drop(other, str(error))
        self._try_next()

    def _time_out(self) -> None:
        self._route.clear()
        where = ", ".join(link.where for link in self._tried.values())
        self._finish(None, 0, [], f"{where}: timed out")

    def _finish(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        if self._finished:
            return
        if link is not None:
            self._tried.pop(link.fd)
            self._loop.unwatch(link.fd)
        self.cancel()
        self._done(link, seen, lines, why)
