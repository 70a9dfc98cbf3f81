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

Handlers and the wake-up fd can only be set on the main thread, and most Ray actors and every training function of
Ray Train call init on another. So `install` also puts a Python-level handler on one real-time signal that nobody uses,
the *doorbell*: sent to the main thread, it gets it out of a sleep or a lock and has it do an errand for us.
"""

from __future__ import annotations

import _thread
import functools
import os

TYPE_CHECKING = (
    False  # every process of the image that imports `signal` imports this: `typing` would cost it 3 ms
)
if TYPE_CHECKING:
    import socket
    from types import FrameType, ModuleType
    from typing import Any, Callable

    Handler = Any

# Handlers that do nothing but raise SystemExit: there is no work of the application's to wait for.
# Ray's, in workers (`Worker.main_loop`) and drivers (`ray.init`).
_EXIT_ONLY = frozenset({("ray._private.worker", "sigterm_handler")})
_UCRED = 12  # struct ucred: pid, uid, gid
_OWN = 0x80  # marks a byte of the trampoline's; signal numbers end at 64
_PATIENCE = 1.0  # seconds for the main thread to put handlers in place for an init on another thread
_MISSING = object()

tap: Tap | None = None
"""The process's tap, once `install` has run."""


def install(module: ModuleType) -> Tap:
    """Put the stand-ins into the `signal` module, for the signals of `AUTOTEARDOWN_SIGNALS`. Idempotent."""
    global tap
    if tap is None:
        signals: tuple[int, ...] = (module.SIGTERM,)
        if os.environ.get(
            "AUTOTEARDOWN_SIGNALS"
        ):  # else not worth the import, in most processes of the image
            from autoteardown import settings

            signals = settings.load(os.environ)[0].signals
        tap = Tap(module, signals)
        tap.patch()
    return tap


class Tap:
    """The state behind the stand-ins; one for each process."""

    def __init__(self, module: ModuleType, signals: tuple[int, ...]) -> None:
        self.signals = frozenset(signals)
        self._module = module
        self._signal: Callable[[int, Handler], Handler] = module.signal
        self._getsignal: Callable[[int], Handler] = module.getsignal
        self._set_wakeup_fd: Callable[..., int] = module.set_wakeup_fd
        self._default, self._ignore = module.SIG_DFL, module.SIG_IGN
        # What the application believes to be in force, for the signals whose real handler is the trampoline.
        self._handlers: dict[int, Handler] = {}
        # One object each, to be compared by identity.
        self._trampoline, self._answer = self._on_main_thread, self._answer_doorbell
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._fd = -1  # ours, while armed
        self._app_fd = -1
        self._pid = -1
        self._doorbell = 0
        self._errands: list[Callable[[], object]] = []
        self._masks: dict[int, set[Any]] = {}
        self._fork_hooks = False
        self._on_signal: Callable[[int], object] = lambda signum: None
        self._on_main: Callable[[int], bool] = lambda signum: False

    @property
    def armed(self) -> bool:
        """Whether a listener is there in this process (and not only in the parent that forked it)."""
        return self._sockets is not None and self._pid == os.getpid()

    # -- stand-ins ------------------------------------------------------------------------------------------------

    def patch(self) -> None:
        """Replace the three functions of the `signal` module."""

        @functools.wraps(self._signal)
        def signal(signalnum: Any, handler: Any) -> Any:
            try:
                return self._set_handler(signalnum, handler)
            except Exception as error:
                problem = error
            # If it was not us, the original raises it again: as itself, and without a traceback of ours.
            old = self._signal(signalnum, handler)
            _failed("signal.signal", problem)
            return old

        @functools.wraps(self._getsignal)
        def getsignal(signalnum: Any) -> Any:
            try:
                return self.handler_of(signalnum)
            except Exception as error:
                problem = error
            handler = self._getsignal(signalnum)
            _failed("signal.getsignal", problem)
            return handler

        @functools.wraps(self._set_wakeup_fd)
        def set_wakeup_fd(*args: Any, **kwargs: Any) -> int:
            old = self._set_wakeup_fd(*args, **kwargs)
            try:
                if not self.armed:
                    return old
                # The real call has checked the thread and the fd. A signal that comes before the slot is ours again
                # reaches us through the trampoline, which runs on this very thread.
                self._set_wakeup_fd(self._fd, warn_on_full_buffer=False)
                old, self._app_fd = self._app_fd, int(args[0] if args else kwargs["fd"])
            except Exception as error:
                _failed("signal.set_wakeup_fd", error)
            return old

        self._module.signal = signal  # type: ignore[attr-defined]
        self._module.getsignal = getsignal  # type: ignore[attr-defined]
        self._module.set_wakeup_fd = set_wakeup_fd  # type: ignore[attr-defined]
        self._hang_doorbell()

    def handler_of(self, signalnum: Any) -> Handler:
        """What `signal.getsignal` would return without us."""
        handler = self._getsignal(signalnum)
        if handler is self._trampoline:
            return self._handlers.get(int(signalnum), self._default)
        return self._default if handler is self._answer else handler

    def _set_handler(self, signalnum: Any, handler: Handler) -> Handler:
        if self._doorbell and isinstance(signalnum, int) and signalnum == self._doorbell:
            return self._set_doorbell(signalnum, handler)
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

    def _set_doorbell(self, signum: int, handler: Handler) -> Handler:
        # Lightning saves and restores the handlers of all signals: the default that it found here is ours. Without it,
        # to ring would end the process. Where somebody wants the signal for himself, it is not ours any more.
        default = handler == self._default
        old = self._signal(signum, self._answer if default else handler)
        self._doorbell = self._doorbell if default else 0
        return self._default if old is self._answer else old

    def application_owns(self, signum: int) -> bool:
        """Whether the handler in force is the application's and does more than to leave."""
        handler = self.handler_of(signum)
        if not callable(handler) or handler is self._module.default_int_handler:
            return False
        return (getattr(handler, "__module__", ""), getattr(handler, "__name__", "")) not in _EXIT_ONLY

    # -- the two ways in --------------------------------------------------------------------------------------------

    def _on_main_thread(self, signum: int, frame: FrameType | None) -> object:
        """The trampoline: Python's handler for every eviction signal."""
        try:
            if self.armed:
                try:
                    # In case an event loop had the wake-up fd when the signal came. The mark keeps it from the loop.
                    os.write(self._fd, bytes([signum | _OWN]))
                except OSError:
                    pass
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

    def _hang_doorbell(self) -> None:
        last = getattr(self._module, "SIGRTMAX", 0)
        for signum in range(last - 3, last - 12, -1) if last else ():
            if self._getsignal(signum) == self._default and signum not in self.signals:
                try:
                    self._signal(signum, self._answer)
                except ValueError:  # `signal` was first imported on another thread
                    return
                self._doorbell = signum
                return

    def _answer_doorbell(self, signum: int, frame: FrameType | None) -> None:
        while self._errands:
            errand = self._errands.pop(0)
            try:
                errand()
            except Exception as error:  # not the SystemExit with which the main thread leaves
                _failed("errand", error)

    def on_main(self, errand: Callable[[], object]) -> bool:
        """Have the main thread call `errand` soon: at its next bytecode, or out of a sleep or a lock.

        Returns:
            False if it cannot be asked. Whether it ever comes out of the C code that it is in is another matter.
        """
        import threading

        main = threading.main_thread().ident
        if not self._doorbell or main is None:
            return False
        self._errands.append(errand)
        self._module.pthread_kill(main, self._doorbell)
        return True

    def _run_listener(self, receiver: socket.socket) -> None:
        try:
            self._listen(receiver)
        except Exception as error:  # deaf, it must not keep what event loops wait for
            _failed("listener", error)
            self.disarm()

    def _listen(self, receiver: socket.socket) -> None:
        """The listener thread: ends when the sockets are closed."""
        from_this_process = self._pid.to_bytes(4, "little")
        while True:
            try:
                data, ancillary, _, _ = receiver.recvmsg(256, _SPACE)
            except OSError:
                return
            if not data:
                return
            # A child that was forked or vforked a moment ago still writes here (os.register_at_fork comes too late
            # for it, and never for subprocess): SO_PASSCRED tells who wrote.
            if any(credentials[:4] != from_this_process for _, _, credentials in ancillary):
                continue
            signums = bytes(byte for byte in data if not byte & _OWN and byte != self._doorbell)
            if self._app_fd != -1 and signums:
                try:
                    os.write(self._app_fd, signums)
                except OSError:
                    pass
            for signum in {byte & ~_OWN for byte in data} & self.signals:
                self._on_signal(signum)

    # -- arming ------------------------------------------------------------------------------------------------------

    def arm(self, on_signal: Callable[[int], object], on_main: Callable[[int], bool]) -> None:
        """Listen from now on. May be called on any thread.

        Args:
            on_signal: called on the listener thread with the number of each eviction signal; must not raise.
            on_main: called on the main thread, at a bytecode boundary; True if the agent deals with the signal.

        Raises:
            OSError, RuntimeError: no socket pair or no thread to be had; nothing has been changed then.
        """
        self._on_signal, self._on_main = on_signal, on_main
        if self.armed:
            return
        from autoteardown.boundary import guarded

        if not self._fork_hooks:
            os.register_at_fork(
                before=guarded(self._before_fork),
                after_in_parent=self._unmask,
                after_in_child=guarded(self._after_fork_in_child),
            )
            os.register_at_fork(after_in_child=self._unmask)  # whatever comes of the other
            self._fork_hooks = True
        receiver, sender = _socket_pair()
        self._sockets, self._fd, self._pid = (receiver, sender), sender.fileno(), os.getpid()
        try:
            _thread.start_new_thread(self._run_listener, (receiver,))
        except BaseException:
            self._sockets, self._fd = None, -1
            receiver.close()
            sender.close()
            raise
        self._settle(self._take_slots)

    def _settle(self, errand: Callable[[], object]) -> None:
        """Call `errand` on the main thread; wait for it a little if that is another thread."""
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

            if self.on_main(run):
                done.acquire(timeout=_PATIENCE)

    def _take_slots(self) -> None:
        if self.armed:
            old = self._set_wakeup_fd(self._fd, warn_on_full_buffer=False)
            self._app_fd = old if old != self._fd else self._app_fd
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
        if not self.armed or self._sockets is None:
            return
        (receiver, sender), self._sockets = self._sockets, None
        self._settle(self._give_slots_back)
        import socket

        receiver.shutdown(socket.SHUT_RDWR)  # wakes the listener; a close alone would leave it in recvmsg
        receiver.close()
        sender.close()

    def _give_slots_back(self) -> None:
        if self._sockets is None:
            self._set_wakeup_fd(self._app_fd)
            self._app_fd = self._fd = -1
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
        sockets, self._sockets = self._sockets, None
        try:
            self._errands.clear()
            if sockets is not None:
                self._set_wakeup_fd(-1)
                for end in sockets:
                    end.close()
                self._give_slots_back()
        except (OSError, ValueError):  # the event loop's fd is gone: so be it
            pass


def _failed(what: str, error: BaseException) -> None:
    from autoteardown.boundary import failed  # nothing to import before something has failed

    failed(what, error)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    import socket

    global _SPACE
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    try:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        _SPACE = socket.CMSG_SPACE(_UCRED)
    except (AttributeError, OSError):  # not Linux: only the fork hooks protect the parent
        pass
    return receiver, sender


_SPACE = 0
