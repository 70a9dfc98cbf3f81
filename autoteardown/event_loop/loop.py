"""The one thread of an armed rank: it reads the wake-up fd, and whatever else the rank has to read, and never waits.

What the wake-up fd says is read first in each turn. Everything that runs here runs before the next signal is heard, so
nothing that is called here may block.
"""

from __future__ import annotations

import _queue
import _socket
import heapq
import itertools
import os
import select
import sys
from typing import Callable, Optional

from autoteardown import unpatched
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

DAY = 86400.0
_UCRED = 12  # struct ucred: pid, uid, gid
_WAKE = 0  # no signal has this number
_MANY = 64  # calls
_PATIENCE = 0.5  # seconds for a thread that needs nothing but the GIL to come by

Callback = Callable[[], object]


class Timer:
    """What `Loop.at` returns."""

    __slots__ = ("due", "function")

    def __init__(self, due: float, function: Callback) -> None:
        self.due = due
        self.function: Optional[Callback] = function

    def cancel(self) -> None:
        """It does not run any more; from any thread, and as often as you like."""
        self.function = None


class Loop:
    """A socket pair, one end of which is the wake-up fd, and a thread that polls the other.

    Args:
        hear: called on the thread with signal numbers, one byte each, written by this process.
        deaf: called on the thread, with what went wrong, if it cannot go on: its descriptors were closed under it.
        quiet: called on the thread once a day.

    Raises:
        OSError, RuntimeError: no socket pair or no thread to be had.
    """

    def __init__(
        self,
        hear: Callable[[bytes], object],
        deaf: Callable[[Exception], object],
        quiet: Callback,
    ) -> None:
        self._hear, self._deaf, self._quiet = hear, deaf, quiet
        self._pid = os.getpid()
        self._from_this_process = b""  # how the credentials of what this process writes begin
        self._space = 0  # for credentials
        self._receiver, self._sender = unpatched.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self.fd: int = self._sender.fileno()
        self._ends = [(end, sockets.identity(end.fileno())) for end in (self._receiver, self._sender)]
        try:
            self._receiver.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
            self._from_this_process = self._pid.to_bytes(4, sys.byteorder)
            self._space = _socket.CMSG_SPACE(_UCRED)
        except (AttributeError, OSError):  # not Linux: only the fork hooks protect the parent
            pass
        self._poll = unpatched.poll()
        self._poll.register(self._receiver.fileno(), select.POLLIN)
        self._watched: dict[int, Callable[[int], object]] = {}
        self._fresh: set[int] = set()  # watched since the poll whose events are told just now
        self._calls: _queue.SimpleQueue[Callback] = _queue.SimpleQueue()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._ident: Optional[int] = None
        self._closing = False
        self._ended = unpatched.allocate_lock()
        self._ended.acquire()
        self._add(Timer(unpatched.monotonic() + DAY, self._daily))
        try:
            unpatched.start_new_thread(self._run, ())
        except BaseException:
            self.forget()
            raise

    # -- for any thread ---------------------------------------------------------------------------------------------

    @property
    def here(self) -> bool:
        """Whether the thread is in this process (and not only in the parent that forked it)."""
        return self._pid == os.getpid()

    @property
    def running(self) -> bool:
        """Whether what is asked for here will still be done."""
        return self.here and not self._closing

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on the thread."""
        return self._ident == unpatched.get_ident()

    def write(self, byte: int) -> None:
        """As the C-level handler does; never waits."""
        try:
            self._sender.send(bytes((byte,)))
        except OSError:  # full, so there is something to read; or closed
            pass

    def call(self, function: Callback) -> None:
        """Have the thread call this soon; in the order of the calls. From any thread, at any bytecode."""
        self._calls.put(function)
        # Where that many wait, somebody's byte is there already, and room has to be left for signals. A flag that a
        # byte is on its way would not do: a thread may be frozen for good between the flag and the byte.
        if self._calls.qsize() <= _MANY:
            self.write(_WAKE)

    def at(self, seconds: float, function: Callback) -> Timer:
        """Have the thread call this in so many seconds. From any thread."""
        timer = Timer(unpatched.monotonic() + seconds, function)
        if self.is_current:
            self._add(timer)
        else:
            self.call(lambda: self._add(timer))
        return timer

    def watch(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Have the thread call `callback(events)` while there are such `poll` events; again to change them."""
        if fd not in self._watched:
            self._fresh.add(fd)
        self._watched[fd] = callback
        self._poll.register(fd, events)
        if not self.is_current:
            self.write(_WAKE)  # it polls what it knew before

    def unwatch(self, fd: int) -> None:
        """No more of that. Before the descriptor is closed; again does no harm."""
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def close(self) -> None:
        """End the thread, and close our two descriptors. May be called on it, and again; raises nothing."""
        if self._closing:
            return
        self._closing = True
        self.write(_WAKE)
        if not self.is_current:
            self._ended.acquire(timeout=_PATIENCE)
        self.forget()

    def forget(self) -> None:
        """Close our ends; in a forked child the pair itself is the parent's."""
        self._closing = True
        for end, identity in self._ends:
            sockets.close(end, identity)

    # -- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = unpatched.get_ident()
        try:
            while not self._closing:
                self._turn()
        except Exception as error:
            if not self._closing:
                self._closing = True
                try:
                    self._deaf(error)
                except Exception as problem:
                    report_failure("to say that the loop is deaf", problem)
        finally:
            _safely(self.forget)
            self._ended.release()

    def _turn(self) -> None:
        news = self._poll.poll(self._wait())
        self._fresh.clear()
        for fd, events in news:
            if fd == self._ends_fd:
                self._read()
            elif (
                fd in self._watched and fd not in self._fresh
            ):  # else the news are of another file of this number
                self._call_back(fd, events)
        for _ in range(self._calls.qsize()):
            _safely(self._calls.get())
        now = unpatched.monotonic()
        while self._timers and self._timers[0][0] <= now:
            function = heapq.heappop(self._timers)[2].function
            if function is not None:
                _safely(function)

    @property
    def _ends_fd(self) -> int:
        return int(self._receiver.fileno())

    def _wait(self) -> Optional[float]:
        if self._calls.qsize():
            return 0
        return max(0.0, self._timers[0][0] - unpatched.monotonic()) * 1000 + 1 if self._timers else None

    def _read(self) -> None:
        # Looked at each time: where the program has closed our descriptors, its next file has the same numbers.
        if not all(_is(end, identity) for end, identity in self._ends):
            raise OSError("the program has closed the descriptors of the agent")
        try:
            data, ancillary, _, _ = self._receiver.recvmsg(256, self._space)
        except BlockingIOError:
            return
        if not data:
            raise OSError("the wake-up fd is closed")
        # A child that was forked or vforked a moment ago still writes here (os.register_at_fork comes too late
        # for it, and never for subprocess): SO_PASSCRED tells who wrote.
        if any(credentials[:4] != self._from_this_process for _, _, credentials in ancillary):
            return
        signals = data.replace(bytes((_WAKE,)), b"")
        if signals:
            _safely(lambda: self._hear(signals))

    def _call_back(self, fd: int, events: int) -> None:
        try:
            self._watched[fd](events)
        except BaseException as error:
            self.unwatch(fd)  # or it would be called again, and for ever
            report_failure("a callback of the loop", error)

    def _add(self, timer: Timer) -> None:
        heapq.heappush(self._timers, (timer.due, next(self._count), timer))

    def _daily(self) -> None:
        self.at(DAY, self._daily)
        self._quiet()


def _safely(function: Callback) -> None:
    try:
        function()
    except BaseException as error:
        report_failure("a callback of the loop", error)


def _is(end: object, identity: tuple[int, int]) -> bool:
    try:
        return sockets.identity(end.fileno()) == identity  # type: ignore[attr-defined]
    except OSError:
        return False
