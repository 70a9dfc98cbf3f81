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

A process that is not armed keeps its real default action and its real wake-up fd: there, the stand-ins only remember.
Every process of the image that imports `signal` imports this: no module more than it needs, `typing` and `__future__`
included.
"""

import _thread
import functools
import os

from autoteardown.doorbell import Doorbell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, ModuleType
    from typing import Any, Callable

    from autoteardown.rank.loop import Loop

    Handler = Any

# Handlers that do nothing but raise SystemExit: there is no work of the application's to wait for.
# Ray's, in workers (`Worker.main_loop`) and drivers (`ray.init`).
_EXIT_ONLY = frozenset({("ray._private.worker", "sigterm_handler")})
_OWN = 0x80  # marks a byte of the trampoline's; signal numbers end at 64
_MISSING = object()

tap: "Tap | None" = None
"""The process's tap, once `install` has run."""


def install(module: "ModuleType") -> "Tap":
    """Put the stand-ins into the `signal` module, for the signals of `AUTOTEARDOWN_SIGNALS`. Idempotent."""
    global tap
    if tap is None:
        signals: tuple[int, ...] = (module.SIGTERM,)
        if os.environ.get("AUTOTEARDOWN_SIGNALS"):  # else not worth the import
            from autoteardown import settings

            signals = settings.load(os.environ)[0].signals
        tap = Tap(module, signals)
        tap.patch()
    return tap


class Tap:
    """The state behind the stand-ins; one for each process."""

    def __init__(self, module: "ModuleType", signals: "tuple[int, ...]") -> None:
        self.signals = frozenset(signals)
        self._module = module
        self._signal: Callable[[int, Handler], Handler] = module.signal
        self._getsignal: Callable[[int], Handler] = module.getsignal
        self._set_wakeup_fd: Callable[..., int] = module.set_wakeup_fd
        self._default, self._ignore = module.SIG_DFL, module.SIG_IGN
        # What the application believes to be in force, for the signals whose real handler is the trampoline.
        self._handlers: dict[int, Handler] = {}
        self._trampoline = self._on_main_thread  # one object, to be compared by identity
        self._listener: Loop | None = None
        self._app_fd = -1  # what would be the wake-up fd if the process were not armed
        self._doorbell = Doorbell(module, _failed)
        self._masks: dict[int, set[Any]] = {}
        self._fork_hooks = False
        self._on_signal: Callable[[int], object] = lambda signum: None
        self._on_main: Callable[[int], bool] = lambda signum: False

    @property
    def armed(self) -> bool:
        """Whether a listener is there in this process."""
        return self._own_listener is not None

    @property
    def _own_listener(self) -> "Loop | None":
        """The listener, unless it is only in the parent that forked this process."""
        listener = self._listener
        return listener if listener is not None and listener.here else None

    # -- stand-ins ------------------------------------------------------------------------------------------------

    def patch(self) -> None:
        """Replace the three functions of the `signal` module."""

        @functools.wraps(self._signal)
        def signal(signalnum: "Any", handler: "Any") -> "Any":
            try:
                return self._set_handler(signalnum, handler)
            except Exception as error:
                problem = error
            # If it was not us, the original raises it again: as itself, and without a traceback of ours.
            old = self._signal(signalnum, handler)
            _failed("signal.signal", problem)
            return old

        @functools.wraps(self._getsignal)
        def getsignal(signalnum: "Any") -> "Any":
            try:
                return self.handler_of(signalnum)
            except Exception as error:
                problem = error
            handler = self._getsignal(signalnum)
            _failed("signal.getsignal", problem)
            return handler

        @functools.wraps(self._set_wakeup_fd)
        def set_wakeup_fd(*args: "Any", **kwargs: "Any") -> int:
            old = self._set_wakeup_fd(*args, **kwargs)
            try:
                listener = self._own_listener
                if listener is None:
                    return old
                # The real call has checked the thread and the fd. A signal that comes before the slot is ours again
                # reaches us through the trampoline, which runs on this very thread.
                self._set_wakeup_fd(listener.fd, warn_on_full_buffer=False)
                old, self._app_fd = self._app_fd, int(args[0] if args else kwargs["fd"])
            except Exception as error:
                _failed("signal.set_wakeup_fd", error)
            return old

        self._module.signal = signal  # type: ignore[attr-defined]
        self._module.getsignal = getsignal  # type: ignore[attr-defined]
        self._module.set_wakeup_fd = set_wakeup_fd  # type: ignore[attr-defined]
        self._doorbell.hang(self.signals)

    def handler_of(self, signalnum: "Any") -> "Handler":
        """What `signal.getsignal` would return without us."""
        handler = self._getsignal(signalnum)
        if handler is self._trampoline:
            return self._handlers.get(int(signalnum), self._default)
        return self._default if self._doorbell.is_handler(handler) else handler

    def _set_handler(self, signalnum: "Any", handler: "Handler") -> "Handler":
        if self._doorbell.number and isinstance(signalnum, int) and signalnum == self._doorbell.number:
            return self._doorbell.set_handler(handler)
        if not isinstance(signalnum, int) or signalnum not in self.signals or handler is self._trampoline:
            return self._signal(signalnum, handler)
        signum, old = int(signalnum), self.handler_of(signalnum)
        # SIG_IGN is obeyed (the kernel drops the signal), and only an armed process needs to hear of a default.
        if not callable(handler) and not (handler == self._default and self.armed):
            self._signal(signum, handler)
            self._handlers.pop(signum, None)
            return old
        before = self._handlers.get(signum, _MISSING)
        self._handlers[signum] = self._default if handler == self._default else handler
        try:
            self._signal(signum, self._trampoline)
        except BaseException:  # not the main thread: the same ValueError as from the original
            if before is _MISSING:
                del self._handlers[signum]
            else:
                self._handlers[signum] = before
            raise
        return old

    def application_owns(self, signum: int) -> bool:
        """Whether the handler in force is the application's and does more than to leave."""
        handler = self.handler_of(signum)
        if not callable(handler) or handler is self._module.default_int_handler:
            return False
        return (getattr(handler, "__module__", ""), getattr(handler, "__name__", "")) not in _EXIT_ONLY

    # -- the two ways in --------------------------------------------------------------------------------------------

    def _on_main_thread(self, signum: int, frame: "FrameType | None") -> object:
        """The trampoline: Python's handler for every eviction signal."""
        try:
            listener = self._own_listener
            if listener is not None:
                # In case an event loop had the wake-up fd when the signal came. The mark keeps it from the loop.
                listener.write(signum | _OWN)
                if self._on_main(signum):
                    return None
        except Exception as error:
            _failed("signal handler", error)
            return None  # the listener has the signal as well, and sees to the end
        handler = self._handlers.get(signum, self._default)
        if callable(handler):
            return handler(signum, frame)
        self._signal(signum, self._default)
        os.kill(os.getpid(), signum)
        return None

    def on_main(self, errand: "Callable[[], object]") -> bool:
        """Have the main thread call `errand` soon; False if it cannot be asked (see `Doorbell.ask`)."""
        return self._doorbell.ask(errand)

    def _hear(self, data: bytes) -> None:
        """On the listener thread."""
        signums = bytes(byte for byte in data if not byte & _OWN and byte != self._doorbell.number)
        if self._app_fd != -1 and signums:
            try:
                os.write(self._app_fd, signums)
            except OSError:
                pass
        for signum in {byte & ~_OWN for byte in data} & self.signals:
            self._on_signal(signum)

    def _deaf(self, error: Exception) -> None:
        """On the listener thread: it must not keep what event loops wait for."""
        _failed("listener", error)
        self.disarm()

    # -- arming ------------------------------------------------------------------------------------------------------

    def arm(
        self,
        on_signal: "Callable[[int], object]",
        on_main: "Callable[[int], bool]",
        on_quiet: "Callable[[], object]",
    ) -> None:
        """Listen from now on. May be called on any thread.

        Args:
            on_signal: called on the listener thread with the number of each eviction signal; must not raise.
            on_main: called on the main thread, at a bytecode boundary; True if the agent deals with the signal.
            on_quiet: called on the listener thread after each day without a signal.

        Raises:
            OSError, RuntimeError: no socket pair or no thread to be had; nothing has been changed then.
        """
        self._on_signal, self._on_main = on_signal, on_main
        if self.armed:
            return
        from autoteardown.boundary import guarded
        from autoteardown.rank.loop import Loop

        if not self._fork_hooks:
            os.register_at_fork(
                before=guarded(self._before_fork),
                after_in_parent=self._unmask,
                after_in_child=guarded(self._after_fork_in_child),
            )
            os.register_at_fork(after_in_child=self._unmask)  # whatever comes of the other
            self._fork_hooks = True
        self._listener = Loop(self._hear, self._deaf, guarded(on_quiet))
        self._doorbell.settle(self._take_slots)

    def _take_slots(self) -> None:
        listener = self._own_listener
        if listener is not None:
            old = self._set_wakeup_fd(listener.fd, warn_on_full_buffer=False)
            self._app_fd = old if old != listener.fd else self._app_fd
            self._take_handlers()

    def _take_handlers(self) -> None:
        """Put the trampoline in place, but leave a SIG_IGN alone."""
        for signum in self.signals:
            handler = self._getsignal(signum)
            if handler is not self._trampoline and handler != self._ignore:
                # None: somebody's C-level handler (Ray's drivers: it aborts the process after 3 s,
                # ray-project/ray#64830). It cannot be called from here; the agent takes its place.
                self._handlers[signum] = self._default if handler is None else handler
                self._signal(signum, self._trampoline)

    def disarm(self) -> None:
        """Give handlers and wake-up fd back and end the listener. May be called on any thread."""
        listener = self._own_listener
        if listener is None:
            return
        self._listener = None
        self._doorbell.settle(self._give_slots_back)
        listener.close()

    def _give_slots_back(self) -> None:
        if self._listener is None:
            self._set_wakeup_fd(self._app_fd)
            self._app_fd = -1
            for signum in self.signals:
                if self._getsignal(signum) is self._trampoline:
                    self._signal(signum, self._handlers.pop(signum, self._default))

    # -- fork --------------------------------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        # A signal that reaches the child before `_after_fork_in_child` would be lost: CPython drops what is pending.
        if self.armed:
            pthread_sigmask, block = self._module.pthread_sigmask, self._module.SIG_BLOCK
            self._masks[_thread.get_ident()] = pthread_sigmask(block, self.signals)

    def _unmask(self) -> None:
        mask = self._masks.pop(_thread.get_ident(), None)
        if mask is not None:
            self._module.pthread_sigmask(self._module.SIG_SETMASK, mask)

    def _after_fork_in_child(self) -> None:
        """Children are not ranks: the child gets back what it would have had without us (F10)."""
        listener, self._listener = self._listener, None
        self._doorbell.forget()
        try:
            if listener is not None:
                self._set_wakeup_fd(-1)
                listener.forget()
                self._give_slots_back()
        except (OSError, ValueError):  # the event loop's fd is gone: so be it
            pass


def _failed(what: str, error: BaseException) -> None:
    from autoteardown.boundary import failed  # nothing to import before something has failed

    failed(what, error)
