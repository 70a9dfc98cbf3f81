"""Sockets that never make the loop thread wait, and that are closed only while they are still ours.

A program that becomes a daemon closes every descriptor it knows nothing of (`os.closerange`), and its next files get
their numbers: a socket that closed its descriptor then would close the program's file.
"""

from __future__ import annotations

import _socket
import os
import select
from typing import Any

from autoteardown import unpatched

READ = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL
WRITE = select.POLLOUT

# An address translator forgets a connection that is idle for some minutes, and a host that loses power says nothing.
# What the hub says over a line that was forgotten is swallowed: the rank at its other end hears of an eviction when it
# has noticed, and made a new one. So it asks often; the kernels do that, 2,700 small packets a second for 4,096 ranks.
IDLE = 3
"""Seconds after which an idle connection is tried."""
_INTERVAL, _PROBES = 1, 3  # seconds, how many: where there is no time-out for what is not acknowledged
UNANSWERED = 6.0
"""Seconds after which the kernel gives a connection up whose other end acknowledges nothing, idle or not."""
_CHUNK = 1 << 16  # bytes


def family_of(host: str) -> int:
    """Of a numeric address; OSError for anything else."""
    family = _socket.AF_INET6 if ":" in host else _socket.AF_INET
    _socket.inet_pton(family, host)
    return int(family)


def listen(host: str) -> Any:
    """A listening socket on a numeric address, at a port of the kernel's choice.

    Raises:
        OSError: there is no such address here.
    """
    family = family_of(host)
    listener = unpatched.socket(family, _socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if family == _socket.AF_INET6:
            listener.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        keep(listener)  # for those that it accepts
        listener.bind((host, 0))
        listener.listen(4096)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(host: str, port: int) -> Any:
    """A socket that is on its way to this numeric address: no name is ever looked up.

    Raises:
        OSError: it cannot even set out (no route, no descriptor).
    """
    sock = unpatched.socket(family_of(host), _socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect((host, port))
        except BlockingIOError:
            pass
    except BaseException:
        sock.close()
        raise
    return sock


def accepted(fd: int) -> Any:
    """A connection as a listener of ours gives it: with its options."""
    # Told what it is, it need not ask the kernel: many ranks come at once. The family it has to ask for all the same.
    sock = unpatched.socket(type=_socket.SOCK_STREAM, proto=_socket.IPPROTO_TCP, fileno=fd)
    if _socket.getdefaulttimeout() is not None:  # then a send would wait that long
        sock.setblocking(False)
    return sock


def keep(sock: Any) -> None:
    """No waiting for more to send, and a connection whose other end is gone is known to be."""
    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", IDLE),
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", int(UNANSWERED * 1000)),
    )
    for name, value in options:
        option = getattr(_socket, name, None)
        if option is not None:
            sock.setsockopt(_socket.IPPROTO_TCP, option, value)


def identity(fd: int) -> tuple[int, int]:
    """What tells an open file from the next one of the same number."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def close(sock: Any, known: tuple[int, int]) -> None:
    """Close a socket unless its descriptor is somebody else's by now. May be called again; raises nothing."""
    try:
        fd = sock.fileno()
        if fd == -1:
            return
        if identity(fd) == known:
            sock.close()
        else:
            sock.detach()
    except OSError:
        sock.detach()


class ConnectionClosed(Exception):
    """A connection is over; says why in a few words."""


class Stream:
    """A TCP connection that takes bytes as fast as the kernel does, and gives what has come.

    Args:
        sock: non-blocking; closed with this.
    """

    def __init__(self, sock: Any) -> None:
        self.fd: int = sock.fileno()
        self._sock = sock
        self._identity = identity(self.fd)
        self._waiting = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return len(self._waiting)

    @property
    def events(self) -> int:
        """What to wait for."""
        return READ | WRITE if self._waiting else READ

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return bool(self._sock.fileno() == -1)

    def connected(self) -> None:
        """To be called when a socket on its way can be written to.

        Raises:
            Ended: it did not arrive.
        """
        problem = self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if problem:
            raise ConnectionClosed(os.strerror(problem).lower())
        try:
            # A port that nobody listens on any more may be the one that the kernel has given to this very socket.
            if self._sock.getsockname() == self._sock.getpeername():
                raise ConnectionClosed("connection refused")
            keep(self._sock)  # not before: one that is opened may lose more packets in a row
        except OSError as error:
            raise ConnectionClosed(words(error)) from None

    def put(self, data: bytes) -> None:
        """Have bytes go out with the next `send`."""
        self._waiting += data

    def send(self, data: bytes | bytearray) -> None:
        """Hand bytes to the kernel; what it does not take waits for the next call.

        Raises:
            Ended: the connection is broken.
        """
        waiting = self._waiting
        if not waiting and not data:
            return
        if waiting:
            waiting += data
            data = waiting
        try:
            sent = self._sock.send(data, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ConnectionClosed(words(error)) from None
        if waiting:
            del waiting[:sent]
        elif sent < len(data):
            waiting += data[sent:]

    def receive(self, most: int = _CHUNK) -> bytes:
        """What has come, so many bytes of it at most; empty if nothing has.

        Raises:
            Ended: the connection is over.
        """
        try:
            data: bytes = self._sock.recv(most, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConnectionClosed(words(error)) from None
        if not data:
            raise ConnectionClosed("closed by the other end")
        return data

    def close(self) -> None:
        """Close it; may be called again."""
        close(self._sock, self._identity)


def words(error: OSError) -> str:
    """Why, as a person would say it."""
    return (error.strerror or str(error)).lower()
