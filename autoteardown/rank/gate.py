"""Where the program's own threads stop: after an optimizer step, in our signal handler, or when a save is over.

Everything here runs on threads of the program, on its hot path or at any of its bytecodes. So: no lock that another
thread may hold while it is frozen, and nothing raised but the SystemExit that ends a parked thread.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
import threading
from collections import deque
from time import monotonic
from typing import Any, Callable, Optional

from autoteardown.boundary import failed, guarded
from autoteardown.rank import threads

_NOW = -1


class Gate:
    """The training side of one armed process.

    The hold flag and the step count make the agreement on a last step safe without a lock: the step hook counts
    first and looks at the flag afterwards; the guard raises the flag first and reads the count afterwards. A step that
    the guard did not count therefore finds the flag up and waits until the last step is known.

    Args:
        tell: called with an event and its value; must be safe at any bytecode (`SimpleQueue.put` is).
    """

    def __init__(self, tell: Callable[[tuple[str, Any]], None]) -> None:
        self.count = 0
        self.times: deque[float] = deque(maxlen=9)
        self.thread: Optional[int] = None  # the thread that steps; else the one that called init
        self.holding = False
        self.closed = False
        self.parked: set[int] = set()
        self.exit_code = 0
        self._tell = tell
        self._last: Optional[int] = None
        self._known = _thread.allocate_lock()
        self._known.acquire()
        self._exit = _thread.allocate_lock()
        self._exit.acquire()
        self._saves: dict[int, int] = {}
        self._background = 0
        self.loop: Any = None  # the event loop of that thread

    def begin(self, thread: int) -> None:
        """A new world: every rank of it counts from nought."""
        self.thread = thread
        self.loop = _running_loop()
        self.count = 0
        self.times.clear()

    # -- asked by the guard -------------------------------------------------------------------------------------

    @property
    def saving(self) -> bool:
        """Whether some thread is in a save or in a `protect()` block."""
        return bool(self._saves) or self._background > 0

    def shielded(self, ident: int) -> bool:
        """Whether that thread is."""
        return ident in self._saves

    def step_time(self) -> Optional[float]:
        """Median seconds between the last few steps; None before there were two."""
        times = list(self.times)
        gaps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
        return gaps[len(gaps) // 2] if gaps else None

    def let_run_to(self, step: int) -> None:
        """The last step is known: threads that wait in the hook go on, up to it."""
        if self._last is None:
            self._last = step
            self._known.release()

    def close(self) -> None:
        """Whoever comes to a stopping place from now on is parked there."""
        self.closed = True
        self.let_run_to(_NOW)

    def open_exit(self, code: int) -> None:
        """Parked threads leave with SystemExit."""
        self.exit_code = code
        self._exit.release()

    def wake_loop(self) -> None:
        """An event loop with nothing to do waits in C (Ray's async actors do): have it come to a bytecode."""
        try:
            self.loop.call_soon_threadsafe(_nothing)
        except (AttributeError, RuntimeError):  # none, or closed
            pass

    def steps(self, patience: float) -> tuple[Optional[int], bool]:
        """How many steps are completed (None if this rank does not step), and whether there is no hope of another.

        Args:
            patience: seconds that the group will wait for one.
        """
        self._find_thread()
        count = self.count
        if not count:
            return None, False
        step = self.step_time() or 0.0
        idle = monotonic() - self.times[-1]
        blocked = idle > max(patience, 5 * step) and not self.saving
        return count, step > patience or blocked or not threads.alive(self.thread)

    def to_park(self) -> list[int]:
        """The threads that train, or may: those that nobody has parked yet."""
        self._find_thread()
        # Nobody waits for the threads of a pool that come after the training thread's end, but they keep a Ray actor
        # from its exit.
        candidates = [self.thread] if threads.alive(self.thread) else threads.foreign()
        return [
            ident
            for ident in candidates
            if ident is not None and ident not in self.parked and not self.shielded(ident)
        ]

    def _find_thread(self) -> None:
        # The threads of a pool take turns (Ray's threaded actors), and init may be called on one, the training
        # function on another (Ray Train): without a step to tell, the one that waits in a collective is it.
        if not self.count or not threads.alive(self.thread):
            waiting = threads.in_collective()
            if waiting and self.thread not in waiting:
                self.thread = waiting[0]

    # -- on the program's threads -----------------------------------------------------------------------------------

    def at_step(self) -> None:
        """In the step hook while the hold flag is up."""
        if self.shielded(_thread.get_ident()):
            return
        count = self.count
        _pass(self._known)
        last = self._last
        if self.closed or (last is not None and count >= last):
            self._tell(("stopped", count))
            self.hold()

    def wait_for_plan(self, limit: float) -> None:
        """Wait until it is known whether this thread is to run on, at most `limit` seconds."""
        if self._known.acquire(timeout=limit):
            self._known.release()

    def hold(self) -> None:
        """Park this thread until the exit, which it leaves towards with SystemExit."""
        ident = _thread.get_ident()
        if ident in self.parked:  # a signal handler on top of a parked frame
            return
        self.parked.add(ident)
        self._tell(("parked", ident))
        _pass(self._exit)
        raise SystemExit(self.exit_code)

    def wait_for_exit(self) -> None:
        """Keep this thread, which has nothing left to run, until the exit."""
        self.parked.add(_thread.get_ident())
        _pass(self._exit)

    def enter_save(self) -> None:
        """A save begins on this thread."""
        ident = _thread.get_ident()
        if self.closed and not self.shielded(ident):
            self.hold()
        self._saves[ident] = self._saves.get(ident, 0) + 1

    def leave_save(self) -> None:
        """A save ends on this thread, which stops here if it should have stopped earlier."""
        ident = _thread.get_ident()
        depth = self._saves.get(ident, 0) - 1
        if depth > 0:
            self._saves[ident] = depth
            return
        self._saves.pop(ident, None)
        if self.closed and ident in (self.thread, threading.main_thread().ident):
            self.hold()

    def background_save(self, future: Any) -> None:
        """A save goes on in the background until `future` is done."""
        self._background += 1
        future.add_done_callback(self._background_over)

    def _background_over(self, future: Any) -> None:
        self._background -= 1


def _pass(lock: Any) -> None:
    """Wait for a lock that is taken only to wait, and released for good."""
    while True:
        try:
            with lock:
                return
        except BaseException:
            # Out of another signal's handler, on top of this frame: DataLoader's for SIGCHLD raises when a worker is
            # killed. The program must not go on because of it.
            continue


gate = Gate(lambda event: None)
"""The process's gate; replaced when the process is armed, and in a forked child."""


def renew(tell: Callable[[tuple[str, Any]], None] = lambda event: None) -> Gate:
    """Start again with a gate that has seen nothing."""
    global gate
    gate = Gate(tell)
    return gate


def step_hook(optimizer: object, args: object, kwargs: object) -> None:
    """`torch.optim.optimizer.register_optimizer_step_post_hook`: global, after every optimizer's step."""
    try:
        g = gate
        g.thread = _thread.get_ident()
        g.times.append(monotonic())
        g.count += 1
        if g.holding:
            g.at_step()
    except Exception as error:
        failed("step hook", error)


# As `torch.compiler.disable` would, which would import the compiler: a compiled step calls the hook, untraced.
step_hook._torchdynamo_disable = True  # type: ignore[attr-defined]


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio.get_running_loop() if asyncio is not None else None
    except (AttributeError, RuntimeError):  # still being imported, or no loop on this thread
        return None


def _nothing() -> None:
    pass


def park_thread(ident: int) -> None:
    """Have a thread that is not the main one park at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Parking))


class Parking(BaseException):
    """Raised into a thread that is not the main one (PyThreadState_SetAsyncExc): parks it where it is.

    A signal handler can only run on the main thread. An asynchronous exception reaches any thread, and Python makes
    the instance on that thread before any handler of the program's sees it: so the constructor is where it parks.
    """

    def __init__(self) -> None:
        super().__init__()
        gate.hold()


os.register_at_fork(after_in_child=guarded(renew))
