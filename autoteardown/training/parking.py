"""Parks threads of the program, and has them exit with SystemExit.

Everything here runs on those threads, between any two bytecodes. So there is no lock that another, frozen thread may
hold, and nothing is raised but that SystemExit.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any, Callable

from autoteardown import thread_stacks
from autoteardown.unpatched import allocate_lock, get_ident

_LOOK = 0.1  # seconds after which a waiting thread checks again, should nothing wake it

_PARKED, _LEAVING = "parked", "leaving"


class ThreadWaits:
    """Threads of the program that wait for the agent."""

    def __init__(self) -> None:
        # threads that wait now: a handler on top of one must leave the decision to it
        self.inside: set[int] = set()
        self._locks: dict[int, Any] = {}

    def wait(self, ident: int) -> None:
        """Wait until woken, or 0.1 s. Raises nothing."""
        self.inside.add(ident)
        try:
            lock = self._locks.get(ident)
            if lock is None:
                lock = allocate_lock()
                lock.acquire()
                self._locks[ident] = lock
            lock.acquire(timeout=_LOOK)
        except BaseException:
            # Raised by another signal's handler on top of this frame: DataLoader's for SIGCHLD raises when a worker is
            # killed. The program must not go on because of it.
            pass
        finally:
            self.inside.discard(ident)

    def wake(self) -> None:
        """Wake all waiting threads."""
        for lock in list(self._locks.values()):
            try:
                lock.release()
            except RuntimeError:  # no wait since the last release
                pass


class Parking:
    """The parked threads of one armed process.

    Args:
        waits: how threads wait.
        tell: called with an event and its value, between any two bytecodes (`SimpleQueue.put` is safe there).
    """

    def __init__(self, waits: ThreadWaits, tell: Callable[[tuple[str, Any]], None]) -> None:
        self._waits, self._tell = waits, tell
        self._threads: dict[int, str] = {}  # parked, or sent out with SystemExit
        self._exits: list[SystemExit] = []
        self._exit_code = 0
        self._open = False
        self._exit_begun = False

    @property
    def stopped(self) -> set[int]:
        """The threads that are parked, or were and are exiting."""
        return set(self._threads)

    def __contains__(self, ident: object) -> bool:
        return ident in self._threads

    def park(self, counts: Callable[[int], bool]) -> None:
        """Park this thread until the exit; it then raises SystemExit.

        Args:
            counts: whether the `parked` event is sent for this thread.
        """
        ident = get_ident()
        state = self._threads.get(ident)
        if state == _PARKED:  # a signal handler on top of a parked frame
            return
        if state == _LEAVING:
            self.swallowed()
        self._threads[ident] = _PARKED
        if counts(ident):
            self._tell(("parked", ident))
        while not self._open:
            self._waits.wait(ident)
        self.leave()

    def open(self, code: int) -> None:
        """Let the parked threads exit, with this exit code."""
        self._exit_code = code
        self._end_here_what_is_swallowed()
        atexit.register(self._begin_exit)  # the last that is registered is the first that is called
        self._open = True
        self._waits.wake()

    def _begin_exit(self) -> None:
        self._exit_begun = True

    def leave(self) -> None:
        """Have this thread exit with SystemExit, once the exit is open."""
        self._threads[get_ident()] = _LEAVING
        way_out = SystemExit(self._exit_code)
        self._exits.append(way_out)
        raise way_out

    def left(self, ident: int) -> bool:
        """Whether that thread has been sent out with SystemExit."""
        return self._threads.get(ident) == _LEAVING

    def swallowed(self) -> None:
        """The program has caught this thread's SystemExit and reached a stopping point again: stop it for good."""
        ident = get_ident()
        self._tell(("swallowed", ident))
        while True:
            self._waits.wait(ident)

    def wait_for_exit(self) -> None:
        """Keep this thread, which has nothing left to run, until the exit is open."""
        ident = get_ident()
        self._threads[ident] = _PARKED
        while not self._open:
            self._waits.wait(ident)
        self._threads[ident] = _LEAVING

    def on_way_out(self) -> bool:
        """Whether this thread runs code of the program's exit: `finally`, `except`, exit callbacks."""
        error: Any = sys.exc_info()[1]
        for _ in range(20):
            if error is None:
                break
            if self._is_exit(error):
                return True
            error = error.__context__
        main = thread_stacks.main_ident()
        # To a patched `threading` (eventlet), the main thread may be alive until the end.
        if get_ident() == main and (self._exit_begun or not thread_stacks.alive(main)):
            return True
        # A finalizer that runs while the exception propagates (a DataLoader's waits for its workers) sees no exception.
        return thread_stacks.in_finalizer()

    def _is_exit(self, error: object) -> bool:
        return any(error is each for each in self._exits)

    def _end_here_what_is_swallowed(self) -> None:
        """Catch SystemExit that CPython ignores in `__del__`, weakref callbacks and fork hooks: it calls
        `sys.unraisablehook`.
        """
        others = sys.unraisablehook

        def unraisable(args: Any) -> None:
            if not self._is_exit(args.exc_value):
                others(args)
            elif (
                sys._getframe().f_back is not None
            ):  # else it has ended a thread of a C++ runtime, as it should
                self.swallowed()

        sys.unraisablehook = unraisable
