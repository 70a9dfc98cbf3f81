"""A rank's reliable connection to the hub: reconnects, resends unacknowledged posts, and delivers each message once.

1. The rank keeps each post until the hub has acknowledged it, and sends it again over the next connection. The hub
   counts each post once, by its number.
2. The hub's messages are numbered. A new connection continues after the last message that the rank has received.
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
"""Seconds without a connection to the hub after which rank 0 counts as lost. Without its first connection, a rank also
needs to see that the store's server has ended."""
ACKNOWLEDGE_SECONDS = 2.0
"""Seconds without an acknowledgement of a post after which a second connection is tried in parallel to the first."""


class Connection:
    """One rank's connection to the hub. Every method runs on the loop thread; the properties may be read on any.

    Args:
        loop: the rank's event loop.
        rendezvous: where the hub's address is published.
        rank, world: this rank's.
        deliver: called with the kind and value of each message from the hub, and with `down`, `up`, `lost`, `back`.
    """

    def __init__(self, loop: Loop, rendezvous: Rendezvous, rank: int, world: int, deliver: Deliver) -> None:
        self._loop, self._deliver = loop, deliver
        self._rank, self._world, self._incarnation = rank, world, os.urandom(8).hex()
        self._discovery = Discovery(loop, rendezvous, self, world)
        self._session = ""  # name of the hub that the numbers below belong to
        self._received = 0  # index of the last message received
        self._posted = 0
        self._unacknowledged: collections.deque[tuple[int, str, Any, float]] = collections.deque()
        self._flushes: list[tuple[int, Callable[[], object]]] = []
        self._link: Optional[Link] = None
        self._acknowledge_timer: Optional[Timer] = None
        self._lost_timer: Optional[Timer] = None
        self._attempts = 0
        self._patience = ACKNOWLEDGE_SECONDS
        self._lost = False
        self._rank_0_left = False
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated connection, as far as is known."""
        return self._link is not None

    @property
    def why(self) -> str:
        """Why there is no connection; empty if there is one."""
        return "" if self.connected else self._discovery.why

    def start(self) -> None:
        """Start to look for the hub."""
        self._expect_hub()
        self._discovery.start()

    def post(self, kind: str, value: Any) -> None:
        """Send a message to the hub, now or over the next connection."""
        if self._closed:
            return
        self._posted += 1
        post = (self._posted, kind, value, unpatched.monotonic())
        self._unacknowledged.append(post)
        if self._link is not None:
            self._send(self._link, encode("p", *post[:3]))
            self._expect_acknowledgement()
        else:
            self._discovery.expedite()

    def when_acknowledged(self, function: Callable[[], object]) -> None:
        """Call the function when the hub has acknowledged all posts so far."""
        if self._unacknowledged:
            self._flushes.append((self._posted, function))
        else:
            function()

    def close(self) -> None:
        """Send `bye`, and close everything."""
        if self._link is not None and not self._closed:
            try:
                self._link.send(encode("bye"))
            except ConnectionClosed:
                pass
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """Close everything without sending."""
        self._closed = True
        self._discovery.close()
        for timer in (self._acknowledge_timer, self._lost_timer):
            if timer is not None:
                timer.cancel()
        if self._link is not None:
            self._drop_link()

    # -- for `Discovery` --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there are posts that no hub has acknowledged."""
        return bool(self._unacknowledged)

    def hello(self, address: HubAddress) -> tuple[int, int, str, int, int, int]:
        """The fields of the first line to a hub."""
        self._attempts += 1
        received = self._received if address.name == self._session else 0
        return self._rank, self._world, self._incarnation, self._attempts, received, int(address.same_host)

    def found(self, link: Link, seen: int, lines: list[list[Any]]) -> None:
        """Use an authenticated link to a hub that has the posts up to number `seen`."""
        replaced = self.connected
        if replaced:
            self._drop_link()
        self._take(link, seen)
        if not replaced:
            self._deliver_safely("up", None)
            if self._lost:
                self._lost = False
                self._deliver_safely("back", 0)
        self._take_lines(link, lines)

    def _take(self, link: Link, seen: int) -> None:
        address = self._discovery.address
        assert address is not None
        if address.name != self._session:
            self._session, self._received = address.name, 0
            posts = [(number, *post[1:]) for number, post in enumerate(self._unacknowledged, 1)]
            self._unacknowledged = collections.deque(posts)
            self._flushes = [(len(posts), function) for _, function in self._flushes]
            self._posted = len(posts)
        self._link = link
        self._rank_0_left = False
        if self._lost_timer is not None:
            self._lost_timer.cancel()
        self._acknowledged(seen)
        self._loop.watch(link.fd, READ, self._on_ready)
        waiting = b"".join(encode("p", *post[:3]) for post in self._unacknowledged)
        if waiting:
            self._send(link, waiting)
            self._expect_acknowledgement()

    # -- the connection ---------------------------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        link = self._link
        if link is None:
            return
        try:
            if link.waiting:
                link.send(b"")
            lines = link.lines.feed(link.receive())
            link.acknowledge()  # an exiting hub waits for it
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
                    if index > self._received:
                        self._received = index
                        self._deliver_safely(kind_of(rest[1]), rest[2])
                elif kind == "ack" and len(rest) == 1:
                    self._acknowledged(whole(rest[0]))
                elif kind == "end" and not rest:
                    self._rank_0_left = True
                    self._down("rank 0 has left the process group")
                    return
                else:
                    raise Malformed("the line is not a hub's")
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
            self._loop.watch(link.fd, link.events, self._on_ready)

    def _acknowledged(self, seen: int) -> None:
        while self._unacknowledged and self._unacknowledged[0][0] <= seen:
            self._unacknowledged.popleft()
            self._patience = ACKNOWLEDGE_SECONDS
        while self._flushes and self._flushes[0][0] <= seen:
            self._flushes.pop(0)[1]()

    def _expect_acknowledgement(self) -> None:
        """Start a timer: when a NAT device has forgotten the connection, the kernel needs long to notice."""
        if self._acknowledge_timer is None and self._unacknowledged:
            self._acknowledge_timer = self._loop.at(self._patience, self._check_acknowledgement)

    def _check_acknowledgement(self) -> None:
        self._acknowledge_timer = None
        if self._closed or not self._unacknowledged:
            return
        age = unpatched.monotonic() - self._unacknowledged[0][3]
        if self._link is not None and age >= ACKNOWLEDGE_SECONDS:
            self._patience *= 2  # more connections would only slow down a hub that is overloaded
            self._discovery.start()
        self._expect_acknowledgement()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._loop.unwatch(link.fd)
            link.close()

    def _down(self, why: str) -> None:
        self._drop_link()
        self._discovery.why = why
        self._deliver_safely("down", why)
        if self._closed:
            return
        if self._rank_0_left:
            self._discovery.after_rank_0_left()
            return
        self._expect_hub()
        self._discovery.start()

    def _expect_hub(self) -> None:
        self._lost_timer = self._loop.at(LOST_AFTER, self._count_lost)

    def _count_lost(self) -> None:
        if self._closed or self.connected or self._rank_0_left:
            return
        if self._session or self._discovery.store_closed:
            self._lost = True
            self._deliver_safely("lost", 0)
        else:  # there never was a connection: a firewall may be in its way, and rank 0 alive
            self._expect_hub()

    def _deliver_safely(self, kind: str, value: Any) -> None:
        try:
            self._deliver(kind, value)
        except Exception as error:
            report_failure("to handle a message", error)
