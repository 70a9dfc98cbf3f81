"""An event loop on a thread of its own: reads the signal wake-up fd, polls sockets, and runs calls and timers.

1. An armed rank has one such thread, for its signals and for its connections.
2. Nothing that is called on this thread may block, because the next signal is read only afterwards.
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
_MANY_CALLS = 64
_CLOSE_SECONDS = 0.5  # for the thread, which needs nothing but the GIL, to end

Callback = Callable[[], object]


class Timer:
    """A call that `Loop.at` has scheduled."""

    __slots__ = ("due", "function")

    def __init__(self, due: float, function: Callback) -> None:
        self.due = due
        self.function: Optional[Callback] = function

    def cancel(self) -> None:
        """Cancel the call; from any thread. May be called again."""
        self.function = None


class Loop:
    """A socket pair, one end of which is the wake-up fd, and a thread that polls the other end.

    Args:
        on_signals: called on the thread with signal numbers, one byte each, that this process has written.
        on_failure: called on the thread with the error when it cannot continue, because its descriptors were closed.
        daily: called on the thread once a day.

    Raises:
        OSError, RuntimeError: the system gives no socket pair or no thread.
    """

    def __init__(
        self,
        on_signals: Callable[[bytes], object],
        on_failure: Callable[[Exception], object],
        daily: Callback,
    ) -> None:
        self._on_signals, self._on_failure, self._daily = on_signals, on_failure, daily
        self._pid = os.getpid()
        self._own_credentials = b""  # the first bytes (the pid) of the credentials of a write by this process
        self._space = 0  # for credentials
        self._receiver, self._sender = unpatched.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self.fd: int = self._sender.fileno()
        self._ends = [(end, sockets.identity(end.fileno())) for end in (self._receiver, self._sender)]
        try:
            self._receiver.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
            self._own_credentials = self._pid.to_bytes(4, sys.byteorder)
            self._space = _socket.CMSG_SPACE(_UCRED)
        except (AttributeError, OSError):  # not Linux: only the fork hooks protect the parent
            pass
        self._poll = unpatched.poll()
        self._poll.register(self._receiver.fileno(), select.POLLIN)
        self._watched: dict[int, Callable[[int], object]] = {}
        self._fresh: set[int] = set()  # watched since the poll whose events are being handled
        self._calls: _queue.SimpleQueue[Callback] = _queue.SimpleQueue()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._ident: Optional[int] = None
        self._closing = False
        self._ended = unpatched.allocate_lock()
        self._ended.acquire()
        self._add(Timer(unpatched.monotonic() + DAY, self._each_day))
        try:
            unpatched.start_new_thread(self._run, ())
        except BaseException:
            self.forget()
            raise

    # -- for any thread ---------------------------------------------------------------------------------------------

    @property
    def here(self) -> bool:
        """Whether the thread is in this process, and not in the parent that forked it."""
        return self._pid == os.getpid()

    @property
    def running(self) -> bool:
        """Whether the thread will still run calls and timers."""
        return self.here and not self._closing

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return self._ident == unpatched.get_ident()

    def write(self, byte: int) -> None:
        """Write one byte to the wake-up fd, as the C-level signal handler does; never waits."""
        try:
            self._sender.send(bytes((byte,)))
        except OSError:  # the buffer is full, so the thread will wake up; or the descriptor is closed
            pass

    def call(self, function: Callback) -> None:
        """Have the thread call the function soon, in the order of these calls. From any thread, at any bytecode."""
        self._calls.put(function)
        # When many calls wait, earlier ones have written a byte already, and the buffer must keep room for signals. A
        # flag "a byte has been written" would not do: a thread may be frozen for good between the flag and the byte.
        if self._calls.qsize() <= _MANY_CALLS:
            self.write(_WAKE)

    def at(self, seconds: float, function: Callback) -> Timer:
        """Have the thread call the function after so many seconds. From any thread."""
        timer = Timer(unpatched.monotonic() + seconds, function)
        if self.is_current:
            self._add(timer)
        else:
            self.call(lambda: self._add(timer))
        return timer

    def watch(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Have the thread call `callback(events)` while the descriptor has such `poll` events.

        Call this again to change the events or the callback.
        """
        if fd not in self._watched:
            self._fresh.add(fd)
        self._watched[fd] = callback
        self._poll.register(fd, events)
        if not self.is_current:
            self.write(_WAKE)  # else the thread goes on polling without this descriptor

    def unwatch(self, fd: int) -> None:
        """Stop watching a descriptor. Call this before closing it. May be called again."""
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def close(self) -> None:
        """End the thread and close the socket pair. May be called on the thread, and again; raises nothing."""
        if self._closing:
            return
        self._closing = True
        self.write(_WAKE)
        if not self.is_current:
            self._ended.acquire(timeout=_CLOSE_SECONDS)
        self.forget()

    def forget(self) -> None:
        """Close this process's two descriptors; in a forked child, the parent's pair stays open."""
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
                    self._on_failure(error)
                except Exception as problem:
                    report_failure("to handle the failure of the loop", problem)
        finally:
            _safely(self.forget)
            self._ended.release()

    def _turn(self) -> None:
        ready = self._poll.poll(self._wait())
        self._fresh.clear()
        for fd, events in ready:
            if fd == self._receiver.fileno():
                self._read()
            elif (
                fd in self._watched and fd not in self._fresh
            ):  # a fresh one is another file at the same number
                self._call_back(fd, events)
        for _ in range(self._calls.qsize()):
            _safely(self._calls.get())
        now = unpatched.monotonic()
        while self._timers and self._timers[0][0] <= now:
            function = heapq.heappop(self._timers)[2].function
            if function is not None:
                _safely(function)

    def _wait(self) -> Optional[float]:
        if self._calls.qsize():
            return 0
        return max(0.0, self._timers[0][0] - unpatched.monotonic()) * 1000 + 1 if self._timers else None

    def _read(self) -> None:
        # Checked each time: if the program has closed these descriptors, its next file has the same number.
        if not all(_is(end, identity) for end, identity in self._ends):
            raise OSError("the program has closed the descriptors of the agent")
        try:
            data, ancillary, _, _ = self._receiver.recvmsg(256, self._space)
        except BlockingIOError:
            return
        if not data:
            raise OSError("the wake-up fd is closed")
        # A child that was forked or vforked a moment ago still writes its signals here: os.register_at_fork runs too
        # late for it, and never for subprocess. SO_PASSCRED tells which process wrote.
        if any(credentials[:4] != self._own_credentials for _, _, credentials in ancillary):
            return
        signals = data.replace(bytes((_WAKE,)), b"")
        if signals:
            _safely(lambda: self._on_signals(signals))

    def _call_back(self, fd: int, events: int) -> None:
        try:
            self._watched[fd](events)
        except BaseException as error:
            self.unwatch(fd)  # or it would be called again, for ever
            report_failure("a callback of the loop", error)

    def _add(self, timer: Timer) -> None:
        heapq.heappush(self._timers, (timer.due, next(self._count), timer))

    def _each_day(self) -> None:
        self.at(DAY, self._each_day)
        self._daily()


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
