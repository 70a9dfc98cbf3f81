"""One key in the group's store: where its hub is, and what it takes to be let in.

A store client has one lock, and a blocking wait stalls every other user of it (F12): nobody waits here. Rank 0 writes
the key; the others look, and look again later if it is not there. Each look is three quick operations on a thread that
ends with it, because even those block while the program itself waits in that client.

A store outlives groups (torchrun keeps its agent's over restarts; init and destroy in one process come back to the
same prefix), and no name tells the generations apart on every rank alike. So rank 0 overwrites the key, and a rank
that finds nobody, somebody else, or a group that has another process in its place looks again.
"""

from __future__ import annotations

import _socket
import json
import sys
import weakref
from typing import Any, Callable, NamedTuple, Optional

from autoteardown import native_calls, unpatched
from autoteardown.channel import addresses
from autoteardown.channel.wire import Malformed, name_of, whole
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

KEY = "autoteardown/hub"
_VERSION = 2  # the names of the messages are part of it
_LIMIT = 4096
_STUCK = 1.0  # seconds after which a thread in the store is taken to wait for the program


class HubAddress(NamedTuple):
    """What the key holds."""

    name: str  # of this generation of the group: random
    token: str
    world: int
    here: str  # see `addresses.here`
    hosts: tuple[tuple[str, int], ...]

    def encode(self) -> str:
        """As text."""
        return json.dumps({"version": _VERSION, **self._asdict()})

    @classmethod
    def decode(cls, data: bytes) -> HubAddress:
        """The card in that text.

        Raises:
            Malformed: there is none.
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
                hosts[: addresses.MOST + 1],
            )
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            raise Malformed("no card") from None

    def route(self) -> list[tuple[str, int]]:
        """Where to try, best first: loopback leads to the hub on its own host, and to a stranger on any other."""
        near = [each for each in self.hosts if is_loopback(each[0])]
        far = [each for each in self.hosts if each not in near]
        here = addresses.here()
        if not here or not self.here:
            return far + near
        return near + far if self.here == here else far

    @property
    def near(self) -> bool:
        """Whether the hub is known to be on this host, in this network."""
        return bool(self.here) and self.here == addresses.here()


class NoHubAddress(Exception):
    """Why there is none, in words for a person."""


def is_loopback(host: str) -> bool:
    """Whether an address leads back to the host itself."""
    return host == "::1" or host.startswith("127.")


def no_store(store: Any) -> Optional[str]:
    """Why nothing can be published in this store; None if something can."""
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


def _start(errand: Callable[[], object]) -> None:
    """Do it on a thread that ends with it."""

    def run() -> None:
        try:
            native_calls.call(errand)
        except native_calls.InterpreterExiting:
            pass
        except Exception as error:
            report_failure("to use the store", error)

    unpatched.start_new_thread(run, ())


class Rendezvous:
    """The key, for one rank.

    Args:
        store: held weakly: a FileStore removes its file when its last reference goes.
        world: how many ranks; what says otherwise is another group's.
    """

    def __init__(self, store: Any, world: int) -> None:
        self._store = weakref.ref(store)
        self._world = world
        root = _root(store)
        tcp = getattr(sys.modules.get("torch.distributed"), "TCPStore", ())
        self.port: Optional[int] = root.port if isinstance(root, tcp) else None
        self._busy = unpatched.allocate_lock()
        self._since = 0.0  # when it was taken
        self._found = False  # whether there has been a card
        self._seen = False  # whether a connection with the store's server has been seen
        self._cloning = False

    def publish(self, address: HubAddress) -> None:
        """Write the key, on this thread. One operation.

        Raises:
            Exception: what the store raises.
        """
        store = self._store()
        if store is not None:
            store.set(KEY, address.encode())

    def look(self, found: Callable[[Optional[HubAddress], str], object]) -> bool:
        """Read the key on a thread of its own; never waits.

        Args:
            found: called there, with the card or None, and why there is none.

        Returns:
            Whether a thread was started: False while another is still at it.
        """
        if self.on_a_thread(lambda: self._read(found, self._store())):
            return True
        # The program itself waits in that client: for NCCL's unique id, say, until rank 0 comes to its first
        # collective. That may take long, and another client may not.
        if unpatched.monotonic() - self._since < _STUCK or self._cloning:
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

        _start(read)
        return True

    def on_a_thread(self, errand: Callable[[], object]) -> bool:
        """Have a thread do something in the store; False while another is still at it."""
        if not self._busy.acquire(False):
            return False
        self._since = unpatched.monotonic()

        def run() -> None:
            try:
                errand()
            finally:
                self._busy.release()

        try:
            _start(run)
        except BaseException:
            self._busy.release()
            raise
        return True

    def _read(self, found: Callable[[Optional[HubAddress], str], object], store: Any) -> None:
        address, why = None, ""
        try:
            address = self._address(store)
        except NoHubAddress as error:
            why = str(error)
        except Malformed as error:
            why = f"what rank 0 has published is {error}"
        except Exception as error:
            why = f"the store cannot be read: {type(error).__name__}"
        found(address, why)

    def _address(self, store: Any) -> HubAddress:
        if store is None:
            raise NoHubAddress("the store is gone")
        if self.port and self._hung_up(self.port):
            raise NoHubAddress("the store's server is gone")
        if not store.check([KEY]):
            raise NoHubAddress("rank 0 has not published its hub")
        address = HubAddress.decode(bytes(store.get(KEY)))
        if address.world != self._world:
            raise NoHubAddress("rank 0 has not published its hub")
        self._found = True
        return address

    def _hung_up(self, port: int) -> bool:
        # c10d prints a warning with a backtrace when it finds that out by itself, whatever becomes of the exception.
        found = addresses.connections(port)
        try:
            clients = [_is_over(sock) for sock, is_client in found if is_client]
            # A connection that was reset has no other end any more, and is not found. Where nothing is ever found, the
            # first time is worth it.
            self._seen = self._seen or bool(clients)
            return all(clients) if clients else self._seen or self._found
        finally:
            for sock, _ in found:
                sock.close()


def _is_over(sock: Any) -> bool:
    try:
        return not sock.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
