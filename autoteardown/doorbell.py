"""The doorbell: how another thread has the main thread run something, out of a sleep or a lock.

A Python-level handler on one real-time signal that nobody uses, put there while `signal` is imported. Handlers and the
wake-up fd can only be set on the main thread, and most Ray actors and every training function of Ray Train call init
on another; and a main thread that waits for the end of its training thread has to be told that it is time to leave.
"""

import _thread

TYPE_CHECKING = False  # imported by every process that imports `signal`: see signals.py
if TYPE_CHECKING:
    from types import FrameType, ModuleType
    from typing import Any, Callable

_PATIENCE = 1.0  # seconds for the main thread to do an errand that somebody waits for


class Doorbell:
    """Made before the functions of `module`, which is `signal`, are replaced."""

    def __init__(self, module: "ModuleType", failed: "Callable[[str, BaseException], None]") -> None:
        self.number = 0  # of the signal; 0 as long as there is none
        self._module = module
        self._signal: Callable[[int, Any], Any] = module.signal
        self._getsignal: Callable[[int], Any] = module.getsignal
        self._default = module.SIG_DFL
        self._failed = failed
        self._handler = self._answer  # one object, to be compared by identity
        self._errands: list[Callable[[], object]] = []

    def hang(self, taken: "frozenset[int]") -> None:
        """Take a real-time signal that has no handler and is not among those `taken`."""
        last = getattr(self._module, "SIGRTMAX", 0)
        for signum in range(last - 3, last - 12, -1) if last else ():
            if signum not in taken and self._getsignal(signum) == self._default:
                try:
                    self._signal(signum, self._handler)
                except ValueError:  # `signal` was first imported on another thread
                    return
                self.number = signum
                return

    def is_handler(self, handler: object) -> bool:
        """Whether this handler, found in force, is ours."""
        return handler is self._handler

    def set_handler(self, handler: "Any") -> "Any":
        """What `signal.signal` does with our signal; returns what it would return without us."""
        # Lightning saves and restores the handlers of all signals: the default that it found here is ours. Without it,
        # to ring would end the process. Where somebody wants the signal for himself, it is not ours any more.
        default = handler == self._default
        old = self._signal(self.number, self._handler if default else handler)
        self.number = self.number if default else 0
        return self._default if self.is_handler(old) else old

    def ask(self, errand: "Callable[[], object]") -> bool:
        """Have the main thread call `errand` soon: at its next bytecode, or out of a sleep or a lock.

        Returns:
            False if it cannot be asked. Whether it ever comes out of the C code that it is in is another matter.
        """
        import threading

        main = threading.main_thread().ident
        if not self.number or main is None:
            return False
        self._errands.append(errand)
        self._module.pthread_kill(main, self.number)
        return True

    def settle(self, errand: "Callable[[], object]") -> None:
        """Call `errand`, which only the main thread can; from another, wait for that a little."""
        try:
            errand()
        except ValueError:
            done = _thread.allocate_lock()
            done.acquire()

            def run() -> None:
                try:
                    errand()
                except (OSError, ValueError):  # on a thread of the program's, ours to keep quiet about
                    pass
                done.release()

            if self.ask(run):
                done.acquire(timeout=_PATIENCE)

    def forget(self) -> None:
        """In a forked child: nobody waits for the parent's errands."""
        self._errands.clear()

    def _answer(self, signum: int, frame: "FrameType | None") -> None:
        while self._errands:
            errand = self._errands.pop(0)
            try:
                errand()
            except Exception as error:  # not the SystemExit with which the main thread leaves
                self._failed("errand", error)
