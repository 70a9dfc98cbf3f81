"""Where threads of the program are stopped for good, and the SystemExit with which they leave from there.

Everything here runs on those threads, at any of their bytecodes. So: no lock that another thread may hold while it is
frozen, and nothing raised but that SystemExit.
"""

from __future__ import annotations

import sys
from typing import Any, Callable

from autoteardown import thread_stacks
from autoteardown.unpatched import allocate_lock, get_ident

_LOOK = 0.1  # seconds between two looks of a waiting thread at what it waits for, in case nobody wakes it

_PARKED, _LEAVING = "parked", "leaving"


class ThreadWaits:
    """Threads of the program that wait for the agent."""

    def __init__(self) -> None:
        self.inside: set[int] = set()  # below a handler that comes now; they look for themselves
        self._locks: dict[int, Any] = {}

    def wait(self, ident: int) -> None:
        """Until somebody wakes this thread, or for a moment. Raises nothing."""
        self.inside.add(ident)
        try:
            lock = self._locks.get(ident)
            if lock is None:
                lock = allocate_lock()
                lock.acquire()
                self._locks[ident] = lock
            lock.acquire(timeout=_LOOK)
        except BaseException:
            # Out of another signal's handler, on top of this frame: DataLoader's for SIGCHLD raises when a worker is
            # killed. The program must not go on because of it.
            pass
        finally:
            self.inside.discard(ident)

    def wake(self) -> None:
        """Have all of them look."""
        for lock in list(self._locks.values()):
            try:
                lock.release()
            except RuntimeError:  # nobody has waited since the last time
                pass


class Parking:
    """The threads of one armed process that are stopped, and the way out.

    Args:
        waits: how they wait.
        tell: called with an event and its value; must be safe at any bytecode (`SimpleQueue.put` is).
    """

    def __init__(self, waits: ThreadWaits, tell: Callable[[tuple[str, Any]], None]) -> None:
        self._waits, self._tell = waits, tell
        self._threads: dict[int, str] = {}  # who is parked here, and who has left from here with SystemExit
        self._exits: list[SystemExit] = []
        self._exit_code = 0
        self._open = False

    @property
    def stopped(self) -> set[int]:
        """The threads that are stopped, or were and are on their way out."""
        return set(self._threads)

    def __contains__(self, ident: object) -> bool:
        return ident in self._threads

    def park(self, counts: Callable[[int], bool]) -> None:
        """Stop this thread until the exit, which it leaves towards with SystemExit.

        Args:
            counts: whether it is news that this thread has parked.
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
        """Parked threads leave with SystemExit."""
        self._exit_code = code
        self._end_here_what_is_swallowed()
        self._open = True
        self._waits.wake()

    def leave(self) -> None:
        """Have this thread leave with SystemExit, once the exit is open."""
        self._threads[get_ident()] = _LEAVING
        way_out = SystemExit(self._exit_code)
        self._exits.append(way_out)
        raise way_out

    def left(self, ident: int) -> bool:
        """Whether that thread has been sent out."""
        return self._threads.get(ident) == _LEAVING

    def swallowed(self) -> None:
        """This thread was sent out, and has come to a stopping place again: it does not get any further."""
        ident = get_ident()
        self._tell(("swallowed", ident))
        while True:
            self._waits.wait(ident)

    def wait_for_exit(self) -> None:
        """Keep this thread, which has nothing left to run, until the exit."""
        ident = get_ident()
        self._threads[ident] = _PARKED
        while not self._open:
            self._waits.wait(ident)
        self._threads[ident] = _LEAVING

    def on_way_out(self) -> bool:
        """Whether this thread runs what a program runs on its way out: `finally`, `except`, exit callbacks."""
        error: Any = sys.exc_info()[1]
        for _ in range(20):
            if error is None:
                break
            if self._is_exit(error):
                return True
            error = error.__context__
        if get_ident() == thread_stacks.main_ident() and not thread_stacks.alive(thread_stacks.main_ident()):
            return True
        # A finalizer that runs while the exception is on its way (a DataLoader's waits for its workers) sees none.
        return thread_stacks.in_finalizer()

    def _is_exit(self, error: object) -> bool:
        return any(error is each for each in self._exits)

    def _end_here_what_is_swallowed(self) -> None:
        """CPython swallows what is raised in `__del__`, weakref callbacks and fork hooks, and tells this hook."""
        others = sys.unraisablehook

        def unraisable(args: Any) -> None:
            if not self._is_exit(args.exc_value):
                others(args)
            elif (
                sys._getframe().f_back is not None
            ):  # else it has ended a thread of a C++ runtime, as it should
                self.swallowed()

        sys.unraisablehook = unraisable
