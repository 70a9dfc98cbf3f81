"""The signal tap: how an eviction is noticed whatever the main thread is doing, and whose handler runs.

CPython's C-level handler writes the signal's number to the wake-up fd the moment the signal arrives; the Python-level
handler only runs when the main thread next executes bytecode, which a rank blocked in a collective never does. So a
listener thread on the wake-up fd is what knows of an eviction.

Rejected: `signalfd` and `sigwait` need the signal masked in every thread, those started before us included; a C
extension would need a wheel for each platform.

Handler and wake-up fd are single slots that others write too (asyncio, uvloop, trio, Ray, Lightning, HF Trainer, ...),
so `install` puts thin stand-ins over `signal.signal`, `signal.getsignal` and `signal.set_wakeup_fd`. Through them the
application sees exactly what it would see without us, while underneath

- the Python-level handler of an eviction signal is one trampoline that asks, when it runs, whose turn it is;
- the wake-up fd of an armed process stays ours, and every byte is handed on to the fd of the event loop.

A process that is not armed keeps its real default action, handlers and wake-up fd: there, the stand-ins only remember.
Every process of the image that imports `signal` imports this: no module more than it needs, `typing` and `__future__`
included.
"""

import os

from autoteardown import unpatched
from autoteardown.signals import replacements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, ModuleType
    from typing import Any, Callable

    Handler = Any
    Listener = Any  # rank.listening.Listening: what an armed process has is no business of those that are not

# Handlers that do nothing but raise SystemExit: there is no work of the application's to wait for.
# Ray's, in workers (`Worker.main_loop`) and drivers (`ray.init`); in a driver, abseil's in C beneath it belongs to it.
_EXIT_ONLY = frozenset({("ray._private.worker", "sigterm_handler")})
_MISSING = object()

interceptor: "SignalInterceptor | None" = None
"""The process's tap, once `install` has run."""


def install(module: "ModuleType") -> "SignalInterceptor":
    """Put the stand-ins into the `signal` module, for the signals of `AUTOTEARDOWN_SIGNALS`. Idempotent."""
    global interceptor
    if interceptor is None:
        signals: tuple[int, ...] = (module.SIGTERM,)
        if os.environ.get("AUTOTEARDOWN_SIGNALS"):  # else not worth the import
            from autoteardown import settings

            signals = settings.load(os.environ)[0].signals
        found = SignalInterceptor(module, signals)
        replacements.put(found, module)
        interceptor = found  # not without its stand-ins: the trampoline would be seen
    return interceptor


class SignalInterceptor:
    """The state behind the stand-ins; one for each process."""

    def __init__(self, module: "ModuleType", signals: "tuple[int, ...]") -> None:
        self.signals = frozenset(signals)
        self.originals: tuple[Callable[..., Any], ...] = (
            module.signal,
            module.getsignal,
            module.set_wakeup_fd,
        )
        self._module = module
        self._signal, self._getsignal, _ = self.originals
        self._default = module.SIG_DFL
        # What the application believes to be in force, for the signals whose real handler is the trampoline.
        self._handlers: dict[int, Handler] = {}
        self._trampoline = self._on_main_thread  # one object, to be compared by identity
        self.warn = True
        """The application's `warn_on_full_buffer`."""
        self.report_failure = _failed
        self._listener: Listener | None = None  # as long as torch is not imported

    @property
    def armed(self) -> bool:
        """Whether a thread listens in this process."""
        return self._listener is not None and self._listener.armed

    # -- behind the stand-ins -----------------------------------------------------------------------------------------

    def seen(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """When all else has failed: nobody gets to see the trampoline."""
        return self._handlers.get(int(signalnum), self._default) if handler is self._trampoline else handler

    def handler_of(self, signalnum: "Any") -> "Handler":
        """What `signal.getsignal` would return without us."""
        handler = self._getsignal(signalnum)
        if handler is self._trampoline:
            return self._handlers.get(int(signalnum), self._default)
        listener = self._listener
        return self._default if listener and listener.ownership.interrupt.is_handler(handler) else handler

    def set_handler(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """What `signal.signal` does; raises what it raises."""
        if self._listener is None and signalnum in self.signals and _is_exit_only(handler):
            # Ray's worker: from here on its main thread is in C++, where it runs handlers but no bytecode. An async
            # actor imports torch on another thread, and what only the main thread can do would never be done (F3).
            self._prepare_early()
        if self._listener is None or not isinstance(signalnum, int) or handler is self._trampoline:
            return self._signal(signalnum, handler)
        ownership = self._listener.ownership
        if signalnum and signalnum == ownership.interrupt.number:
            return ownership.interrupt.set_handler(handler)
        if signalnum not in self.signals:
            return self._signal(signalnum, handler)
        signum, old = int(signalnum), self.handler_of(signalnum)
        # SIG_IGN is obeyed (the kernel drops the signal), and only an armed process needs to hear of a default.
        hears = callable(handler) or (handler == self._default and self.armed)
        before = self._handlers.get(signum, _MISSING)
        if hears:
            self._handlers[signum] = self._default if handler == self._default else handler
        try:
            self._signal(signum, self._trampoline if hears else handler)
        except BaseException:  # not the main thread: the same ValueError as from the original
            if before is not _MISSING:
                self._handlers[signum] = before
            elif hears:
                del self._handlers[signum]
            raise
        try:
            ownership.replaced(signum)
            if not hears:
                self._handlers.pop(signum, None)
                ownership.prepare_one(signum)
        except Exception as error:  # the application's handler is set: that is what it asked for
            _failed("signal.signal", error)
        return old

    def wakeup_fd_set(self, old: int, new: int, warn: bool) -> int:
        """The real `set_wakeup_fd` has checked and done it; returns what it would have returned without us."""
        self.warn = warn
        listener = self._listener
        loop = listener.loop if listener is not None else None
        if listener is None or loop is None:
            return old
        # A signal that comes before the slot is ours again reaches us through the trampoline, on this very thread.
        self.originals[2](loop.fd, warn_on_full_buffer=False)
        old, listener.ownership.app_fd = listener.ownership.app_fd, int(new)
        return old

    def application_owns(self, signum: int) -> bool:
        """Whether the handler in force is the application's and does more than to leave."""
        handler = self.handler_of(signum)
        if _is_exit_only(handler):
            return False
        if self._has_c_handler(signum):
            return True
        return callable(handler) and handler is not self._module.default_int_handler

    def _has_c_handler(self, signum: int) -> bool:
        return self._listener is not None and self._listener.ownership.has_c_handler(signum)

    # -- a signal ----------------------------------------------------------------------------------------------------

    def _on_main_thread(self, signum: int, frame: "FrameType | None") -> object:
        """The trampoline: Python's handler for every eviction signal."""
        try:
            if self._listener is not None and self._listener.on_python_handler(signum):
                return None
        except Exception as error:
            _failed("signal handler", error)
            return None  # the loop thread has the signal as well, and sees to the end
        handler = self._handlers.get(signum, self._default)
        if callable(handler):
            return handler(signum, frame)
        # Not armed, the kernel does not call us: it was `_thread.interrupt_main`, which does nothing by default. Armed,
        # a handler in C has it.
        if not self.armed or self._has_c_handler(signum):
            return None
        self._signal(signum, self._default)
        os.kill(os.getpid(), signum)
        return None

    # -- before it is armed ------------------------------------------------------------------------------------------

    def prepare(self) -> "Listener":
        """As torch is imported: what only the main thread can do for a rank, in case init is called on another.

        Returns:
            What arms this process.
        """
        listener = self._listener
        if listener is None:
            from autoteardown.signals.listener import Listener
            from autoteardown.signals.ownership import SignalOwnership

            ownership = SignalOwnership(
                self._module, self.signals, self._handlers, self._trampoline, self.originals
            )
            listener = self._listener = Listener(self, ownership)
        listener.ownership.prepare()
        return listener

    def _prepare_early(self) -> None:
        try:
            if unpatched.on_main_thread():
                self.prepare()
        except Exception as error:
            _failed("to prepare", error)


def _is_exit_only(handler: "Any") -> bool:
    return (getattr(handler, "__module__", ""), getattr(handler, "__name__", "")) in _EXIT_ONLY


def _failed(what: str, error: BaseException) -> None:
    from autoteardown.fail_open import report_failure

    report_failure(what, error)
