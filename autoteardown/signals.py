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

import _thread
import os
import sys

from autoteardown import primitives, standins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, ModuleType
    from typing import Any, Callable

    Handler = Any
    Loop = Any  # rank.loop.Loop
    Slots = Any  # rank.slots.Slots: what an armed process has is no business of those that are not

# Handlers that do nothing but raise SystemExit: there is no work of the application's to wait for.
# Ray's, in workers (`Worker.main_loop`) and drivers (`ray.init`); in a driver, abseil's in C beneath it belongs to it.
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
        found = Tap(module, signals)
        standins.put(found, module)
        tap = found  # not without its stand-ins: the trampoline would be seen
    return tap


class Tap:
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
        self._listener: Loop | None = None
        self._slots: Slots | None = None  # as long as torch is not imported
        self._warn = True  # about the application's wake-up fd
        self._forks: object = None  # what is done when an armed process forks
        self._on_signal: Callable[[int], object] = lambda signum: None
        self._on_main: Callable[[int], bool] = lambda signum: False
        self.failed = _failed

    @property
    def armed(self) -> bool:
        """Whether a listener is there in this process."""
        return self._own_listener is not None

    @property
    def _own_listener(self) -> "Loop | None":
        """The listener, unless it is only in the parent that forked this process."""
        listener = self._listener
        return listener if listener is not None and listener.here else None

    @property
    def loop(self) -> "Loop | None":
        """The thread of an armed process, which reads the wake-up fd, and whatever else the rank has to read."""
        return self._own_listener

    # -- behind the stand-ins -----------------------------------------------------------------------------------------

    def seen(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """When all else has failed: nobody gets to see the trampoline."""
        return self._handlers.get(int(signalnum), self._default) if handler is self._trampoline else handler

    def handler_of(self, signalnum: "Any") -> "Handler":
        """What `signal.getsignal` would return without us."""
        handler = self._getsignal(signalnum)
        if handler is self._trampoline:
            return self._handlers.get(int(signalnum), self._default)
        return self._default if self._slots and self._slots.doorbell.is_handler(handler) else handler

    def set_handler(self, signalnum: "Any", handler: "Handler") -> "Handler":
        """What `signal.signal` does; raises what it raises."""
        if self._slots is None and signalnum in self.signals and _is_exit_only(handler):
            # Ray's worker: from here on its main thread is in C++, where it runs handlers but no bytecode. An async
            # actor imports torch on another thread, and what only the main thread can do would never be done (F3).
            self._prepare_early()
        slots = self._slots
        if slots is None or not isinstance(signalnum, int) or handler is self._trampoline:
            return self._signal(signalnum, handler)
        if signalnum and signalnum == slots.doorbell.number:
            return slots.doorbell.set_handler(handler)
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
            slots.replaced(signum)
            if not hears:
                self._handlers.pop(signum, None)
                slots.prepare_one(signum)
        except Exception as error:  # the application's handler is set: that is what it asked for
            _failed("signal.signal", error)
        return old

    def wakeup_fd_set(self, old: int, new: int, warn: bool) -> int:
        """The real `set_wakeup_fd` has checked and done it; returns what it would have returned without us."""
        self._warn = warn
        listener, slots = self._own_listener, self._slots
        if listener is None or slots is None:
            return old
        # A signal that comes before the slot is ours again reaches us through the trampoline, on this very thread.
        self.originals[2](listener.fd, warn_on_full_buffer=False)
        old, slots.app_fd = slots.app_fd, int(new)
        return old

    def application_owns(self, signum: int) -> bool:
        """Whether the handler in force is the application's and does more than to leave."""
        handler = self.handler_of(signum)
        if _is_exit_only(handler):
            return False
        if self._slots is not None and self._slots.has_c_handler(signum):
            return True
        return callable(handler) and handler is not self._module.default_int_handler

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
        # Not armed, the kernel does not call us: it was `_thread.interrupt_main`, which does nothing by default. Armed,
        # a handler in C has it.
        if listener is None or (self._slots is not None and self._slots.has_c_handler(signum)):
            return None
        self._signal(signum, self._default)
        os.kill(os.getpid(), signum)
        return None

    def deliver(self, signum: int) -> None:
        """On the main thread: have the application handle the signal as if it had come now."""
        slots, forwarded = self._slots, False
        if slots is not None:
            forwarded = slots.forward(bytes([signum]), self._warn)
            slots.chain(signum)
        handler = self.handler_of(signum)
        # To uvloop it would be a second signal: it may be reading its wake-up fd just now, beneath this frame.
        if callable(handler) and not (forwarded and _is_uvloops(handler)):
            handler(signum, sys._getframe(1))

    def on_main(self, errand: "Callable[[], object]") -> bool:
        """In a teardown: have the main thread call `errand` soon, out of a sleep or a lock if need be.

        Returns:
            False if it cannot be asked (see `Doorbell.ask`).
        """
        slots = self._slots
        if slots is None or not slots.doorbell.ask(errand):
            return False
        slots.wake_loop()
        return True

    def _hear(self, data: bytes) -> None:
        """On the listener thread."""
        slots = self._slots
        if slots is None:
            return
        signums = bytes(byte for byte in data if not byte & _OWN and byte != slots.doorbell.number)
        deferred = set()
        for signum in {byte & ~_OWN for byte in data} & self.signals if self.armed else ():
            if self._on_signal(signum):
                deferred.add(signum)
            elif self.application_owns(signum):
                slots.chain(signum)
        slots.forward(bytes(signum for signum in signums if signum not in deferred), self._warn)

    def _deaf(self, error: Exception) -> None:
        """On the listener thread: it must not keep what event loops wait for."""
        _failed("listener", error)
        self.disarm()

    # -- arming ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """As torch is imported: what only the main thread can do for a rank, in case init is called on another."""
        from autoteardown.rank.slots import Slots

        if self._slots is None:
            self._slots = Slots(self._module, self.signals, self._handlers, self._trampoline, self.originals)
        self._slots.prepare()

    def _prepare_early(self) -> None:
        try:
            if primitives.on_main_thread():
                self.prepare()
        except Exception as error:
            _failed("to prepare", error)

    @property
    def late(self) -> bool:
        """Whether it still waits for the main thread to come by for that: a signal may find the default action."""
        return self._slots is None or not self._slots.ready

    def arm(
        self,
        on_signal: "Callable[[int], object]",
        on_main: "Callable[[int], bool]",
        on_quiet: "Callable[[], object]",
    ) -> None:
        """Listen from now on. May be called on any thread.

        Args:
            on_signal: called on the listener thread with the number of each eviction signal; must not raise. Returns
                whether the application is to hear of it later, through `deliver`.
            on_main: called on the main thread, at a bytecode boundary; True if the agent deals with the signal.
            on_quiet: called on the listener thread after each day without a signal.

        Raises:
            OSError, RuntimeError: no socket pair or no thread to be had; nothing has been changed then.
        """
        self._on_signal, self._on_main = on_signal, on_main
        if self.armed:
            self.look_again()
            return
        from autoteardown.boundary import guarded
        from autoteardown.channel.loop import Loop
        from autoteardown.rank.forks import Forks

        def quiet() -> None:
            self.look_again()
            on_quiet()

        if self._forks is None:
            self._forks = Forks(self._module, self.signals, lambda: self.armed, self._after_fork_in_child)
        if self._slots is None:
            self.prepare()
        self._listener = listener = Loop(self._hear, self._deaf, guarded(quiet))
        assert self._slots is not None
        self._slots.take(listener)
        self._interrupt_main(True)

    def look_again(self) -> "list[int]":
        """Any thread, a few system calls: take back what C code has taken from an armed process.

        Returns:
            The signals that it would not have heard.
        """
        return self._slots.look_again() if self._slots is not None and self.armed else []

    def disarm(self) -> None:
        """Give handlers and wake-up fd back and end the listener. May be called on any thread."""
        listener = self._own_listener
        if listener is None or self._slots is None:
            return
        self._listener = None
        self._interrupt_main(False)
        self._slots.give_back(self._warn)

    def _interrupt_main(self, armed: bool) -> None:
        real = getattr(_thread.interrupt_main, "_original", _thread.interrupt_main)
        _thread.interrupt_main = standins.interrupt_main(self, real) if armed else real

    def _after_fork_in_child(self) -> None:
        """Children are not ranks: the child gets back what it would have had without us (F10)."""
        listener, self._listener = self._listener, None
        if self._slots is not None:
            self._slots.forget()
            if listener is not None:
                self._interrupt_main(False)
                listener.forget()
                self._slots.give_back(self._warn)


def _is_exit_only(handler: "Any") -> bool:
    return (getattr(handler, "__module__", ""), getattr(handler, "__name__", "")) in _EXIT_ONLY


def _is_uvloops(handler: "Any") -> bool:
    return type(getattr(handler, "__self__", None)).__module__.startswith("uvloop")


def _failed(what: str, error: BaseException) -> None:
    from autoteardown.boundary import failed  # nothing to import before something has failed

    failed(what, error)
