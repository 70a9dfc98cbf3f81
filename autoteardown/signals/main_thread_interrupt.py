"""Has the main thread call a function during a teardown, also out of a sleep or a lock.

1. It is a Python-level handler on an unused real-time signal: nothing else gets the main thread out of a system call
   that waits.
2. To a healthy program this is an interrupted system call (`signal.pause()` returns), so it is used in a teardown
   only.
3. Handlers can be set on the main thread only, so the handler is set when torch is imported. The kernel's
   disposition stays the default until the process is armed.
"""

from __future__ import annotations

from types import FrameType, ModuleType
from typing import Any, Callable

from autoteardown import unpatched
from autoteardown.fail_open import report_failure
from autoteardown.signals import dispositions


class MainThreadInterrupt:
    """Reserves a real-time signal for the agent.

    Args:
        module: the `signal` module.
        taken: signals that must not be used.
        signal: the original `signal.signal`.
        getsignal: the original `signal.getsignal`.
    """

    def __init__(
        self,
        module: ModuleType,
        taken: frozenset[int],
        signal: Callable[[int, Any], Any],
        getsignal: Callable[[int], Any],
    ) -> None:
        self.number = 0  # the signal's number; 0: none is reserved
        self._default = module.SIG_DFL
        self._pthread_kill: Callable[[int, int], None] = module.pthread_kill
        last = getattr(module, "SIGRTMAX", 0)
        self._candidates = [n for n in range(last - 3, last - 12, -1) if n not in taken] if last else []
        self._signal, self._getsignal = signal, getsignal
        self._handler = self._answer  # one object, compared by identity
        self.python = 0  # the address of the interpreter's own handler
        self._connected = False
        self._errands: list[Callable[[], object]] = []

    def reserve(self) -> None:
        """On the main thread: take a signal that has no handler, without changing the kernel's disposition."""
        while self._candidates and not self.number:
            signum = self._candidates.pop(0)
            default = dispositions.handler_of(signum) == dispositions.DEFAULT
            if default and self._getsignal(signum) == self._default:
                self._signal(signum, self._handler)
                self.python = dispositions.handler_of(signum)
                self.number = signum
                self._connect()

    def connect(self, connected: bool) -> None:
        """Set the kernel's disposition of the signal: the interpreter's handler, or the default. Any thread."""
        # The flag is true only while the handler is in force: another thread may send the signal at any moment.
        if not connected:
            self._connected = False
        if self.number:
            dispositions.set_handler(self.number, self.python if connected else dispositions.DEFAULT)
        self._connected = connected

    def _connect(self) -> None:
        if self.number:
            dispositions.set_handler(self.number, self.python if self._connected else dispositions.DEFAULT)

    def is_handler(self, handler: object) -> bool:
        """Whether this handler, found in force, is the agent's."""
        return handler is self._handler

    def set_handler(self, handler: Any) -> Any:
        """Do what `signal.signal` does for the reserved signal; returns what it returns without the agent."""
        # Lightning saves and restores the handlers of all signals, and finds the default here. If it restored the real
        # default, the interrupt would end the process. If the application wants this signal for itself, the agent
        # reserves another.
        default = handler == self._default
        old = self._signal(self.number, self._handler if default else handler)
        if not default:
            self.number = 0
            self.reserve()
        self._connect()
        return self._default if self.is_handler(old) else old

    def run_on_main_thread(self, errand: Callable[[], object]) -> bool:
        """Have the main thread call `function` soon: before its next bytecode, or out of a sleep or a lock.

        Returns:
            False if that is not possible. True does not mean that the main thread ever leaves the C code that it is
            in.
        """
        if not self.number or not self._connected:
            return dispositions.call_on_main(errand)
        self._errands.append(errand)
        self._pthread_kill(unpatched.main_ident(), self.number)
        return True

    def forget(self) -> None:
        """In a forked child: drop the functions that wait for the parent's main thread."""
        self._errands.clear()

    def _answer(self, signum: int, frame: FrameType | None) -> None:
        while self._errands:
            errand = self._errands.pop(0)
            try:
                errand()
            except Exception as error:  # but not SystemExit, with which the main thread exits
                report_failure("errand", error)
