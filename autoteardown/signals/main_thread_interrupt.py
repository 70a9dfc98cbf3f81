"""The doorbell: how a teardown has the main thread run something, out of a sleep or a lock.

A Python-level handler on a real-time signal that nobody uses: the only thing that gets the main thread out of a call
that waits. That is also why it rings in a teardown only: to a healthy program it is an interrupted system call. The
signal is Python's business from the time that torch is imported, for handlers can only be set on the main thread; to
the kernel it is nothing until the process is armed.
"""

from __future__ import annotations

from types import FrameType, ModuleType
from typing import Any, Callable

from autoteardown import unpatched
from autoteardown.fail_open import report_failure
from autoteardown.signals import dispositions


class MainThreadInterrupt:
    """Takes a signal of `module`, which is `signal`, that is not among those `taken`; with the functions given."""

    def __init__(
        self,
        module: ModuleType,
        taken: frozenset[int],
        signal: Callable[[int, Any], Any],
        getsignal: Callable[[int], Any],
    ) -> None:
        self.number = 0  # of the signal; 0 as long as there is none
        self._default = module.SIG_DFL
        self._pthread_kill: Callable[[int, int], None] = module.pthread_kill
        last = getattr(module, "SIGRTMAX", 0)
        self._candidates = [n for n in range(last - 3, last - 12, -1) if n not in taken] if last else []
        self._signal, self._getsignal = signal, getsignal
        self._handler = self._answer  # one object, to be compared by identity
        self.python = 0  # the address of the interpreter's own handler
        self._connected = False
        self._errands: list[Callable[[], object]] = []

    def reserve(self) -> None:
        """On the main thread: take a signal that has no handler, without the kernel knowing."""
        while self._candidates and not self.number:
            signum = self._candidates.pop(0)
            default = dispositions.handler_of(signum) == dispositions.DEFAULT
            if default and self._getsignal(signum) == self._default:
                self._signal(signum, self._handler)
                self.python = dispositions.handler_of(signum)
                self.number = signum
                self._connect()

    def connect(self, connected: bool) -> None:
        """Any thread: whether the signal has a handler; else the kernel's default is in force."""
        self._connected = connected
        self._connect()

    def _connect(self) -> None:
        if self.number:
            dispositions.set_handler(self.number, self.python if self._connected else dispositions.DEFAULT)

    def is_handler(self, handler: object) -> bool:
        """Whether this handler, found in force, is ours."""
        return handler is self._handler

    def set_handler(self, handler: Any) -> Any:
        """What `signal.signal` does with our signal; returns what it would return without us."""
        # Lightning saves and restores the handlers of all signals: the default that it found here is ours. Without it,
        # to ring would end the process. Where somebody wants the signal for himself, we take another.
        default = handler == self._default
        old = self._signal(self.number, self._handler if default else handler)
        if not default:
            self.number = 0
            self.reserve()
        self._connect()
        return self._default if self.is_handler(old) else old

    def run_on_main_thread(self, errand: Callable[[], object]) -> bool:
        """Have the main thread call `errand` soon: at its next bytecode, or out of a sleep or a lock.

        Returns:
            False if it cannot be asked. Whether it ever comes out of the C code that it is in is another matter.
        """
        if not self.number or not self._connected:
            return dispositions.call_on_main(errand)
        self._errands.append(errand)
        self._pthread_kill(unpatched.main_ident(), self.number)
        return True

    def forget(self) -> None:
        """In a forked child: nobody waits for the parent's errands."""
        self._errands.clear()

    def _answer(self, signum: int, frame: FrameType | None) -> None:
        while self._errands:
            errand = self._errands.pop(0)
            try:
                errand()
            except Exception as error:  # not the SystemExit with which the main thread leaves
                report_failure("errand", error)
