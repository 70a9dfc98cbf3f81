"""Non-blocking TCP sockets, each closed only if its descriptor still refers to it.

A program that becomes a daemon closes every descriptor that it does not know (`os.closerange`), and its next files get
the same numbers. A socket that closed its descriptor after that would close the program's file.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import termios
from typing import Any

from autoteardown import unpatched

READ = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL
WRITE = select.POLLOUT

# A NAT device forgets a connection that is idle for some minutes, and a host that loses power sends nothing. The hub's
# messages over such a connection are lost: its rank learns of an eviction only when it has noticed and reconnected. So
# TCP keepalive probes often. The kernels do that, with 2,700 small packets a second for 4,096 ranks.
KEEPALIVE_IDLE = 3
"""Seconds after which the kernel probes an idle connection."""
_INTERVAL, _PROBES = 1, 3  # seconds, count: they decide where the system has no TCP_USER_TIMEOUT
USER_TIMEOUT = 6.0
"""Seconds without an acknowledgement after which the kernel closes a connection, idle or not."""
_CHUNK = 1 << 16  # bytes


def family_of(host: str) -> int:
    """The address family of a numeric address.

    Raises:
        OSError: the host is no numeric address.
    """
    family = _socket.AF_INET6 if ":" in host else _socket.AF_INET
    _socket.inet_pton(family, host)
    return int(family)


def listen(host: str) -> Any:
    """A listening socket on a numeric address, at a port that the kernel chooses.

    Raises:
        OSError: this host has no such address.
    """
    family = family_of(host)
    listener = unpatched.socket(family, _socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if family == _socket.AF_INET6:
            listener.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        set_options(listener)  # inherited by the connections that it accepts
        listener.bind((host, 0))
        listener.listen(4096)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(host: str, port: int) -> Any:
    """A socket that is connecting to a numeric address; no name is ever resolved.

    Raises:
        OSError: the connection cannot be started (no route, no descriptor).
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
    """The socket object for a descriptor that a listener from `listen` has accepted; it has the listener's options."""
    # With type and protocol given, the constructor asks the kernel only for the family: many ranks connect at once.
    sock = unpatched.socket(type=_socket.SOCK_STREAM, proto=_socket.IPPROTO_TCP, fileno=fd)
    if _socket.getdefaulttimeout() is not None:  # else a send would wait that long
        sock.setblocking(False)
    return sock


def set_options(sock: Any) -> None:
    """Send without delay (TCP_NODELAY), and detect a dead peer (keepalive, TCP_USER_TIMEOUT)."""
    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", int(USER_TIMEOUT * 1000)),
    )
    for name, value in options:
        option = getattr(_socket, name, None)
        if option is not None:
            sock.setsockopt(_socket.IPPROTO_TCP, option, value)


def identity(fd: int) -> tuple[int, int]:
    """Device and inode of an open file: they differ from those of a later file at the same descriptor number."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def close(sock: Any, known: tuple[int, int]) -> None:
    """Close a socket, unless its descriptor now refers to another file. May be called again; raises nothing."""
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


def unacknowledged(fd: int) -> int:
    """Bytes in the kernel's send buffer that the other host has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), "little")


class ConnectionClosed(Exception):
    """A connection has ended; the text is the reason."""


class Stream:
    """A TCP connection with a send buffer; no call waits.

    Args:
        sock: non-blocking; `close` closes it.
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
        """The `poll` events to watch for."""
        return READ | WRITE if self._waiting else READ

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return bool(self._sock.fileno() == -1)

    def check_connected(self) -> None:
        """Complete a connection from `connect`, once its socket is writable.

        Raises:
            ConnectionClosed: the connection could not be established.
        """
        problem = self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if problem:
            raise ConnectionClosed(os.strerror(problem).lower())
        try:
            # The kernel may have given this socket the very port that it connects to, if no listener holds it any more:
            # the socket is then connected to itself.
            if self._sock.getsockname() == self._sock.getpeername():
                raise ConnectionClosed("connection refused")
            set_options(
                self._sock
            )  # not earlier: the handshake may lose more packets in a row than these allow
        except OSError as error:
            raise ConnectionClosed(reason(error)) from None

    def put(self, data: bytes) -> None:
        """Buffer bytes for the next `send`."""
        self._waiting += data

    def send(self, data: bytes | bytearray) -> None:
        """Send the buffered bytes and these, as far as the kernel takes them; buffer the rest.

        Raises:
            ConnectionClosed: the connection is broken.
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
            raise ConnectionClosed(reason(error)) from None
        if waiting:
            del waiting[:sent]
        elif sent < len(data):
            waiting += data[sent:]

    def receive(self, most: int = _CHUNK) -> bytes:
        """Return at most so many received bytes; empty if there are none.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        try:
            data: bytes = self._sock.recv(most, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConnectionClosed(reason(error)) from None
        if not data:
            raise ConnectionClosed("closed by the other end")
        return data

    def acknowledge(self) -> None:
        """Have the kernel acknowledge now what has been received: it may wait 40 ms for data to send with it.

        The other end may be waiting for that, see `unacknowledged`. TCP_QUICKACK holds for this time only (tcp(7)).
        """
        option = getattr(_socket, "TCP_QUICKACK", None)
        if option is not None:
            try:
                self._sock.setsockopt(_socket.IPPROTO_TCP, option, 1)
            except OSError:  # the next call tells that the connection has ended
                pass

    def close(self) -> None:
        """Close the socket. May be called again."""
        close(self._sock, self._identity)


def reason(error: OSError) -> str:
    """The error's reason, for a message."""
    return (error.strerror or str(error)).lower()
