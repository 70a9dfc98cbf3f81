"""Accepts connections on the hub and authenticates them: a peer has to prove that it knows the group's token.

1. The number of unauthenticated connections is limited, and so is the time that each has. When there are too many, the
   oldest is closed first.
2. Nothing that an unauthenticated peer sends reaches code beyond this module.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from autoteardown import unpatched
from autoteardown.channel import fd_limits
from autoteardown.channel.wire import Lines, Malformed, encode, is_proof, name_of, proof, whole
from autoteardown.event_loop import sockets
from autoteardown.event_loop.sockets import READ, ConnectionClosed, Stream

if TYPE_CHECKING:
    from autoteardown.channel.rendezvous import HubAddress
    from autoteardown.event_loop.loop import Loop, Timer

MAX_UNAUTHENTICATED = 32
"""Unauthenticated connections allowed beyond one for each rank that has not connected."""
AUTHENTICATION_SECONDS = 10.0
_ACCEPT_BATCH = 64  # connections accepted in a row, before the loop serves other descriptors
_ACCEPT_PAUSE = 0.5  # seconds without accepting, when the process has no file descriptor left
_NO_ROOM = "the hub has no file descriptor left for one more rank (RLIMIT_NOFILE)"


class Peer(Stream):
    """One accepted connection, authenticated or not."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.lines = Lines()
        self.accepted_at = unpatched.monotonic()
        self.member: Any = None  # the hub's Member, once authenticated
        self.sent_index = 0  # index of the last message handed to the kernel


class Hello(NamedTuple):
    """The first line of a peer that has proven that it knows the token."""

    rank: int
    world: int
    incarnation: str  # random; a rank that leaves and joins again has another
    attempt: int  # grows with each connection of an incarnation
    received: int  # index of the last message that the rank has received
    same_host: int


class Admission:
    """Accepts and authenticates connections. Every method runs on the loop thread.

    Args:
        loop: rank 0's event loop.
        address: the hub's published address, with the token.
        listeners: listening sockets.
        high_fds: whether connections are moved to high descriptor numbers (see `fd_limits`).
        member_count: returns how many members are connected.
        on_accept: called with each new connection.
        disconnect: called with an unauthenticated connection that has to be closed.
        log: called with one line, once for each kind of problem with connections.
    """

    def __init__(
        self,
        loop: Loop,
        address: HubAddress,
        listeners: list[Any],
        high_fds: bool,
        member_count: Callable[[], int],
        on_accept: Callable[[Peer], object],
        disconnect: Callable[[Peer], object],
        log: Callable[[str], object],
    ) -> None:
        self._loop, self._address, self._high_fds = loop, address, high_fds
        self._member_count, self._on_accept, self._disconnect, self._log = (
            member_count,
            on_accept,
            disconnect,
            log,
        )
        self._listeners = [(each, sockets.identity(each.fileno())) for each in listeners]
        self._capacity = 0  # connections that the descriptor limit allows
        self._unauthenticated: collections.OrderedDict[int, Peer] = (
            collections.OrderedDict()
        )  # the oldest first
        self._logged: set[str] = set()
        self._expiry: Optional[Timer] = None
        self._closed = False

    def open(self) -> None:
        """Start accepting connections."""
        self._capacity = fd_limits.reserve(self._address.world - 1 + MAX_UNAUTHENTICATED)
        for listener, _ in self._listeners:
            self._listen(listener)

    def close(self) -> None:
        """Close the listening sockets and every unauthenticated connection."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        for listener, identity in self._listeners:
            self._loop.unwatch(listener.fileno())
            sockets.close(listener, identity)
        for peer in list(self._unauthenticated.values()):
            peer.close()
        self._unauthenticated.clear()

    def authenticate(self, line: list[Any]) -> Hello:
        """Parse a peer's first line and check its proof.

        Raises:
            Malformed: the line is no hello.
            ConnectionClosed: the proof is wrong, so the peer does not know the token.
        """
        if len(line) != 8 or line[0] != "hello":
            raise Malformed("no hello")
        rank, world, incarnation = whole(line[1], 1), whole(line[2], 1), name_of(line[3])
        hello = Hello(rank, world, incarnation, whole(line[4], 1), whole(line[5]), whole(line[6], 0, 1))
        if not is_proof(line[7], proof(self._address.token, "hello", *hello)):
            self.log_once("the hub has closed a connection without this group's token")
            raise ConnectionClosed("no token")
        return hello

    def proof_for(self, hello: Hello) -> str:
        """The proof to that rank that the hub knows the token, too."""
        return proof(self._address.token, "welcome", *hello)

    def release(self, peer: Peer) -> None:
        """Stop counting a connection as unauthenticated."""
        self._unauthenticated.pop(peer.fd, None)

    def reject(self, peer: Peer, why: str) -> None:
        """Close an unauthenticated connection, and log the kind once; an empty `why` is not logged."""
        self._disconnect(peer)
        if why:
            self.log_once(f"the hub has closed {why}")

    def log_once(self, why: str) -> None:
        """Log one line for each kind of problem."""
        if why not in self._logged:
            self._logged.add(why)
            self._log(why)

    def _listen(self, listener: Any) -> None:
        self._loop.watch(listener.fileno(), READ, lambda events: self._accept(listener))

    def _accept(self, listener: Any) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                fd, _ = listener._accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._closed or listener.fileno() == -1:
                    return
                self.log_once(f"the hub cannot accept a connection: {sockets.reason(error)}")
                self._pause(listener)
                return
            try:
                self._add(sockets.accepted(fd_limits.move_high(fd) if self._high_fds else fd))
            except OSError:
                continue

    def _pause(self, listener: Any) -> None:
        self._loop.unwatch(listener.fileno())

        def resume() -> None:
            if not self._closed:
                self._listen(listener)

        self._loop.at(_ACCEPT_PAUSE, resume)

    def _add(self, sock: Any) -> None:
        peer = Peer(sock)
        room = self._capacity - self._member_count()
        if room <= 0:
            self.log_once(_NO_ROOM)
            try:
                peer.send(encode("no", _NO_ROOM))
            except ConnectionClosed:
                pass
            peer.close()
            return
        while len(self._unauthenticated) >= room:
            self.reject(
                next(iter(self._unauthenticated.values())),
                "the oldest of too many unauthenticated connections",
            )
        self._unauthenticated[peer.fd] = peer
        self._on_accept(peer)
        if self._expiry is None:
            self._expiry = self._loop.at(AUTHENTICATION_SECONDS, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = unpatched.monotonic()
        for peer in list(self._unauthenticated.values()):
            if peer.accepted_at <= now - AUTHENTICATION_SECONDS:
                self.reject(peer, "a connection that did not authenticate in time")
        if self._unauthenticated and not self._closed:
            self._expiry = self._loop.at(AUTHENTICATION_SECONDS / 2, self._expire)
