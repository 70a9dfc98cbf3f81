"""Decides on the main thread what a signal does: whose handler runs and when, and where the thread stops."""

from __future__ import annotations

from types import FrameType
from typing import Callable, Optional

from autoteardown import thread_stacks
from autoteardown.rank.eviction_owner import EvictionOwner
from autoteardown.rank.repeated_signals import RepeatedSignals
from autoteardown.rank.state import RankState
from autoteardown.unpatched import get_ident

_PLAN_WAIT = 2.0  # seconds that the main thread waits, in the signal handler, to know whether it runs on


class MainThread:
    """The main thread of one armed rank."""

    def __init__(self, armed: RankState, owner: EvictionOwner, repeats: RepeatedSignals) -> None:
        self._armed, self._owner, self._repeats = armed, owner, repeats
        self._waits = False
        self.over = False  # it has nothing left to run but the agent's own atexit callback
        self.handed = False  # the application's handler has been called for this eviction

    def deliver(self, signum: int) -> None:
        """Call the application's handler, as if the signal had come now."""
        if not self.handed:
            self.handed = True
            self._armed.listener.deliver(signum)

    def delivery(self) -> Optional[Callable[[], object]]:
        """A function that calls the application's handler, unless it has been called."""
        signum = self._armed.signum or self._armed.settings.signals[0]
        return None if self.handed else lambda: self.deliver(signum)

    def on_signal(self, signum: int, frame: Optional[FrameType] = None) -> bool:
        """The Python-level handler of an eviction signal, on the main thread. Returns whether the agent handles it."""
        armed = self._armed
        teardown, handed = armed.teardown, self.handed
        ends = False
        first = self._repeats.none_handled
        if self._repeats.handled(frame):
            self.stop()
            return True
        if first and handed and armed.signum is not None and self._not_over():
            return True  # the driver was faster than Python's handler: the delivery was for this signal
        if not (teardown is not None and teardown.committed and self.handed) and self._owner.application_owns(
            signum
        ):
            owns = armed.interceptor.application_owns(signum)
            # Delivered before the signal came, on a peer's notice; the program may have left the group since.
            together = self._owner.is_deferred(signum) or handed
            if together and first and (owns or not self.handed):
                if self.handed and teardown is not None:
                    teardown.also_signalled(signum, sure=True)
                return True
            if self._not_over():
                # A second signal, or no peers to wait for: it goes to the application at once.
                if owns:
                    if self.handed and not handed:
                        return True  # delivered meanwhile, on top of this frame: for this signal
                    if self.handed and teardown is not None:
                        teardown.also_signalled(signum, sure=True)
                    self.handed = True
                    return False
                # The application has put the default action back and raised the signal again, as uvicorn does after its
                # shutdown. Without the agent it would be dead now.
                ends = True
                armed.events.put(("released", None))
        if not self._waits:  # many signals: each handler runs on top of the last
            self._waits = True
            # Some C code (`re`, big integers) runs signal handlers but never releases the GIL: this may be the only
            # chance of the other threads. The training thread is not needed until the last iteration is known.
            armed.gate.wait_for_plan(armed.settings.hard if ends else _PLAN_WAIT, ends)
            self._waits = False
        self.stop()
        return True

    def _not_over(self) -> bool:
        teardown = self._armed.teardown
        return teardown is None or not teardown.committed or (not self.handed and not self._armed.gate.closed)

    def stop(self) -> None:
        """Park this thread if it must stop, or have it exit if it must exit."""
        armed, gate, ident = self._armed, self._armed.gate, get_ident()
        if self.over:
            return
        # The thread waits below this frame, and checks by itself. What is raised here would not come out of that wait.
        if ident in gate.waits.inside or ident in gate.held:
            return
        if ident in gate.parking:
            # The loop of gevent or eventlet is a greenlet of its own, and does not see another's exception.
            sees = not thread_stacks.in_greenlet()
            if sees and gate.parking.left(ident) and not gate.parking.on_way_out():
                gate.parking.swallowed()
            return
        # The built-in function that the replacement stands for runs no handler in its midst, so its caller does not
        # expect one to raise: uvloop leaves its loop through it. So this is tried again, as often as necessary.
        loop = armed.listener.loop
        if loop is not None and loop.running and thread_stacks.in_signal_replacement():
            loop.call(lambda: armed.listener.run_on_main_thread(self.stop))
            return
        # An exception in an exit callback would be printed, and cut the callback short. The agent's is the last, and
        # waits.
        if ident != gate.thread and thread_stacks.in_exit_callback():
            return
        if armed.teardown is not None and armed.teardown.leaving:
            gate.parking.leave()
        if gate.closed and not gate.shielded(ident):
            gate.park()
