"""Publishes the hub's address and token in one key of the group's c10d store, and reads it on the other ranks.

1. A store client has one lock, and a blocking wait in it stalls every other user of that client. So no rank waits
   for the key: rank 0 writes it, and a rank that does not find it reads again later.
2. A read is three quick operations on a thread of its own, because even those block while the program itself waits in
   that client.
3. A store outlives groups: torchrun keeps its agent's store over restarts, and init and destroy in one process come
   back to the same prefix. No name tells the generations of a group apart in the same way on every rank. So rank 0
   overwrites the key. A rank reads again when no hub answers, when another program answers, or when another process
   holds its rank.
"""

from __future__ import annotations

import _socket
import json
import sys
import weakref
from typing import Any, Callable, NamedTuple, Optional

from autoteardown import native_calls, spare_threads, unpatched
from autoteardown.channel import addresses
from autoteardown.channel.wire import Malformed, name_of, whole
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

KEY = "autoteardown/hub"
_VERSION = 2  # changes with the format and with the names of the messages
_LIMIT = 4096  # bytes
STORE_CLOSED = "the store's server has closed its connections"
"""Why a read fails when the process that serves the store has ended: rank 0, or its launcher."""
_STUCK = 1.0  # seconds after which a thread in the store is assumed to wait for the program


class HubAddress(NamedTuple):
    """The content of the key: where the hub listens, and the token."""

    name: str  # random; each generation of the group has another
    token: str
    world: int
    here: str  # see `addresses.host_id`
    hosts: tuple[tuple[str, int], ...]

    def encode(self) -> str:
        """The address as JSON."""
        return json.dumps({"version": _VERSION, **self._asdict()})

    @classmethod
    def decode(cls, data: bytes) -> HubAddress:
        """Parse an address.

        Raises:
            Malformed: the text is no address of this version.
        """
        try:
            if len(data) > _LIMIT:
                raise Malformed("too long")
            found = json.loads(data)
            if found["version"] != _VERSION:
                raise Malformed("of another version")
            hosts = tuple((str(host), whole(port, 1, 65535)) for host, port in found["hosts"])
            for host, _ in hosts:
                sockets.family_of(host)
            here = found["here"]
            return cls(
                name_of(found["name"]),
                name_of(found["token"]),
                whole(found["world"], 1),
                here if isinstance(here, str) else "",
                hosts[: addresses.MAX_ADDRESSES + 1],
            )
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            raise Malformed("not a hub's address") from None

    def route(self) -> list[tuple[str, int]]:
        """The addresses to try, best first. Loopback reaches the hub only on the hub's own host."""
        loopback = [each for each in self.hosts if is_loopback(each[0])]
        remote = [each for each in self.hosts if each not in loopback]
        here = addresses.host_id()
        if not here or not self.here:
            return remote + loopback
        return loopback + remote if self.here == here else remote

    @property
    def same_host(self) -> bool:
        """Whether the hub is known to be on this host, in this network namespace."""
        return bool(self.here) and self.here == addresses.host_id()


class NoHubAddress(Exception):
    """The store has no usable address; the text says why."""


def is_loopback(host: str) -> bool:
    """Whether an address leads back to the host itself."""
    return host == "::1" or host.startswith("127.")


def no_store(store: Any) -> Optional[str]:
    """The reason why this store cannot hold the key, or None if it can."""
    c10d = sys.modules.get("torch.distributed")
    root = _root(store)
    if root is None or type(root) is getattr(c10d, "Store", None):
        return "this process group has no store (MPI)"
    if type(root).__name__ == "FakeStore":
        return "this process group's store is a fake"
    return None


def _root(store: Any) -> Any:
    while type(store).__name__ == "PrefixStore":
        store = store.underlying_store
    return store


def _start(function: Callable[[], object]) -> bool:
    """Call the function on another thread; return whether there is one."""

    def run() -> None:
        try:
            native_calls.call(function)
        except native_calls.InterpreterExiting:
            pass
        except Exception as error:
            report_failure("to use the store", error)

    return spare_threads.start(run)


class Rendezvous:
    """Writes and reads the key for one rank.

    Args:
        store: the group's store. Held weakly: a FileStore removes its file with its last reference.
        world: number of ranks; an address with another number belongs to another group.
    """

    def __init__(self, store: Any, world: int) -> None:
        self._store = weakref.ref(store)
        self._world = world
        root = _root(store)
        tcp = getattr(sys.modules.get("torch.distributed"), "TCPStore", ())
        self.port: Optional[int] = root.port if isinstance(root, tcp) else None
        self._busy = unpatched.allocate_lock()
        self._busy_since = 0.0
        self._found = False  # whether an address has been read
        self._seen = False  # whether a connection to the store's server has been seen
        self._cloning = False

    def publish(self, address: HubAddress) -> None:
        """Write the key on the calling thread, with one store operation.

        Raises:
            Exception: any error of the store.
        """
        store = self._store()
        if store is not None:
            store.set(KEY, address.encode())

    def look(self, found: Callable[[Optional[HubAddress], str], object]) -> bool:
        """Read the key on a thread of its own; never waits.

        Args:
            found: called on that thread with the address, or with None and the reason.

        Returns:
            Whether it is being read: False while another read still runs, and where no thread can be started.
        """
        if self.on_a_thread(lambda: self._read(found, self._store())):
            return True
        # The program itself waits in that client: for example for NCCL's unique id, until rank 0 reaches its first
        # collective. That may take long; another client of the same store is not blocked.
        if unpatched.monotonic() - self._busy_since < _STUCK or self._cloning:
            return False
        clone = getattr(self._store(), "clone", None)
        if clone is None:  # torch before 2.8
            return False
        self._cloning = True

        def read() -> None:
            try:
                self._read(found, clone())
            finally:
                self._cloning = False

        if not _start(read):
            self._cloning = False
            return False
        return True

    def on_a_thread(self, function: Callable[[], object]) -> bool:
        """Call a function that uses the store on another thread; False if one does already, or there is none."""
        if not self._busy.acquire(False):
            return False
        self._busy_since = unpatched.monotonic()

        def run() -> None:
            try:
                function()
            finally:
                self._busy.release()

        started = False
        try:
            started = _start(run)
        finally:
            if not started:
                self._busy.release()
        return started

    def _read(self, found: Callable[[Optional[HubAddress], str], object], store: Any) -> None:
        address, why = None, ""
        try:
            address = self._address(store)
        except NoHubAddress as error:
            why = str(error)
        except Malformed as error:
            why = f"rank 0 has published an address that is {error}"
        except Exception as error:
            closed = type(error).__name__ == "DistNetworkError"
            why = STORE_CLOSED if closed else f"the store cannot be read: {type(error).__name__}"
        found(address, why)

    def _address(self, store: Any) -> HubAddress:
        if store is None:
            raise NoHubAddress("the process group's store has been released")
        if self.port and self._server_closed(self.port):
            raise NoHubAddress(STORE_CLOSED)
        if not store.check([KEY]):
            raise NoHubAddress("rank 0 has not published its hub")
        address = HubAddress.decode(bytes(store.get(KEY)))
        if address.world != self._world:
            raise NoHubAddress("rank 0 has not published its hub")
        self._found = True
        return address

    def _server_closed(self, port: int) -> bool:
        # When c10d itself finds a closed connection, it prints a warning with a backtrace, even if the exception is
        # caught. So the connections are checked before the store is used.
        found = addresses.connections(port)
        try:
            clients = [_is_closed(sock) for sock, is_client in found if is_client]
            # A connection that was reset has no peer address any more, so it is not found. Where no connection has ever
            # been found, one warning is accepted.
            self._seen = self._seen or bool(clients)
            return all(clients) if clients else self._seen or self._found
        finally:
            for sock, _ in found:
                sock.close()


def _is_closed(sock: Any) -> bool:
    try:
        return not sock.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
