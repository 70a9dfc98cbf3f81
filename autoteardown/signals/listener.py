"""What an armed process has behind the signal tap: its loop thread, the slots that it has taken, what a fork undoes.

The tap's stand-ins ask it; nothing of it is loaded in a process that imports no torch.
"""

from __future__ import annotations

import _thread
import sys
from typing import Any, Callable, Optional, Protocol

from autoteardown.event_loop.loop import Loop
from autoteardown.fail_open import fail_open, report_failure
from autoteardown.signals import replacements
from autoteardown.signals.fork import ForkHooks
from autoteardown.signals.ownership import SignalOwnership

OWN = 0x80
"""Marks a byte of the trampoline's; signal numbers end at 64."""


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
    """Of one process; it comes and goes with each `arm` and `disarm`.

    Args:
        tap: whose it is.
        slots: what it takes when it is armed.
    """

    def __init__(self, application: ApplicationSignals, ownership: SignalOwnership) -> None:
        self._application = application
        self.ownership = ownership
        self._loop: Optional[Loop] = None
        self._forks: Optional[ForkHooks] = None
        self._on_signal: Callable[[int], object] = lambda signum: None
        self.on_main_thread: Callable[[int], bool] = lambda signum: False
        """What the trampoline asks: see `arm`."""

    @property
    def loop(self) -> Optional[Loop]:
        """The thread that reads the wake-up fd, and whatever else the rank has to read.

        None if it is only in the parent that forked this process.
        """
        loop = self._loop
        return loop if loop is not None and loop.here else None

    @property
    def armed(self) -> bool:
        """Whether a thread listens in this process."""
        return self.loop is not None

    @property
    def main_thread_pending(self) -> bool:
        """Whether the main thread has yet to come by for what only it can do: a signal may find the default action."""
        return not self.ownership.ready

    # -- arming ------------------------------------------------------------------------------------------------------

    def arm(
        self,
        on_signal: Callable[[int], object],
        run_on_main_thread: Callable[[int], bool],
        on_quiet: Callable[[], object],
    ) -> None:
        """Listen from now on. May be called on any thread.

        Args:
            on_signal: called on the loop thread with the number of each eviction signal; must not raise. Returns
                whether the application is to hear of it later, through `deliver`.
            on_main: called on the main thread, at a bytecode boundary; True if the agent deals with the signal.
            on_quiet: called on the loop thread after each day without a signal.

        Raises:
            OSError, RuntimeError: no socket pair or no thread to be had; nothing has been changed then.
        """
        self._on_signal, self.on_main_thread = on_signal, run_on_main_thread
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
        """Any thread, a few system calls: take back what C code has taken from an armed process.

        Returns:
            The signals that it would not have heard.
        """
        return self.ownership.reclaim() if self.armed else []

    def disarm(self) -> None:
        """Give handlers and wake-up fd back and end the thread. May be called on any thread."""
        if self.armed:
            self._loop = None
            self._guard_interrupt_main(False)
            self.ownership.give_back(self._application.warn)

    def _after_fork_in_child(self) -> None:
        """Children are not ranks: the child gets back what it would have had without us (F10)."""
        loop, self._loop = self._loop, None
        self.ownership.forget()
        if loop is not None:
            self._guard_interrupt_main(False)
            loop.forget()
            self.ownership.give_back(self._application.warn)

    def _guard_interrupt_main(self, armed: bool) -> None:
        real = getattr(_thread.interrupt_main, "_original", _thread.interrupt_main)
        _thread.interrupt_main = replacements.interrupt_main(self._application, real) if armed else real

    # -- a signal ----------------------------------------------------------------------------------------------------

    def _hear(self, data: bytes) -> None:
        """On the loop thread."""
        application, ownership = self._application, self.ownership
        signums = bytes(byte for byte in data if not byte & OWN and byte != ownership.interrupt.number)
        deferred = set()
        for signum in {byte & ~OWN for byte in data} & application.signals if self.armed else ():
            if self._on_signal(signum):
                deferred.add(signum)
            elif application.application_owns(signum):
                ownership.chain(signum)
        ownership.forward(bytes(signum for signum in signums if signum not in deferred), application.warn)

    def _deaf(self, error: Exception) -> None:
        """On the loop thread: it must not keep what event loops wait for."""
        report_failure("listener", error)
        self.disarm()

    def on_python_handler(self, signum: int) -> bool:
        """In the trampoline: whether the agent deals with the signal.

        An event loop may have had the wake-up fd when the signal came: the loop thread hears of it, by a byte that is
        not passed on.
        """
        loop = self.loop
        if loop is None:
            return False
        loop.write(signum | OWN)
        return self.on_main_thread(signum)

    def deliver(self, signum: int) -> None:
        """On the main thread: have the application handle the signal as if it had come now."""
        application, ownership = self._application, self.ownership
        forwarded = ownership.forward(bytes([signum]), application.warn)
        ownership.chain(signum)
        handler = application.handler_of(signum)
        # To uvloop it would be a second signal: it may be reading its wake-up fd just now, beneath this frame.
        if callable(handler) and not (forwarded and _is_uvloops(handler)):
            handler(signum, sys._getframe(1))

    def run_on_main_thread(self, errand: Callable[[], object]) -> bool:
        """In a teardown: have the main thread call `errand` soon, out of a sleep or a lock if need be.

        Returns:
            False if it cannot be asked (see `Doorbell.ask`).
        """
        if not self.ownership.interrupt.run_on_main_thread(errand):
            return False
        self.ownership.wake_loop()
        return True


def _is_uvloops(handler: Any) -> bool:
    return type(getattr(handler, "__self__", None)).__module__.startswith("uvloop")
