"""Listens for signals in an armed process: starts the loop thread, takes the signals over, and dispatches each.

A signal goes to the agent or to the application. A process that does not import torch does not load this module.
"""

from __future__ import annotations

import _thread
import sys
from types import FrameType
from typing import Any, Callable, Optional, Protocol

from autoteardown.event_loop.loop import Loop
from autoteardown.fail_open import fail_open, report_failure
from autoteardown.signals import replacements
from autoteardown.signals.fork import ForkHooks
from autoteardown.signals.ownership import SignalOwnership

OWN = 0x80
"""Marks a byte that the trampoline has written; signal numbers end at 64."""


class ApplicationSignals(Protocol):
    """What the application has set through the `signal` module; `interception.SignalInterceptor` keeps it."""

    signals: frozenset[int]
    """The signals that mean eviction."""
    warn: bool
    """The application's `warn_on_full_buffer`."""

    def handler_of(self, signalnum: Any) -> Any:
        """The application's handler."""

    def application_owns(self, signum: int) -> bool:
        """Whether that handler does more than exit."""


class Listener:
    """Listens from `arm` to `disarm`; both may be repeated.

    Args:
        application: what the application has set through the `signal` module.
        ownership: takes over handlers and wake-up fd while the process is armed.
    """

    def __init__(self, application: ApplicationSignals, ownership: SignalOwnership) -> None:
        self._application = application
        self.ownership = ownership
        self._loop: Optional[Loop] = None
        self._forks: Optional[ForkHooks] = None
        self._on_signal: Callable[[int, bool], object] = lambda signum, arrived: None
        self.on_main_thread: Callable[[int, Optional[FrameType]], bool] = lambda signum, frame: False
        """Called by the trampoline: see `arm`."""
        self._in_child: Callable[[], object] = lambda: None

    @property
    def loop(self) -> Optional[Loop]:
        """The event loop, whose thread reads the wake-up fd and all other descriptors of the agent.

        None if the process is not armed, or if the thread is only in the parent that forked this process.
        """
        loop = self._loop
        return loop if loop is not None and loop.here else None

    @property
    def armed(self) -> bool:
        """Whether a thread listens in this process."""
        return self.loop is not None

    @property
    def main_thread_pending(self) -> bool:
        """Whether the main thread has not yet done its part: until it has, a signal may have its default action."""
        return not self.ownership.ready

    # -- arming ------------------------------------------------------------------------------------------------------

    def arm(
        self,
        on_signal: Callable[[int, bool], object],
        on_main_thread: Callable[[int, Optional[FrameType]], bool],
        on_quiet: Callable[[], object],
        in_child: Callable[[], object],
    ) -> None:
        """Listen from now on. May be called on any thread.

        Args:
            on_signal: called on the loop thread with the number of each eviction signal, and whether the kernel has
                just delivered it (else the Python-level handler has been called for it); must not raise. Returns
                whether the application does not get the signal now: it gets it later, through `deliver`, or not at all.
            on_main_thread: called on the main thread, between two bytecodes, with the number and the frame that is
                interrupted; returns whether the agent deals with the signal.
            on_quiet: called on the loop thread after each day without a signal.
            in_child: called in each process that this one forks, before a signal can reach it.

        Raises:
            OSError, RuntimeError: no socket pair or no thread is available. Nothing has been changed then.
        """
        self._on_signal, self.on_main_thread, self._in_child = on_signal, on_main_thread, in_child
        if self.armed:
            self.reclaim()
            return

        def quiet() -> None:
            self.reclaim()
            on_quiet()

        if self._forks is None:
            self._forks = ForkHooks(self._application.signals, lambda: self.armed, self._after_fork_in_child)
        self._loop = loop = Loop(self._hear, self._deaf, fail_open(quiet))
        self.ownership.take(loop)
        self._guard_interrupt_main(True)

    def reclaim(self) -> list[int]:
        """Take back the handlers that C code has replaced since. Any thread; costs a few system calls.

        Returns:
            The signals that the agent would not have heard.
        """
        return self.ownership.reclaim() if self.armed else []

    def disarm(self) -> None:
        """Give handlers and wake-up fd back and end the thread. May be called on any thread."""
        if self.armed:
            self._loop = None
            self._guard_interrupt_main(False)
            self.ownership.give_back(self._application.warn)

    def _after_fork_in_child(self) -> None:
        """Children are not ranks: give the child what it would have without the agent."""
        loop, self._loop = self._loop, None
        self.ownership.forget()
        if loop is not None:
            self._guard_interrupt_main(False)
            loop.forget()
            self.ownership.give_back(self._application.warn)
            fail_open(self._in_child)()

    def _guard_interrupt_main(self, armed: bool) -> None:
        real = getattr(_thread.interrupt_main, "_original", _thread.interrupt_main)
        _thread.interrupt_main = replacements.interrupt_main(self._application, real) if armed else real

    # -- a signal ----------------------------------------------------------------------------------------------------

    def _hear(self, data: bytes) -> None:
        """On the loop thread: deal with the signal numbers that were read from the wake-up fd."""
        application, ownership = self._application, self.ownership
        forwarded = bytearray()
        for byte in data:
            signum, arrived = byte & ~OWN, not byte & OWN
            held_back = False
            if self.armed and signum in application.signals:
                held_back = bool(self._on_signal(signum, arrived))
                if not held_back and application.application_owns(signum):
                    ownership.chain(signum)
            # A byte of the trampoline's is about a signal whose own byte, if there was one, has been forwarded.
            if arrived and not held_back and signum != ownership.interrupt.number:
                forwarded.append(signum)
        ownership.forward(bytes(forwarded), application.warn)

    def _deaf(self, error: Exception) -> None:
        """On the loop thread: it cannot go on. Give the wake-up fd back, which event loops wait for."""
        report_failure("listener", error)
        self.disarm()

    def on_python_handler(self, signum: int, frame: Optional[FrameType]) -> bool:
        """Called by the trampoline. Returns whether the agent deals with the signal.

        An event loop may have had the wake-up fd when the signal came. So the loop thread is told with a byte of the
        agent's own, which is not forwarded to the application.
        """
        loop = self.loop
        if loop is None:
            return False
        loop.write(signum | OWN)
        return self.on_main_thread(signum, frame)

    def deliver(self, signum: int) -> None:
        """On the main thread: have the application handle the signal as if it had come now."""
        application, ownership = self._application, self.ownership
        forwarded = ownership.forward(bytes([signum]), application.warn)
        ownership.chain(signum)
        handler = application.handler_of(signum)
        # uvloop would take it for a second signal: it may be reading its wake-up fd just now, below this frame.
        if callable(handler) and not (forwarded and _is_uvloops(handler)):
            handler(signum, sys._getframe(1))

    def run_on_main_thread(self, errand: Callable[[], object]) -> bool:
        """In a teardown: have the main thread call `function` soon, also out of a sleep or a lock.

        Returns:
            False if that is not possible (see `MainThreadInterrupt.run_on_main_thread`).
        """
        if not self.ownership.interrupt.run_on_main_thread(errand):
            return False
        self.ownership.wake_loop()
        return True


def _is_uvloops(handler: Any) -> bool:
    return type(getattr(handler, "__self__", None)).__module__.startswith("uvloop")
