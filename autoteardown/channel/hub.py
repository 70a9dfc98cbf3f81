"""The hub, on rank 0's loop thread: lets the ranks in, hears what they post, and tells them what the council decides.

Who connects comes through its `door`.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown.channel import fd_limits
from autoteardown.channel.admission import Admission, Peer
from autoteardown.channel.broadcast import Broadcaster
from autoteardown.channel.coordinator import BORN, FAREWELLS, Coordinator, CoordinatorRunner
from autoteardown.channel.wire import FIRST, Malformed, encode, kind_of, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.connection_poller import ConnectionPoller
from autoteardown.event_loop.sockets import ConnectionClosed
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

BACK_WITHIN = 2.0
"""Seconds that a rank has to come back after it has heard that its connection has ended, before it counts as lost."""
DEAD_AFTER = 10.0
"""Seconds after which a rank of another host whose connection was closed counts as dead: one that could not reach this
host for half of them has tried again, and is back."""
_MANY = 128  # ranks whose connections are not to take the low numbers
_GONE = ("closed by the other end", *(os.strerror(code).lower() for code in (errno.ECONNRESET, errno.EPIPE)))


class Member:
    """A rank of the group, connected or not."""

    def __init__(self, rank: int, name: str, before: Optional[Member]) -> None:
        self.rank, self.name = rank, name
        # What it was called in earlier lives.
        self.former: set[str] = set() if before is None else before.former | {before.name}
        self.peer: Optional[Peer] = None
        self.attempt = 0
        self.seen = 0  # number of its last post
        self.acknowledged = 0  # and of the last that it knows to have come
        self.near = False  # it is on this host
        self.left = False
        self.lost = False
        self.lost_timer: Optional[Timer] = None


class Hub:
    """See above. Everything but the constructor happens on the loop thread.

    Args:
        loop: rank 0's.
        card: what the ranks know of this hub.
        listeners: sockets that listen.
        council: decides.
        deliver: for what rank 0 is told.
        note: see `Door`.
    """

    def __init__(
        self,
        loop: Loop,
        address: HubAddress,
        listeners: list[Any],
        coordinator: Coordinator,
        deliver: Callable[[str, Any], object],
        note: Callable[[str], object],
    ) -> None:
        self._loop, self._address = loop, address
        self._deliver = deliver
        self._poller = ConnectionPoller(loop, self._heard_them)
        self._many = address.world > _MANY
        self._here = 0  # members that are connected
        self._admission = Admission(
            loop, address, listeners, self._many, lambda: self._here, self._watch, self._hang_up, note
        )
        self._coordination = CoordinatorRunner(loop, coordinator, self._tell)
        self._log = self._coordination.log
        self._members: dict[int, Member] = {}
        self._broadcaster = Broadcaster(loop, self._log, self._poller, self._connected, self._drop)
        self._mine = 0  # index of the last message that rank 0 has heard
        self._told = 0  # index up to which everybody has been told, but for those who are slow
        self._to_tell = False
        self._closed = False

    def start(self) -> None:
        """Let them come."""
        if self._many:
            fd_limits.make_room(self._address.world)
        self._admission.open()
        self._coordination.handle(0, "joined", None)
        self._tell()

    def post(self, kind: str, value: Any) -> None:
        """What rank 0 has to say."""
        self._coordination.handle(0, kind, value)
        self._tell()

    def when_heard(self, function: Callable[[], object]) -> None:
        """Call it when the kernel has taken everything for everybody who is connected."""
        self._broadcaster.when_taken(function)

    def close(self) -> None:
        """Say that it is over, and be gone."""
        if not self._closed:
            for peer in self._connected():
                try:
                    peer.send(encode("end"))
                except ConnectionClosed:
                    pass
        self.forget()

    def forget(self) -> None:
        """Close what there is, without a word."""
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
        """A guest's first line."""
        hello = self._admission.identify(line)
        rank, name = hello.rank, hello.name
        if hello.world != self._address.world or rank >= hello.world:
            self._refuse(peer, "that is no rank of this group")
        member = self._members.get(rank)
        if member is not None and member.name != name:
            if member.peer is not None:
                self._refuse(peer, "this group has another process in that place")
            # Gone, and here in its next life: a group that is made anew in a process finds the last one's hub, or a
            # rank that is late to leave the last one finds the next one's.
            if name in member.former:
                self._refuse(peer, "that has been said before")
            if member.lost_timer is not None:
                member.lost_timer.cancel()
        elif member is not None and hello.attempt <= member.attempt:
            self._refuse(peer, "that has been said before")
        self._admission.leave(peer)
        born = ""
        if member is None or member.name != name:
            member = self._members[rank] = Member(rank, name, member)
            born = "joined"
        elif member.lost:
            member.lost = False
            born = "back"
        if member.peer is not None:
            self._hang_up(member.peer)
        if member.lost_timer is not None:
            member.lost_timer.cancel()
        member.peer, peer.member = peer, member
        self._here += 1
        member.attempt, member.near = hello.attempt, bool(hello.near)
        peer.told = min(hello.heard, self._log.last)
        member.acknowledged = member.seen
        peer.put(encode("welcome", member.seen, self._admission.promise(hello)))
        if born:
            self._coordination.handle(rank, born, None)

    def _refuse(self, peer: Peer, why: str) -> None:
        peer.send(encode("no", why))
        raise ConnectionClosed(why)

    def _hear(self, peer: Peer, events: int) -> None:
        if peer.closed:
            return
        try:
            data = peer.receive() if peer.member is not None else peer.receive(FIRST)
            for line in peer.lines.feed(data):
                if peer.member is None:
                    self._admit(peer, line)
                else:
                    self._obey(peer, peer.member, line)
                if peer.closed:
                    return
            self._broadcaster.one(peer, acknowledge=False)
        except (Malformed, ConnectionClosed) as error:
            if peer.member is not None:
                self._drop(peer, str(error))
            else:
                stranger = isinstance(error, Malformed)
                self._admission.turn_away(
                    peer, "somebody who does not speak as a rank does" if stranger else ""
                )

    def _obey(self, peer: Peer, member: Member, line: list[Any]) -> None:
        if line == ["bye"]:
            if not member.left:
                member.left = True
                self._coordination.handle(member.rank, "bye", None)
            return
        if len(line) != 4 or line[0] != "p":
            raise Malformed("not what a rank says")
        number, kind = whole(line[1], 1), kind_of(line[2])
        if number > member.seen + 1:
            raise Malformed("not the next post")
        fresh = number > member.seen
        member.seen = max(member.seen, number)
        self._broadcaster.owe(peer)
        if fresh and kind not in BORN:
            member.left = member.left or kind in FAREWELLS
            self._coordination.handle(member.rank, kind, line[3])

    def _heard_them(self) -> None:
        """What had come has been heard."""
        self._tell()
        self._broadcaster.settle()

    def _connected(self) -> list[Peer]:
        return [member.peer for member in list(self._members.values()) if member.peer is not None]

    def _watch(self, peer: Peer) -> None:
        self._poller.watch(peer.fd, peer.events, functools.partial(self._hear, peer))

    def _drop(self, peer: Peer, why: str) -> None:
        member: Member = peer.member
        self._hang_up(peer)
        if not member.left and not self._closed:
            # A live process whose line drops comes back at once: the kernel has closed a dead one's. What lies between
            # two hosts (a firewall, a proxy) can close one, too, and keep a live rank away. Of one that is only silent
            # nobody knows, and it may not know yet that its line is gone.
            gone = why in _GONE
            wait = BACK_WITHIN if gone else sockets.IDLE + BACK_WITHIN
            member.lost_timer = self._loop.at(wait, lambda: self._count_lost(member, gone))
        elif member.left and not self._closed:
            self._coordination.handle(member.rank, "closed", None)
            self._tell_soon()

    def _hang_up(self, peer: Peer) -> None:
        if peer.member is None:
            self._admission.leave(peer)
        elif peer.member.peer is peer:
            peer.member.peer = None
            self._here -= 1
        self._poller.unwatch(peer.fd)
        peer.close()

    def _count_lost(self, member: Member, gone: bool) -> None:
        if member.peer is None and not member.left:
            dead = gone and (member.near or member.lost)
            if gone and not dead:
                member.lost_timer = self._loop.at(
                    DEAD_AFTER - BACK_WITHIN, lambda: self._count_lost(member, gone)
                )
            member.lost = True
            self._coordination.handle(member.rank, "lost", dead)
            self._tell_soon()

    # -- what the council says -----------------------------------------------------------------------------------------

    def _tell_soon(self) -> None:
        """When everything of this moment has happened: a thousand ranks that are lost at once make one message."""
        if not self._to_tell:
            self._to_tell = True
            self._loop.call(self._tell)

    def _tell(self) -> None:
        self._to_tell = False
        last = self._log.last
        if self._told == last or self._closed:
            return
        self._told = last
        self._broadcaster.everybody()
        mine, self._mine = self._mine, last
        for kind, value in self._log.heard_by(0, mine):
            if self._closed:
                return
            try:
                self._deliver(kind, value)
            except Exception as error:
                report_failure("to hear a message", error)
