"""The hub on rank 0: serves the connections of all other ranks, feeds the coordinator, and broadcasts its decisions.

It runs on rank 0's loop thread. `Admission` accepts and authenticates the connections.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown.channel import fd_limits
from autoteardown.channel.admission import Admission, Peer
from autoteardown.channel.broadcast import Broadcaster
from autoteardown.channel.coordinator import HUB_EVENTS, LEAVING, Coordinator, CoordinatorRunner
from autoteardown.channel.wire import FIRST, Malformed, encode, kind_of, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.connection_poller import ConnectionPoller
from autoteardown.event_loop.sockets import ConnectionClosed
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

RECONNECT_SECONDS = 2.0
"""Seconds that a rank has to reconnect after it has noticed that its connection ended, before it counts as lost."""
DEAD_AFTER = 10.0
"""Seconds after which a rank on another host, whose connection was closed, counts as dead. A live rank that cannot
reach this host for half of that time has retried and reconnected by then."""
_MANY_RANKS = 128  # from here on, connections are moved to high descriptor numbers
_CLOSED_BY_PEER = (
    "closed by the other end",
    *(os.strerror(code).lower() for code in (errno.ECONNRESET, errno.EPIPE)),
)


class Member:
    """A rank of the group as the hub knows it, connected or not."""

    def __init__(self, rank: int, incarnation: str, predecessor: Optional[Member]) -> None:
        self.rank, self.incarnation = rank, incarnation
        self.earlier: set[str] = set()  # incarnations of this rank before this one
        if predecessor is not None:
            self.earlier = predecessor.earlier | {predecessor.incarnation}
        self.peer: Optional[Peer] = None
        self.attempt = 0
        self.seen = 0  # number of its last post
        self.acknowledged = 0  # number of the last post that the hub has acknowledged
        self.same_host = False
        self.left = False
        self.lost = False
        self.lost_timer: Optional[Timer] = None


class Hub:
    """Serves the ranks of one group. Every method runs on the loop thread; the constructor may run on another.

    Args:
        loop: rank 0's event loop.
        address: the published address, with the token.
        listeners: listening sockets.
        coordinator: decides what the ranks do.
        deliver: called with the kind and value of each message to rank 0 itself.
        log: called with lines about problem connections (see `Admission`).
    """

    def __init__(
        self,
        loop: Loop,
        address: HubAddress,
        listeners: list[Any],
        coordinator: Coordinator,
        deliver: Callable[[str, Any], object],
        log: Callable[[str], object],
    ) -> None:
        self._loop, self._address = loop, address
        self._deliver = deliver
        self._poller = ConnectionPoller(loop, self._after_batch)
        self._high_fds = address.world > _MANY_RANKS
        self._connected_count = 0  # members
        self._admission = Admission(
            loop,
            address,
            listeners,
            self._high_fds,
            lambda: self._connected_count,
            self._watch,
            self._disconnect,
            log,
        )
        self._coordination = CoordinatorRunner(loop, coordinator, self._broadcast)
        self._log = self._coordination.log
        self._members: dict[int, Member] = {}
        self._broadcaster = Broadcaster(loop, self._log, self._poller, self._connected, self._drop)
        self._delivered = 0  # index of the last message delivered to rank 0 itself
        self._broadcast_index = 0  # index of the last message broadcast; slow connections may lag behind
        self._broadcast_scheduled = False
        self._closed = False

    def start(self) -> None:
        """Start accepting connections."""
        if self._high_fds:
            fd_limits.grow_table(self._address.world)
        self._admission.open()
        self._coordination.handle(0, "joined", None)
        self._broadcast()

    def post(self, kind: str, value: Any) -> None:
        """Post as rank 0 itself."""
        self._coordination.handle(0, kind, value)
        self._broadcast()

    def when_acknowledged(self, function: Callable[[], object]) -> None:
        """Call the function when every connected host's kernel has acknowledged all messages so far."""
        self._broadcaster.when_acknowledged(function)

    def close(self) -> None:
        """Send `end` to every connected rank, and close everything."""
        if not self._closed:
            for peer in self._connected():
                try:
                    peer.send(encode("end"))
                except ConnectionClosed:
                    pass
        self.forget()

    def forget(self) -> None:
        """Close everything without sending."""
        self._closed = True
        self._coordination.close()
        self._broadcaster.close()
        self._admission.close()
        self._poller.close()
        for member in list(self._members.values()):
            if member.lost_timer is not None:
                member.lost_timer.cancel()
            if member.peer is not None:
                member.peer.close()
        self._members.clear()

    # -- members ----------------------------------------------------------------------------------------------------

    def _admit(self, peer: Peer, line: list[Any]) -> None:
        """Authenticate a peer by its first line, and make it its rank's connection."""
        hello = self._admission.authenticate(line)
        rank, incarnation = hello.rank, hello.incarnation
        if hello.world != self._address.world or rank >= hello.world:
            self._refuse(peer, "that is no rank of this group")
        member = self._members.get(rank)
        if member is not None and member.incarnation != incarnation:
            if member.peer is not None:
                self._refuse(peer, "another process holds that rank in this group")
            # The rank has left and joined again. A process that makes its group anew finds the last group's hub, or a
            # rank that leaves the last group late finds the next group's hub.
            if incarnation in member.earlier:
                self._refuse(peer, "that hello was used before")
            if member.lost_timer is not None:
                member.lost_timer.cancel()
        elif member is not None and hello.attempt <= member.attempt:
            self._refuse(peer, "that hello was used before")
        self._admission.release(peer)
        event = ""
        if member is None or member.incarnation != incarnation:
            member = self._members[rank] = Member(rank, incarnation, member)
            event = "joined"
        elif member.lost:
            member.lost = False
            event = "back"
        if member.peer is not None:
            self._disconnect(member.peer)
        if member.lost_timer is not None:
            member.lost_timer.cancel()
        member.peer, peer.member = peer, member
        self._connected_count += 1
        member.attempt, member.same_host = hello.attempt, bool(hello.same_host)
        peer.sent_index = min(hello.received, self._log.last)
        member.acknowledged = member.seen
        peer.put(encode("welcome", member.seen, self._admission.proof_for(hello)))
        if event:
            self._coordination.handle(rank, event, None)

    def _refuse(self, peer: Peer, why: str) -> None:
        peer.send(encode("no", why))
        raise ConnectionClosed(why)

    def _on_ready(self, peer: Peer, events: int) -> None:
        if peer.closed:
            return
        try:
            data = peer.receive() if peer.member is not None else peer.receive(FIRST)
            for line in peer.lines.feed(data):
                if peer.member is None:
                    self._admit(peer, line)
                else:
                    self._on_line(peer, peer.member, line)
                if peer.closed:
                    return
            self._broadcaster.send(peer, acknowledge=False)
        except (Malformed, ConnectionClosed) as error:
            if peer.member is not None:
                self._drop(peer, str(error))
            else:
                malformed = isinstance(error, Malformed)
                self._admission.reject(
                    peer, "a connection that does not speak this protocol" if malformed else ""
                )

    def _on_line(self, peer: Peer, member: Member, line: list[Any]) -> None:
        if line == ["bye"]:
            if not member.left:
                member.left = True
                self._coordination.handle(member.rank, "bye", None)
            return
        if len(line) != 4 or line[0] != "p":
            raise Malformed("not a post")
        number, kind = whole(line[1], 1), kind_of(line[2])
        if number > member.seen + 1:
            raise Malformed("not the next post")
        fresh = number > member.seen
        member.seen = max(member.seen, number)
        self._broadcaster.acknowledge_later(peer)
        if fresh and kind not in HUB_EVENTS:
            member.left = member.left or kind in LEAVING
            self._coordination.handle(member.rank, kind, line[3])

    def _after_batch(self) -> None:
        """Send what the last batch of received lines has led to."""
        self._broadcast()
        self._broadcaster.acknowledge()

    def _connected(self) -> list[Peer]:
        return [member.peer for member in list(self._members.values()) if member.peer is not None]

    def _watch(self, peer: Peer) -> None:
        self._poller.watch(peer.fd, peer.events, functools.partial(self._on_ready, peer))

    def _drop(self, peer: Peer, why: str) -> None:
        member: Member = peer.member
        self._disconnect(peer)
        if not member.left and not self._closed:
            # 1. The kernel closes the connections of a dead process. A live process whose connection was closed
            #    reconnects at once.
            # 2. A device between two hosts (a firewall, a proxy) can close a connection, too, and keep a live rank
            #    away.
            # 3. When a connection only times out, the state of its rank is unknown, and a live rank may not have
            #    noticed yet that the connection is broken.
            by_peer = why in _CLOSED_BY_PEER
            wait = RECONNECT_SECONDS if by_peer else sockets.KEEPALIVE_IDLE + RECONNECT_SECONDS
            member.lost_timer = self._loop.at(wait, lambda: self._count_lost(member, by_peer))
        elif member.left and not self._closed:
            self._coordination.handle(member.rank, "closed", None)
            self._broadcast_soon()

    def _disconnect(self, peer: Peer) -> None:
        if peer.member is None:
            self._admission.release(peer)
        elif peer.member.peer is peer:
            peer.member.peer = None
            self._connected_count -= 1
        self._poller.unwatch(peer.fd)
        peer.close()

    def _count_lost(self, member: Member, by_peer: bool) -> None:
        if member.peer is None and not member.left:
            dead = by_peer and (member.same_host or member.lost)
            if by_peer and not dead:
                member.lost_timer = self._loop.at(
                    DEAD_AFTER - RECONNECT_SECONDS, lambda: self._count_lost(member, by_peer)
                )
            member.lost = True
            self._coordination.handle(member.rank, "lost", dead)
            self._broadcast_soon()

    # -- what the coordinator decides -----------------------------------------------------------------------------

    def _broadcast_soon(self) -> None:
        """Broadcast after this turn of the loop, so that a thousand ranks that are lost at once make one message."""
        if not self._broadcast_scheduled:
            self._broadcast_scheduled = True
            self._loop.call(self._broadcast)

    def _broadcast(self) -> None:
        self._broadcast_scheduled = False
        last = self._log.last
        if self._broadcast_index == last or self._closed:
            return
        self._broadcast_index = last
        self._broadcaster.send_all()
        delivered, self._delivered = self._delivered, last
        for kind, value in self._log.messages_for(0, delivered):
            if self._closed:
                return
            try:
                self._deliver(kind, value)
            except Exception as error:
                report_failure("to handle a message", error)
