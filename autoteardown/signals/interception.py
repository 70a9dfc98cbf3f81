"""Stands between the application and the `signal` module, so that the agent hears of an eviction signal first.

1. CPython's C-level handler writes the signal's number to the wake-up fd the moment the signal arrives. The
   Python-level handler runs only when the main thread next executes bytecode, which a rank blocked in a collective
   never does (pytorch/pytorch#115219). So a thread that reads the wake-up fd is what notices an eviction.
2. Rejected: `signalfd` and `sigwait` need the signal masked in every thread, those started before the agent
   included. A C extension would need a wheel for each platform.
3. There is one handler for each signal and one wake-up fd for a process, and others set them, too: asyncio, uvloop,
   trio, Ray, Lightning, HF Trainer. So `install` replaces `signal.signal`, `signal.getsignal` and
   `signal.set_wakeup_fd` with functions through which the application sees exactly what it would see without the
   agent. Underneath, the Python-level handler of an eviction signal is one trampoline, which decides when it runs
   who handles the signal; and the wake-up fd of an armed process stays the agent's, which forwards every byte to the
   event loop's fd.
4. A process that is not armed keeps its real default action, handlers and wake-up fd: there, the replacements only
   record what the application sets.
5. Every process of the image that imports `signal` imports this module. So it imports no more than it needs,
   `typing` and `__future__` included.
"""

import os

from autoteardown import unpatched
from autoteardown.signals import replacements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, ModuleType
    from typing import Any, Callable

    Handler = Any
    Listener = Any  # signals.listener.Listener: loaded only where torch is imported
    ChildSignals = Any  # children.child_signals.ChildSignals: loaded only in a child of a rank

# Handlers that only raise SystemExit: the application has no work to do in them.
# Ray sets this one in workers (`Worker.main_loop`) and drivers (`ray.init`). In a driver it also stands for abseil's
# C-level handler.
_EXIT_ONLY = frozenset({("ray._private.worker", "sigterm_handler")})
_MISSING = object()

interceptor: "SignalInterceptor | None" = None
"""The interceptor of this process, once `install` has run."""


def install(module: "ModuleType") -> "SignalInterceptor":
    """Replace the functions of the `signal` module, for the signals of `AUTOTEARDOWN_SIGNALS`. Idempotent."""
    global interceptor
    if interceptor is None:
        signals: tuple[int, ...] = (module.SIGTERM,)
        if os.environ.get("AUTOTEARDOWN_SIGNALS"):  # the import of `settings` costs
            from autoteardown import settings

            signals = settings.load(os.environ)[0].signals
        found = SignalInterceptor(module, signals)
        replacements.put(found, module)
        interceptor = found  # set last: before the functions are replaced, the trampoline would be visible
    return interceptor


def go_on_with(found: "SignalInterceptor", module: "ModuleType") -> None:
    """Use the interceptor of an earlier copy of this module, where there was one, for a new copy of `signal`.

    ddtrace can throw modules away after its start-up. Its own SIGTERM handler keeps the copy of `signal` that it has.
    """
    global interceptor
    if interceptor is None:
        replacements.put(found, module)
        interceptor = found


class SignalInterceptor:
    """What the application has set through the `signal` module; one for each process."""

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
        # The application's handlers, for the signals whose real handler is the trampoline.
        self._handlers: dict[int, Handler] = {}
        self._trampoline = self._on_main_thread  # one object, compared by identity
        self.warn = True
        """The application's `warn_on_full_buffer`."""
        self.report_failure = _failed
        self._listener: Listener | None = None  # None until torch is imported
        self.child: ChildSignals | None = None
        """What deals with the signals in a child of an armed rank."""

    @property
    def armed(self) -> bool:
        """Whether the agent listens for signals in this process."""
        return self._listener is not None and self._listener.armed

    # -- behind the stand-ins -----------------------------------------------------------------------------------------

    def seen(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """What the application may see instead of `handler`: never the trampoline. The last resort after an error."""
        return self._handlers.get(int(signalnum), self._default) if handler is self._trampoline else handler

    def handler_of(self, signalnum: "Any") -> "Handler":
        """What `signal.getsignal` returns without the agent."""
        handler = self._getsignal(signalnum)
        if handler is self._trampoline:
            return self._handlers.get(int(signalnum), self._default)
        listener = self._listener
        return self._default if listener and listener.ownership.interrupt.is_handler(handler) else handler

    def set_handler(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """Do what `signal.signal` does, and raise what it raises."""
        if self.child is None or self.armed or signalnum not in self.signals:
            return self._set_handler(signalnum, handler)
        old = self.seen(signalnum, self._set_handler(signalnum, handler))
        self.child.handler_set(int(signalnum))
        return old

    def take_in_child(self, signum: int) -> None:
        """In a child of a rank, on the main thread: have `child` deal with this signal."""
        handler = self._getsignal(signum)
        if handler is not self._trampoline:
            self._handlers[signum] = handler
        self._signal(signum, self._trampoline)

    def _set_handler(self, signalnum: "Any", handler: "Handler") -> "Handler":
        if self._listener is None and signalnum in self.signals and _is_exit_only(handler):
            # In a Ray worker the main thread goes into C++ from here, where it runs handlers but no bytecode. An async
            # actor imports torch on another thread, and what only the main thread can do would never be done.
            self._prepare_early()
        if self._listener is None or not isinstance(signalnum, int) or handler is self._trampoline:
            return self._signal(signalnum, handler)
        ownership = self._listener.ownership
        if signalnum and signalnum == ownership.interrupt.number:
            return ownership.interrupt.set_handler(handler)
        if signalnum not in self.signals:
            return self._signal(signalnum, handler)
        signum, old = int(signalnum), self.handler_of(signalnum)
        # SIG_IGN is obeyed: the kernel drops the signal. A default action concerns only an armed process.
        hears = callable(handler) or (handler == self._default and self.armed)
        before = self._handlers.get(signum, _MISSING)
        if hears:
            self._handlers[signum] = self._default if handler == self._default else handler
        try:
            self._signal(signum, self._trampoline if hears else handler)
        except BaseException:  # not on the main thread: the same ValueError as the original's
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
        except Exception as error:  # the application's handler is set, which is what it asked for
            _failed("signal.signal", error)
        return old

    def wakeup_fd_set(self, old: int, new: int, warn: bool) -> int:
        """Take the wake-up fd back after the application has set one.

        Args:
            old: what the real `set_wakeup_fd` has returned.
            new: the application's fd.
            warn: its `warn_on_full_buffer`.

        Returns:
            What `set_wakeup_fd` returns without the agent.
        """
        self.warn = warn
        listener = self._listener
        loop = listener.loop if listener is not None else None
        if listener is None or loop is None:
            return old
        # A signal that comes before the fd is the agent's again reaches the agent through the trampoline, on this
        # thread.
        self.originals[2](loop.fd, warn_on_full_buffer=False)
        old, listener.ownership.app_fd = listener.ownership.app_fd, int(new)
        return old

    def application_owns(self, signum: int) -> bool:
        """Whether the handler in force is the application's and does more than exit."""
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
        """The trampoline: the Python-level handler of every eviction signal."""
        try:
            if self._listener is not None and self._listener.on_python_handler(signum, frame):
                return None
        except Exception as error:
            _failed("signal handler", error)
            return None  # the loop thread has read the signal from the wake-up fd, and ends the process
        if self.child is not None and not self.armed and self.child.handles(signum):
            return self.child.on_signal(signum)
        handler = self._handlers.get(signum, self._default)
        if callable(handler):
            return handler(signum, frame)
        # The kernel calls this handler only while the process is armed. Otherwise the call came from
        # `_thread.interrupt_main`, which does nothing under the default action. While armed, a handler in C deals with
        # the signal.
        if not self.armed or self._has_c_handler(signum):
            return None
        self._signal(signum, self._default)
        os.kill(os.getpid(), signum)
        return None

    # -- before it is armed ------------------------------------------------------------------------------------------

    def prepare(self) -> "Listener":
        """Do, as torch is imported, what only the main thread can do for a rank: init may be called on another thread.

        Returns:
            The listener, which arms this process.
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
