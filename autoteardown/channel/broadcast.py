"""Sends the coordinator's messages, and acknowledgements of posts, to every rank that is connected to the hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Callable

from autoteardown import unpatched
from autoteardown.channel.wire import encode
from autoteardown.event_loop import sockets
from autoteardown.event_loop.sockets import ConnectionClosed

if TYPE_CHECKING:
    from autoteardown.channel.admission import Peer
    from autoteardown.channel.message_log import MessageLog
    from autoteardown.event_loop.connection_poller import ConnectionPoller
    from autoteardown.event_loop.loop import Loop

_FULL, _UNREAD = (
    1 << 16,
    1 << 20,
)  # buffered bytes: from here no message is added; from here the connection is closed
_POLL_SECONDS = 0.005  # between two looks at what the kernels have sent
_ACKNOWLEDGE_SECONDS = 0.5  # until a post is acknowledged, at most, while more posts arrive


class Broadcaster:
    """Sends messages and acknowledgements. Every method runs on the loop thread.

    Args:
        loop: rank 0's event loop.
        log: the coordinator's messages.
        poller: watches the connections.
        connected: returns the connections of all members.
        drop: called with a connection that has ended, and the reason.
    """

    def __init__(
        self,
        loop: Loop,
        log: MessageLog,
        poller: ConnectionPoller,
        connected: Callable[[], list[Peer]],
        drop: Callable[[Peer, str], object],
    ) -> None:
        self._loop, self._log, self._poller = loop, log, poller
        self._connected, self._drop = connected, drop
        self._unacknowledged: set[Peer] = set()  # connections whose posts are to be acknowledged
        self._unacknowledged_since = 0.0
        self._flushes: list[Callable[[], object]] = []

    def send_all(self) -> None:
        """Send new messages to every connection."""
        self._send_to(self._connected())

    def send(self, peer: Peer, acknowledge: bool = True) -> None:
        """Send new messages to one connection.

        Args:
            peer: the connection.
            acknowledge: acknowledge its posts in any case; otherwise only together with a message.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        member = peer.member
        if member is None:
            peer.send(b"")
        else:
            last = self._log.last
            if peer.waiting >= _FULL:
                peer.send(b"")
            if member.seen > member.acknowledged and (acknowledge or peer.sent_index < last):
                member.acknowledged = member.seen
                peer.put(encode("ack", member.seen))
            while peer.sent_index < last:
                if peer.waiting >= _FULL:
                    break  # the buffer is not empty, so the poller calls this again when it can be sent
                data, peer.sent_index = self._log.after(peer.sent_index, member.rank)
                peer.send(data)
            else:
                peer.send(b"")
        if peer.waiting > _UNREAD:
            raise ConnectionClosed("it does not read its messages")
        self._poller.change(peer.fd, peer.events)

    def acknowledge_later(self, peer: Peer) -> None:
        """Have the next `acknowledge` acknowledge this connection's posts."""
        if not self._unacknowledged:
            self._unacknowledged_since = unpatched.monotonic()
        self._unacknowledged.add(peer)

    def acknowledge(self) -> None:
        """Acknowledge posts, unless more are about to arrive.

        Thousands of ranks answer a notice at once, and wait for the plan. The plan must not wait until as many
        acknowledgements have been sent.
        """
        late = unpatched.monotonic() > self._unacknowledged_since + _ACKNOWLEDGE_SECONDS
        if self._unacknowledged and (late or self._poller.quiet):
            peers, self._unacknowledged = self._unacknowledged, set()
            self._send_to(peers)

    def when_acknowledged(self, function: Callable[[], object]) -> None:
        """Call the function when the hosts of all connections have acknowledged (TCP) all messages so far."""
        self._flushes.append(function)
        self._check_flushes()

    def close(self) -> None:
        """Drop what waits."""
        self._unacknowledged.clear()
        self._flushes.clear()

    def _send_to(self, peers: Iterable[Peer]) -> None:
        for peer in peers:
            if not peer.closed:  # dropping one connection may have closed another
                try:
                    self.send(peer)
                except ConnectionClosed as error:
                    self._drop(peer, str(error))

    def _check_flushes(self) -> None:
        if not self._flushes:
            return
        try:
            last = self._log.last
            if any(
                peer.sent_index < last or peer.waiting or sockets.unacknowledged(peer.fd)
                for peer in self._connected()
            ):
                self._loop.at(_POLL_SECONDS, self._check_flushes)
                return
        except OSError:
            pass
        flushes, self._flushes = self._flushes, []
        for function in flushes:
            function()
