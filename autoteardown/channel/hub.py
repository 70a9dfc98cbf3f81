"""The hub, on rank 0's loop thread: lets the ranks in, hears what they post, and tells them what the council decides.

Whoever connects is a guest until it has proven that it knows the token: guests are few, have little time, and the
oldest goes first. Nothing that a guest says gets any further than this module.
"""

from __future__ import annotations

import collections
import errno
import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import primitives
from autoteardown.boundary import failed
from autoteardown.channel import descriptors, sockets
from autoteardown.channel.council import BORN, FAREWELLS, Council
from autoteardown.channel.messages import Lines, Malformed, encode, kind_of, name_of, proof, proven, whole
from autoteardown.channel.said import Said
from autoteardown.channel.sockets import READ, Ended, Stream

if TYPE_CHECKING:
    from autoteardown.channel.loop import Loop, Timer
    from autoteardown.channel.rendezvous import Card

GUESTS = 32
"""So many connections more than ranks that are missing may be there without having shown the token."""
GUEST_SECONDS = 10.0
BACK_WITHIN = 2.0
"""Seconds that a rank has to come back after it has heard that its connection has ended, before it counts as lost."""
DEAD_AFTER = 10.0
"""Seconds after which a rank of another host whose connection was closed counts as dead: one that could not reach this
host for half of them has tried again, and is back."""
_MANY = 128  # ranks whose connections are not to take the low numbers
_ACCEPTS = 64  # in a row, before it is the others' turn
_FULL, _UNREAD = 1 << 16, 1 << 20  # bytes that wait: no more messages are added; it is given up
_GLANCE = 0.005  # seconds until the next look at what the kernel has sent
_GONE = ("closed by the other end", *(os.strerror(code).lower() for code in (errno.ECONNRESET, errno.EPIPE)))
_PAUSE = 0.5  # seconds without accepting when there is no descriptor to be had


class Peer(Stream):
    """One connection: a guest's, or a member's."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.lines = Lines()
        self.since = primitives.monotonic()
        self.member: Optional[Member] = None
        self.told = 0  # index of the last message handed to the kernel


class Member:
    """A rank of the group, connected or not."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name
        self.peer: Optional[Peer] = None
        self.attempt = 0
        self.seen = 0  # number of its last post
        self.near = False  # it is on this host
        self.left = False
        self.lost = False
        self.mourn: Optional[Timer] = None


class Hub:
    """See above. Everything but the constructor happens on the loop thread.

    Args:
        loop: rank 0's.
        card: what the ranks know of this hub.
        listeners: sockets that listen.
        council: decides.
        deliver: for what rank 0 is told.
        note: called once with a line about each sort of trouble with those who connect.
    """

    def __init__(
        self,
        loop: Loop,
        card: Card,
        listeners: list[Any],
        council: Council,
        deliver: Callable[[str, Any], object],
        note: Callable[[str], object],
    ) -> None:
        self._loop, self._card, self._council = loop, card, council
        self._deliver, self._note = deliver, note
        self._listeners = [(each, sockets.identity(each.fileno())) for each in listeners]
        self._crowd = descriptors.Crowd(loop, self._tell)
        self._room = descriptors.afford(card.world - 1 + GUESTS)
        self._many = card.world > _MANY
        self._here = 0  # members that are connected
        self._said = Said()
        self._members: dict[int, Member] = {}
        self._guests: collections.OrderedDict[int, Peer] = collections.OrderedDict()
        self._mine = 0  # index of the last message that rank 0 has heard
        self._told = 0  # index up to which everybody has been told, but for those who are slow
        self._to_tell = False
        self._noted: set[str] = set()
        self._alarm: Optional[Timer] = None
        self._sweep: Optional[Timer] = None
        self._closed = False
        self._flushes: list[Callable[[], object]] = []

    def start(self) -> None:
        """Let them come."""
        if self._many:
            descriptors.make_room(self._card.world)
        for listener, _ in self._listeners:
            self._loop.watch(listener.fileno(), READ, lambda events, each=listener: self._accept(each))  # type: ignore[misc]
        self._happened(0, "joined", None)
        self._tell()

    def post(self, kind: str, value: Any) -> None:
        """What rank 0 has to say."""
        self._happened(0, kind, value)
        self._tell()

    def when_heard(self, function: Callable[[], object]) -> None:
        """Call it when the kernel has taken everything for everybody who is connected."""
        self._flushes.append(function)
        self._flushed()

    def close(self) -> None:
        """Say that it is over, and be gone."""
        if not self._closed:
            for member in self._members.values():
                if member.peer is not None:
                    try:
                        member.peer.send(encode("end"))
                    except Ended:
                        pass
        self.forget()

    def forget(self) -> None:
        """Close what there is, without a word."""
        self._closed = True
        for timer in (self._alarm, self._sweep, *(member.mourn for member in self._members.values())):
            if timer is not None:
                timer.cancel()
        for listener, identity in self._listeners:
            self._loop.unwatch(listener.fileno())
            sockets.close(listener, identity)
        self._crowd.close()
        for peer in [*self._guests.values(), *(member.peer for member in self._members.values())]:
            if peer is not None:
                peer.close()
        self._guests.clear()
        self._members.clear()

    # -- guests -----------------------------------------------------------------------------------------------------

    def _accept(self, listener: Any) -> None:
        for _ in range(_ACCEPTS):
            try:
                fd, _ = listener._accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._closed or listener.fileno() == -1:
                    return
                self._note_once(f"the hub cannot accept a connection: {sockets.words(error)}")
                self._pause(listener)
                return
            try:
                self._welcome(sockets.accepted(descriptors.high(fd) if self._many else fd))
            except OSError:
                continue

    def _pause(self, listener: Any) -> None:
        fd = listener.fileno()
        self._loop.unwatch(fd)

        def go_on() -> None:
            if not self._closed:
                self._loop.watch(fd, READ, lambda events: self._accept(listener))

        self._loop.at(_PAUSE, go_on)

    def _welcome(self, sock: Any) -> None:
        peer = Peer(sock)
        room = min(self._room, self._card.world - 1 + GUESTS) - self._here
        if room <= 0:
            why = "the hub has no file descriptor left for one more rank (RLIMIT_NOFILE)"
            self._note_once(why)
            try:
                peer.send(encode("no", why))
            except Ended:
                pass
            peer.close()
            return
        while len(self._guests) >= room:
            self._drop(next(iter(self._guests.values())), "too many who do not say who they are")
        self._guests[peer.fd] = peer
        self._watch(peer)
        if self._sweep is None:
            self._sweep = self._loop.at(GUEST_SECONDS, self._sweep_out)

    def _sweep_out(self) -> None:
        self._sweep = None
        now = primitives.monotonic()
        for peer in list(self._guests.values()):
            if peer.since <= now - GUEST_SECONDS:
                self._drop(peer, "somebody who does not say who it is")
        if self._guests and not self._closed:
            self._sweep = self._loop.at(GUEST_SECONDS / 2, self._sweep_out)

    def _admit(self, peer: Peer, line: list[Any]) -> None:
        """A guest's first line."""
        if len(line) != 8 or line[0] != "hello":
            raise Malformed("no hello")
        rank, world, name = whole(line[1], 1), whole(line[2], 1), name_of(line[3])
        attempt, heard, near = whole(line[4], 1), whole(line[5]), whole(line[6], 0, 1)
        said = (rank, world, name, attempt, heard, near)
        if not proven(line[7], proof(self._card.token, "hello", *said)):
            self._note_once("the hub has hung up on somebody without this group's token")
            raise Ended("no token")
        if world != self._card.world or rank >= world:
            self._refuse(peer, "that is no rank of this group")
        member = self._members.get(rank)
        if member is not None and member.name != name:
            if member.peer is not None:
                self._refuse(peer, "this group has another process in that place")
            # Gone, and here in its next life: a group that is made anew in a process finds the last one's hub, or a
            # rank that is late to leave the last one finds the next one's.
            if member.mourn is not None:
                member.mourn.cancel()
            member = None
        if member is not None and attempt <= member.attempt:
            self._refuse(peer, "that has been said before")
        del self._guests[peer.fd]
        born = ""
        if member is None:
            member = self._members[rank] = Member(rank, name)
            born = "joined"
        elif member.lost:
            member.lost = False
            born = "back"
        if member.peer is not None:
            self._hang_up(member.peer)
        if member.mourn is not None:
            member.mourn.cancel()
        member.peer, peer.member = peer, member
        self._here += 1
        member.attempt, member.near = attempt, bool(near)
        peer.told = min(heard, self._said.last)
        peer.put(encode("welcome", member.seen, proof(self._card.token, "welcome", *said)))
        if born:
            self._happened(rank, born, None)

    def _refuse(self, peer: Peer, why: str) -> None:
        peer.send(encode("no", why))
        raise Ended(why)

    # -- members ----------------------------------------------------------------------------------------------------

    def _hear(self, peer: Peer, events: int) -> None:
        if peer.closed:
            return
        try:
            for line in peer.lines.feed(peer.receive()):
                if peer.member is None:
                    self._admit(peer, line)
                else:
                    self._obey(peer, peer.member, line)
                if peer.closed:
                    return
            self._pump(peer)
        except Malformed as error:
            self._drop(
                peer, "somebody who does not speak as a rank does" if peer.member is None else str(error)
            )
        except Ended as error:
            self._drop(peer, "" if peer.member is None else str(error))

    def _obey(self, peer: Peer, member: Member, line: list[Any]) -> None:
        if line == ["bye"]:
            if not member.left:
                member.left = True
                self._happened(member.rank, "bye", None)
            return
        if len(line) != 4 or line[0] != "p":
            raise Malformed("not what a rank says")
        number, kind = whole(line[1], 1), kind_of(line[2])
        if number > member.seen + 1:
            raise Malformed("not the next post")
        fresh = number > member.seen
        member.seen = max(member.seen, number)
        peer.put(encode("ack", member.seen))
        if fresh and kind not in BORN:
            member.left = member.left or kind in FAREWELLS
            self._happened(member.rank, kind, line[3])

    def _watch(self, peer: Peer) -> None:
        self._crowd.watch(peer.fd, peer.events, lambda events: self._hear(peer, events))

    def _drop(self, peer: Peer, why: str) -> None:
        member = peer.member
        self._hang_up(peer)
        if member is None:
            if why:
                self._note_once(f"the hub has hung up on {why}")
        elif not member.left and not self._closed:
            # A live process whose line drops comes back at once: the kernel has closed a dead one's. What lies between
            # two hosts (a firewall, a proxy) can close one, too, and keep a live rank away. Of one that is only silent
            # nobody knows, and it may not know yet that its line is gone.
            gone = why in _GONE
            wait = BACK_WITHIN if gone else sockets.IDLE + BACK_WITHIN
            member.mourn = self._loop.at(wait, lambda: self._count_lost(member, gone))
        elif member.left and not self._closed:
            self._happened(member.rank, "closed", None)
            self._tell_soon()

    def _hang_up(self, peer: Peer) -> None:
        if peer.member is None:
            self._guests.pop(peer.fd, None)
        elif peer.member.peer is peer:
            peer.member.peer = None
            self._here -= 1
        self._crowd.unwatch(peer.fd)
        peer.close()

    def _count_lost(self, member: Member, gone: bool) -> None:
        if member.peer is None and not member.left:
            dead = gone and (member.near or member.lost)
            if gone and not dead:
                member.mourn = self._loop.at(DEAD_AFTER - BACK_WITHIN, lambda: self._count_lost(member, gone))
            member.lost = True
            self._happened(member.rank, "lost", dead)
            self._tell_soon()

    # -- the council ------------------------------------------------------------------------------------------------

    def _happened(self, rank: int, kind: str, value: Any) -> None:
        try:
            for to, what, content in self._council.on(rank, kind, value, primitives.monotonic()):
                self._said.add(to, what, content)
        except Exception as error:
            failed("the council", error)
        self._set_alarm()

    def _set_alarm(self) -> None:
        wake = self._council.wake
        if self._alarm is not None:
            if self._alarm.due == wake and self._alarm.function is not None:
                return
            self._alarm.cancel()
            self._alarm = None
        if wake < float("inf") and not self._closed:
            self._alarm = self._loop.at(max(0.001, wake - primitives.monotonic()), self._tick)
            self._alarm.due = wake

    def _tick(self) -> None:
        self._alarm = None
        self._happened(0, "tick", None)
        self._tell()

    def _tell_soon(self) -> None:
        """When everything of this moment has happened: a thousand ranks that are lost at once make one message."""
        if not self._to_tell:
            self._to_tell = True
            self._loop.call(self._tell)

    def _tell(self) -> None:
        self._to_tell = False
        last = self._said.last
        if self._told == last or self._closed:
            return
        self._told = last
        for member in list(self._members.values()):
            if member.peer is not None:
                try:
                    self._pump(member.peer)
                except Ended as error:
                    self._drop(member.peer, str(error))
        mine, self._mine = self._mine, last
        for kind, value in self._said.heard_by(0, mine):
            if self._closed:
                return
            try:
                self._deliver(kind, value)
            except Exception as error:
                failed("to hear a message", error)

    def _pump(self, peer: Peer) -> None:
        if peer.member is not None:
            while peer.told < self._said.last and peer.waiting < _FULL:
                data, peer.told = self._said.after(peer.told, peer.member.rank)
                peer.send(data)
        if peer.waiting:
            peer.send(b"")
        if peer.waiting > _UNREAD:
            raise Ended("it does not read what it is told")
        self._watch(peer)

    def _flushed(self) -> None:
        if not self._flushes or self._closed:
            return
        peers = [member.peer for member in self._members.values() if member.peer is not None]
        try:
            if any(
                peer.told < self._said.last or peer.waiting or descriptors.unsent(peer.fd) for peer in peers
            ):
                self._loop.at(_GLANCE, self._flushed)
                return
        except OSError:
            pass
        flushes, self._flushes = self._flushes, []
        for function in flushes:
            function()

    def _note_once(self, why: str) -> None:
        if why not in self._noted:
            self._noted.add(why)
            self._note(why)
