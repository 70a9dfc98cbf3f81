"""A rank's one connection with the hub: found, kept, and made again for as long as the group lives.

What is posted is kept until the hub has said that it has it, and sent again over the next connection; the hub counts
each post once. What the hub says is numbered, and a new connection goes on where the last one was cut.
"""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import unpatched
from autoteardown.channel.connect import Link
from autoteardown.channel.discovery import Discovery
from autoteardown.channel.wire import Malformed, encode, kind_of, whole
from autoteardown.event_loop.sockets import READ, ConnectionClosed
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress, Rendezvous
    from autoteardown.event_loop.loop import Loop, Timer

Deliver = Callable[[str, Any], object]

LOST_AFTER = 3.0
"""Seconds without the hub after which rank 0 counts as lost."""
UNHEARD = 2.0
"""Seconds without a word about a post after which a second connection is tried beside the first."""


class Connection:
    """See above. Everything but `post` and the attributes happens on the loop thread.

    Args:
        loop: the rank's.
        desk: where the hub's card is.
        rank, world: ours.
        deliver: for what the hub says, and `down`, `up`, `lost`, `back`.
    """

    def __init__(self, loop: Loop, rendezvous: Rendezvous, rank: int, world: int, deliver: Deliver) -> None:
        self._loop, self._deliver = loop, deliver
        self._rank, self._world, self._member = rank, world, os.urandom(8).hex()
        self._discovery = Discovery(loop, rendezvous, self, world)
        self._session = ""  # whose numbers these are: the name of a hub
        self._heard = 0
        self._posted = 0
        self._unheard: collections.deque[tuple[int, str, Any, float]] = collections.deque()
        self._flushes: list[tuple[int, Callable[[], object]]] = []
        self._link: Optional[Link] = None
        self._doubt: Optional[Timer] = None
        self._lost_timer: Optional[Timer] = None
        self._attempts = 0
        self._patience = UNHEARD
        self._lost = False
        self._ended = False  # rank 0 has said that it is no more in the group
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether the hub has let us in and the line is there, as far as anybody can know."""
        return self._link is not None

    @property
    def why(self) -> str:
        """Why it is not connected; empty if it is."""
        return "" if self.connected else self._discovery.why

    def start(self) -> None:
        """Set out."""
        self._discovery.set_out()

    def post(self, kind: str, value: Any) -> None:
        """Tell the hub."""
        if self._closed:
            return
        self._posted += 1
        post = (self._posted, kind, value, unpatched.monotonic())
        self._unheard.append(post)
        if self._link is not None:
            self._send(self._link, encode("p", *post[:3]))
            self._watch_over()
        else:
            self._discovery.hurry()

    def when_heard(self, function: Callable[[], object]) -> None:
        """Call it when the hub has everything posted so far."""
        if self._unheard:
            self._flushes.append((self._posted, function))
        else:
            function()

    def close(self) -> None:
        """Say good-bye and be gone."""
        if self._link is not None and not self._closed:
            try:
                self._link.send(encode("bye"))
            except ConnectionClosed:
                pass
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """Close what there is, without a word."""
        self._closed = True
        self._discovery.close()
        for timer in (self._doubt, self._lost_timer):
            if timer is not None:
                timer.cancel()
        if self._link is not None:
            self._drop_link()

    # -- what the search asks, and finds ----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there are posts that no hub has said that it has."""
        return bool(self._unheard)

    def hello(self, address: HubAddress) -> tuple[int, int, str, int, int, int]:
        """What this rank says first to a hub."""
        self._attempts += 1
        heard = self._heard if address.name == self._session else 0
        return self._rank, self._world, self._member, self._attempts, heard, int(address.near)

    def found(self, link: Link, seen: int, lines: list[list[Any]]) -> None:
        """A hub has let us in; it has the posts up to that number."""
        again = self.connected
        if again:
            self._drop_link()
        self._take(link, seen)
        if not again:
            self._tell("up", None)
            if self._lost:
                self._lost = False
                self._tell("back", 0)
        self._take_lines(link, lines)

    def _take(self, link: Link, seen: int) -> None:
        address = self._discovery.address
        assert address is not None
        if address.name != self._session:
            self._session, self._heard = address.name, 0
            posts = [(number, *post[1:]) for number, post in enumerate(self._unheard, 1)]
            self._unheard = collections.deque(posts)
            self._flushes = [(len(posts), function) for _, function in self._flushes]
            self._posted = len(posts)
        self._link = link
        self._ended = False
        if self._lost_timer is not None:
            self._lost_timer.cancel()
        self._acknowledged(seen)
        self._loop.watch(link.fd, READ, self._ready)
        waiting = b"".join(encode("p", *post[:3]) for post in self._unheard)
        if waiting:
            self._send(link, waiting)
            self._watch_over()

    # -- the line ---------------------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        link = self._link
        if link is None:
            return
        try:
            if link.waiting:
                link.send(b"")
            lines = link.lines.feed(link.receive())
        except (ConnectionClosed, Malformed) as error:
            self._down(f"{link.where}: {error}")
            return
        self._take_lines(link, lines)

    def _take_lines(self, link: Link, lines: list[list[Any]]) -> None:
        try:
            for kind, *rest in lines:
                if self._link is not link:
                    return
                if kind == "m" and len(rest) == 3:
                    index = whole(rest[0], 1)
                    if index > self._heard:
                        self._heard = index
                        self._tell(kind_of(rest[1]), rest[2])
                elif kind == "ack" and len(rest) == 1:
                    self._acknowledged(whole(rest[0]))
                elif kind == "end" and not rest:
                    self._ended = True
                    self._down("rank 0 has left the process group")
                    return
                else:
                    raise Malformed("not what a hub says")
        except Malformed as error:
            self._down(f"{link.where}: {error}")
            return
        self._watch_events(link)

    def _send(self, link: Link, data: bytes) -> None:
        try:
            link.send(data)
        except ConnectionClosed as error:
            self._down(f"{link.where}: {error}")
            return
        self._watch_events(link)

    def _watch_events(self, link: Link) -> None:
        if self._link is link:
            self._loop.watch(link.fd, link.events, self._ready)

    def _acknowledged(self, seen: int) -> None:
        while self._unheard and self._unheard[0][0] <= seen:
            self._unheard.popleft()
            self._patience = UNHEARD
        while self._flushes and self._flushes[0][0] <= seen:
            self._flushes.pop(0)[1]()

    def _watch_over(self) -> None:
        """A translator that has forgotten the connection swallows what we send: the kernel needs long to notice."""
        if self._doubt is None and self._unheard:
            self._doubt = self._loop.at(self._patience, self._in_doubt)

    def _in_doubt(self) -> None:
        self._doubt = None
        if self._closed or not self._unheard:
            return
        age = unpatched.monotonic() - self._unheard[0][3]
        if self._link is not None and age >= UNHEARD:
            self._patience *= 2  # a hub that has too much to do is not helped by more connections
            self._discovery.set_out()
        self._watch_over()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._loop.unwatch(link.fd)
            link.close()

    def _down(self, why: str) -> None:
        self._drop_link()
        self._discovery.why = why
        self._tell("down", why)
        if self._closed:
            return
        if self._ended:
            self._discovery.after_the_end()
            return
        self._lost_timer = self._loop.at(LOST_AFTER, self._count_lost)
        self._discovery.set_out()

    def _count_lost(self) -> None:
        if not self._closed and not self.connected and not self._ended:
            self._lost = True
            self._tell("lost", 0)

    def _tell(self, kind: str, value: Any) -> None:
        try:
            self._deliver(kind, value)
        except Exception as error:
            report_failure("to hear a message", error)
