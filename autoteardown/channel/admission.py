"""The hub's door: whoever connects is a guest until it has proven that it knows the token.

Guests are few, have little time, and the oldest goes first. Nothing that a guest says gets any further than this
module.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from autoteardown import unpatched
from autoteardown.channel import fd_limits
from autoteardown.channel.wire import Lines, Malformed, encode, name_of, proof, proven, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.sockets import READ, ConnectionClosed, Stream

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

GUESTS = 32
"""So many connections more than ranks that are missing may be there without having shown the token."""
GUEST_SECONDS = 10.0
_ACCEPTS = 64  # in a row, before it is the others' turn
_PAUSE = 0.5  # seconds without accepting when there is no descriptor to be had
_NO_ROOM = "the hub has no file descriptor left for one more rank (RLIMIT_NOFILE)"


class Peer(Stream):
    """One connection: a guest's, or a member's."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.lines = Lines()
        self.since = unpatched.monotonic()
        self.member: Any = None  # the hub's, once it has been let in
        self.told = 0  # index of the last message handed to the kernel


class Hello(NamedTuple):
    """A first line, by somebody who knows the token."""

    rank: int
    world: int
    name: str  # of this life of the rank
    attempt: int
    heard: int
    near: int


class Admission:
    """See above. Everything happens on the loop thread.

    Args:
        loop: rank 0's.
        card: what the ranks know of this hub.
        listeners: sockets that listen.
        many: whether connections are not to take the low numbers (see `descriptors`).
        here: how many members are connected.
        welcome: called with each new guest.
        hang_up: called with a guest that has to go.
        note: called once with a line about each sort of trouble with those who connect.
    """

    def __init__(
        self,
        loop: Loop,
        address: HubAddress,
        listeners: list[Any],
        many: bool,
        here: Callable[[], int],
        welcome: Callable[[Peer], object],
        hang_up: Callable[[Peer], object],
        note: Callable[[str], object],
    ) -> None:
        self._loop, self._address, self._many = loop, address, many
        self._here, self._welcomed, self._hang_up, self._note = here, welcome, hang_up, note
        self._listeners = [(each, sockets.identity(each.fileno())) for each in listeners]
        self._room = 0  # for connections
        self._guests: collections.OrderedDict[int, Peer] = collections.OrderedDict()
        self._noted: set[str] = set()
        self._sweep: Optional[Timer] = None
        self._closed = False

    def open(self) -> None:
        """Let them come."""
        self._room = fd_limits.afford(self._address.world - 1 + GUESTS)
        for listener, _ in self._listeners:
            self._listen(listener)

    def close(self) -> None:
        """Close what listens, and every guest."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for listener, identity in self._listeners:
            self._loop.unwatch(listener.fileno())
            sockets.close(listener, identity)
        for peer in list(self._guests.values()):
            peer.close()
        self._guests.clear()

    def identify(self, line: list[Any]) -> Hello:
        """Who says this first line.

        Raises:
            Malformed: it is no hello.
            Ended: it is not by one who knows the token.
        """
        if len(line) != 8 or line[0] != "hello":
            raise Malformed("no hello")
        rank, world, name = whole(line[1], 1), whole(line[2], 1), name_of(line[3])
        hello = Hello(rank, world, name, whole(line[4], 1), whole(line[5]), whole(line[6], 0, 1))
        if not proven(line[7], proof(self._address.token, "hello", *hello)):
            self.note_once("the hub has hung up on somebody without this group's token")
            raise ConnectionClosed("no token")
        return hello

    def promise(self, hello: Hello) -> str:
        """What proves to that rank that the hub knows the token, too."""
        return proof(self._address.token, "welcome", *hello)

    def leave(self, peer: Peer) -> None:
        """That one is no guest any more."""
        self._guests.pop(peer.fd, None)

    def turn_away(self, peer: Peer, why: str) -> None:
        """Hang up on a guest, and say so once; an empty `why` is not worth a word."""
        self._hang_up(peer)
        if why:
            self.note_once(f"the hub has hung up on {why}")

    def note_once(self, why: str) -> None:
        """One line on the log about each sort of trouble."""
        if why not in self._noted:
            self._noted.add(why)
            self._note(why)

    def _listen(self, listener: Any) -> None:
        self._loop.watch(listener.fileno(), READ, lambda events: self._accept(listener))

    def _accept(self, listener: Any) -> None:
        for _ in range(_ACCEPTS):
            try:
                fd, _ = listener._accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._closed or listener.fileno() == -1:
                    return
                self.note_once(f"the hub cannot accept a connection: {sockets.words(error)}")
                self._pause(listener)
                return
            try:
                self._welcome(sockets.accepted(fd_limits.high(fd) if self._many else fd))
            except OSError:
                continue

    def _pause(self, listener: Any) -> None:
        self._loop.unwatch(listener.fileno())

        def go_on() -> None:
            if not self._closed:
                self._listen(listener)

        self._loop.at(_PAUSE, go_on)

    def _welcome(self, sock: Any) -> None:
        peer = Peer(sock)
        room = self._room - self._here()
        if room <= 0:
            self.note_once(_NO_ROOM)
            try:
                peer.send(encode("no", _NO_ROOM))
            except ConnectionClosed:
                pass
            peer.close()
            return
        while len(self._guests) >= room:
            self.turn_away(next(iter(self._guests.values())), "too many who do not say who they are")
        self._guests[peer.fd] = peer
        self._welcomed(peer)
        if self._sweep is None:
            self._sweep = self._loop.at(GUEST_SECONDS, self._sweep_out)

    def _sweep_out(self) -> None:
        self._sweep = None
        now = unpatched.monotonic()
        for peer in list(self._guests.values()):
            if peer.since <= now - GUEST_SECONDS:
                self.turn_away(peer, "somebody who does not say who it is")
        if self._guests and not self._closed:
            self._sweep = self._loop.at(GUEST_SECONDS / 2, self._sweep_out)
