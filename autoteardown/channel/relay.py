"""A line to a TCPStore that stays silent when the store's server goes away.

A c10d client whose server exits while it waits prints a C++ warning and a backtrace from its own socket code, whatever
Python makes of the exception: every job whose rank 0 merely ends first would end in a page of noise. Rejected:

1. Short waits or polling: O(world) store operations a second, and each client-side time-out prints two warnings.
2. Raising c10's log level, or pointing fd 2 elsewhere, for the time being: both would swallow the application's lines.
3. Saying good-bye before the server goes: nobody does when rank 0 calls os._exit, is killed or simply returns.

So our clients connect through this process's loopback, over a thread that copies bytes and knows nothing of the
protocol. When the server goes, only this thread sees it; it keeps the clients' ends open, and feeds them zeros so that
a thread that waits in C++ comes back. What it makes of the zeros does not matter: `over` is set by then.
"""

from __future__ import annotations

import _thread
import os
import select
import socket
import time
from datetime import timedelta
from typing import Any, Callable

from autoteardown.boundary import guarded

CONNECT_TIMEOUT = 30.0
# TCPStore hands its time-out to poll(2) as a C int of milliseconds: 2**31 of them are negative there, so the wait has
# no end. Should torch clamp it one day, the wait ends after 24 days, and `read` waits again.
FOREVER = timedelta(milliseconds=2**31)
# Every connection costs the server's only thread a reverse DNS look-up of the client (c10d wants its name for the log),
# so a whole world does not come at once.
_STAGGER = 0.001


class Over(Exception):
    """The line is closed or lost: nothing read from it now means anything."""


class Relay:
    """Two clients of one TCPStore: one for the thread that waits, one for the threads that post."""

    def __init__(self, client: Callable[..., Any], host: str, port: int, rank: int) -> None:
        self.over: str | None = None  # why the line is no more
        self._client, self._host, self._port, self._rank = client, host, port, rank
        self._pid = os.getpid()
        self._ended: Callable[[str], None] | None = None
        self._ending = [True]  # popped by whoever ends the line: only one can
        self._sockets: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        self._clients: list[Any] = []
        self._ends: list[socket.socket] = []  # our ends of the clients' connections
        self._ready = False

    def connect(self, ended: Callable[[str], None]) -> None:
        """Connect both clients; `ended` is called once, with a reason, if the line is lost. Two connections."""
        self._ended = ended
        time.sleep(self._rank * _STAGGER)
        doors = {}
        for _ in range(2):
            self.check()
            server = socket.create_connection((self._host, self._port), timeout=CONNECT_TIMEOUT)
            self._servers.append(server)
            self._sockets.append(server)
            server.settimeout(None)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(server)
            door = _loopback_listener()
            self._sockets.append(door)
            doors[door.fileno()] = (door, server)
        addresses = [door.getsockname() for door, _ in doors.values()]
        _thread.start_new_thread(guarded(self._copy), (doors,))
        for host, port, *_ in addresses:
            self._clients.append(
                # use_libuv is about the server's kind; False spares a client the question whether libuv is there.
                self._client(
                    host,
                    port,
                    is_master=False,
                    timeout=timedelta(seconds=CONNECT_TIMEOUT),
                    wait_for_workers=False,
                    use_libuv=False,
                )
            )
        self._clients[0].set_timeout(FOREVER)
        self._ready = True
        if self.over is not None:
            self._hang_up()
        self.check()

    def check(self) -> None:
        """Raise `Over` if the line is closed or lost."""
        if self.over is not None:
            raise Over(self.over)

    def read(self, key: str) -> bytes:
        """Wait for a key and return its value. Two store operations (c10d's get is a wait and a get)."""
        while True:
            began = time.monotonic()
            try:
                value: bytes = self._clients[0].get(key)
            except Exception:
                self.check()
                if time.monotonic() - began < FOREVER.total_seconds() / 2:
                    raise
            else:
                self.check()
                return value

    def store(self) -> Any:
        """The client to post with."""
        self.check()
        return self._clients[1]

    def hurry(self) -> None:
        """A push is as fast as it gets."""

    def end(self, reason: str, lost: bool = True) -> None:
        """End the line, from any thread; a thread blocked in `read` or in a post comes back."""
        if os.getpid() != self._pid:
            return  # a forked child must not shut its parent's connections down
        try:
            self._ending.pop()
        except IndexError:
            return
        self.over = reason
        if lost and self._ended is not None:
            self._ended(reason)
        if self._ready:  # else: a client is saying hello to the server; connect() hangs up after that
            self._hang_up()

    def abandon(self) -> None:
        """At exit: leave the connections open, so that a client that waits in C++ does so until the end."""
        for each in (*self._sockets, *self._ends):
            each.detach()

    def forget(self) -> None:
        """In a forked child: let go of the parent's descriptors."""
        self.over = self.over or "forked"
        for each in self._sockets:
            each.close()

    def _hang_up(self) -> None:
        for server in self._servers:
            try:
                server.shutdown(socket.SHUT_RDWR)  # wakes the copying thread
            except OSError:
                pass

    def _copy(self, doors: dict[int, tuple[socket.socket, socket.socket]]) -> None:
        reason = "the store's server closed the connection"
        routes: dict[int, tuple[socket.socket, socket.socket]] = {}
        try:
            poll = select.poll()
            for door, _ in doors.values():
                poll.register(door, select.POLLIN)
            while True:
                for fd, _event in poll.poll():
                    if fd in doors:
                        door, server = doors.pop(fd)
                        end = door.accept()[0]
                        poll.unregister(door)
                        door.close()
                        self._sockets.append(end)
                        self._ends.append(end)
                        end.settimeout(None)
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        routes[end.fileno()], routes[server.fileno()] = (end, server), (server, end)
                        poll.register(end, select.POLLIN)
                        poll.register(server, select.POLLIN)
                        continue
                    source, sink = routes[fd]
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    sink.sendall(data)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self.end(reason)
            # Not while a client is still saying hello: it would print a warning about the answer, and try again. Its
            # thread is left where it is, which takes a server that dies within a millisecond of the connection.
            for end in self._ends if self._ready else ():
                try:
                    end.send(bytes(4096), socket.MSG_DONTWAIT)
                except OSError:
                    pass
            for server in self._servers:
                server.close()

    def __del__(self) -> None:
        try:
            self._clients.clear()  # before our ends of them: a client that finds its peer gone prints a warning
            for each in self._sockets:
                each.close()
        except Exception:  # half made
            pass


def _loopback_listener() -> socket.socket:
    # c10d asks for the name of ::1, which /etc/hosts has as a rule, and of 127.0.0.1 in a form that it never has.
    for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")):
        try:
            listener = socket.socket(family)
        except OSError:
            continue
        try:
            listener.bind((address, 0))
            listener.listen(1)
        except OSError:
            listener.close()
            continue
        return listener
    raise OSError("there is no loopback interface")


def _keep_alive(server: socket.socket) -> None:
    # A connection that is silent for days is dropped by firewalls and address translators, without a word to either
    # end; and a node that loses power says nothing either.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            server.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
