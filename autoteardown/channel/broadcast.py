"""What the hub sends to those who are connected: what the council has said, and that their posts have come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Callable

from autoteardown import unpatched
from autoteardown.channel import fd_limits
from autoteardown.channel.wire import encode
from autoteardown.event_loop.sockets import ConnectionClosed

if TYPE_CHECKING:
    from autoteardown.channel.admission import Peer
    from autoteardown.channel.message_log import MessageLog
    from autoteardown.event_loop.connection_poller import ConnectionPoller
    from autoteardown.event_loop.loop import Loop

_FULL, _UNREAD = 1 << 16, 1 << 20  # bytes that wait: no more messages are added; it is given up
_GLANCE = 0.005  # seconds until the next look at what the kernel has sent
_MOMENT = 0.5  # seconds at most until a rank knows that its post has come, while there is much to hear


class Broadcaster:
    """See above. Everything happens on the loop thread.

    Args:
        loop: rank 0's.
        said: by the council.
        crowd: that watches the connections.
        connected: gives those of all members that are there.
        drop: called with a connection that has ended, and why.
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
        self._owed: set[Peer] = set()  # who has posts that it does not know to have come
        self._owed_since = 0.0
        self._flushes: list[Callable[[], object]] = []

    def everybody(self) -> None:
        """Tell them what there is to tell."""
        self._each(self._connected())

    def one(self, peer: Peer, acknowledge: bool = True) -> None:
        """The same for one. Without `acknowledge`, that its posts have come is said only if there is more to say.

        Raises:
            Ended: the connection is over.
        """
        member = peer.member
        if member is None:
            peer.send(b"")
        else:
            last = self._log.last
            if peer.waiting >= _FULL:
                peer.send(b"")
            if member.seen > member.acknowledged and (acknowledge or peer.told < last):
                member.acknowledged = member.seen
                peer.put(encode("ack", member.seen))
            while peer.told < last:
                if peer.waiting >= _FULL:
                    break  # not all has been added: so something has to wait, or nobody would come back to it
                data, peer.told = self._log.after(peer.told, member.rank)
                peer.send(data)
            else:
                peer.send(b"")
        if peer.waiting > _UNREAD:
            raise ConnectionClosed("it does not read what it is told")
        self._poller.change(peer.fd, peer.events)

    def owe(self, peer: Peer) -> None:
        """That one is to know that its post has come."""
        if not self._owed:
            self._owed_since = unpatched.monotonic()
        self._owed.add(peer)

    def settle(self) -> None:
        """Let them know, when nothing more is to be heard.

        Thousands answer a notice at once: the plan, which they wait for, is not to wait for as many packets.
        """
        if self._owed and (self._poller.quiet or unpatched.monotonic() > self._owed_since + _MOMENT):
            owed, self._owed = self._owed, set()
            self._each(owed)

    def when_taken(self, function: Callable[[], object]) -> None:
        """Call it when the kernels of all that are connected have taken everything."""
        self._flushes.append(function)
        self._glance()

    def close(self) -> None:
        """No more of it."""
        self._owed.clear()
        self._flushes.clear()

    def _each(self, peers: Iterable[Peer]) -> None:
        for peer in peers:
            if not peer.closed:  # another's end may have been this one's, too
                try:
                    self.one(peer)
                except ConnectionClosed as error:
                    self._drop(peer, str(error))

    def _glance(self) -> None:
        if not self._flushes:
            return
        try:
            last = self._log.last
            if any(
                peer.told < last or peer.waiting or fd_limits.unsent(peer.fd) for peer in self._connected()
            ):
                self._loop.at(_GLANCE, self._glance)
                return
        except OSError:
            pass
        flushes, self._flushes = self._flushes, []
        for function in flushes:
            function()
