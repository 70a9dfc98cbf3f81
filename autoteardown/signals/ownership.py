"""The slots that an armed process takes: handlers, dispositions of the kernel's, the wake-up fd; and gives back.

Python-level handlers can only be set on the main thread, and most Ray actors and every training function of Ray Train
call init on another. So they are set early, while torch is imported, and hidden from the kernel: its disposition stays
what it was. To arm is then to tell the kernel, which any thread can do at once. The wake-up fd follows when the main
thread comes by; until then a signal is heard of if that thread sleeps or waits for a lock, not if it is in C.

What the kernel had in force is found by `sigaction` itself. A C-level handler is somebody's who did not go through
Python: it runs when the signal comes, beside ours, and is put back in the end.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Callable

from autoteardown import unpatched
from autoteardown.event_loop.loop import Loop
from autoteardown.signals import dispositions, unraisable
from autoteardown.signals.main_thread_interrupt import MainThreadInterrupt

Handler = Any


class SignalOwnership:
    """Of one process.

    Args:
        module: `signal`.
        signals: those that mean eviction.
        handlers: what the application believes to be in force where the real handler is `trampoline`.
        functions: the originals of `signal.signal`, `getsignal`, `set_wakeup_fd`.
    """

    def __init__(
        self,
        module: ModuleType,
        signals: frozenset[int],
        handlers: dict[int, Handler],
        trampoline: Handler,
        functions: tuple[Callable[..., Any], ...],
    ) -> None:
        self.ready = False  # the main thread has been here
        self.app_fd = -1  # what would be the wake-up fd if the process were not armed
        self._signals = signals
        self._handlers = handlers
        self._trampoline = trampoline
        self._signal, self._getsignal, self._set_wakeup_fd = functions
        self._default, self._ignore = module.SIG_DFL, module.SIG_IGN
        self.interrupt = MainThreadInterrupt(module, signals, self._signal, self._getsignal)
        self._python = 0  # the address of the interpreter's own handler
        self._before: dict[int, bytes] = {}  # dispositions as they were when the process was armed
        self._in_c: dict[int, bytes] = {}  # those with a handler that is not Python's
        self._chained: set[int] = set()
        self._listener: Loop | None = None
        self._fd = -1  # the wake-up fd that we have set

    # -- before: on the main thread ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Set the Python-level handlers of signals that have none, and leave the kernel as it is.

        On another thread: when the main thread comes by.
        """
        if not unpatched.on_main_thread():
            dispositions.call_on_main(self.prepare)
        elif not self.ready:
            self.interrupt.reserve()
            self._python = self.interrupt.python
            for signum in self._signals:
                self.prepare_one(signum)
            self.ready = bool(self._python)

    def prepare_one(self, signum: int) -> None:
        """The same for one signal, whose handler the application has set to the default."""
        handler = self._getsignal(signum)
        if handler == self._ignore or handler is self._trampoline:
            return
        disposition = dispositions.save(signum)
        self._handlers[signum] = handler
        self._signal(signum, self._trampoline)
        self._python = dispositions.handler_of(signum)
        if self._listener is None:
            dispositions.restore(signum, disposition)

    # -- armed --------------------------------------------------------------------------------------------------------

    def take(self, listener: Loop) -> bool:
        """Any thread: from here on, what is heard goes to the listener.

        Returns:
            False if the main thread has not prepared anything yet: what only it can do is done when it comes by.
        """
        self._listener = listener
        if self.ready:
            self._take_kernel()
            self.interrupt.connect(True)
        if unpatched.on_main_thread():
            self._take_on_main()
        else:
            dispositions.call_on_main(self._take_on_main)
        return self.ready

    def _take_kernel(self) -> list[int]:
        """Put the interpreter's handler in force where another is; return the signals that were somebody's."""
        found = []
        for signum in self._signals:
            handler = dispositions.handler_of(signum)
            python = self._getsignal(signum)
            if handler in (self._python, dispositions.IGNORE) or not callable(python):
                continue
            self._before[signum] = disposition = dispositions.save(signum)
            if handler != dispositions.DEFAULT:
                self._in_c[signum] = disposition
            else:  # maybe its owner has put it away (`faulthandler.unregister`)
                self._in_c.pop(signum, None)
            dispositions.set_handler(signum, self._python)
            found.append(signum)
        return found

    def _take_on_main(self) -> None:
        listener = self._listener
        if listener is None or not listener.here:
            return
        self.prepare()
        old = self._set_wakeup_fd(listener.fd, warn_on_full_buffer=False)
        if old != self._fd:
            self.app_fd = old
        self._fd = listener.fd
        for signum in self._signals:  # what was set behind the stand-ins' back
            self.prepare_one(signum)
        self._take_kernel()
        self.interrupt.connect(True)

    def reclaim(self) -> list[int]:
        """Any thread: take back what C code has taken since; return the signals that were affected."""
        if self._listener is None or not self._listener.here:
            return []
        if unpatched.on_main_thread():
            self._take_on_main()
        else:
            dispositions.call_on_main(self._take_on_main)
        return self._take_kernel() if self.ready else []

    def replaced(self, signum: int) -> None:
        """The application has set a handler through Python: what was beneath is gone for good."""
        self._before.pop(signum, None)
        self._in_c.pop(signum, None)

    def has_c_handler(self, signum: int) -> bool:
        """Whether C code had a handler in force."""
        return signum in self._in_c

    def chain(self, signum: int) -> None:
        """Have the C-level handler that was found run, once: it is the application's, and may call ours."""
        if signum in self._in_c and signum not in self._chained:
            self._chained.add(signum)
            dispositions.run_saved(signum, self._in_c[signum], self._python)

    def forward(self, signums: bytes, warn: bool) -> bool:
        """To the wake-up fd of the application; `warn`: its `warn_on_full_buffer`.

        Returns:
            Whether it has one, which takes them.
        """
        if self.app_fd == -1 or not signums:
            return False
        try:
            os.write(self.app_fd, signums)
        except OSError as error:
            if warn or not isinstance(error, BlockingIOError):
                unraisable.wakeup_write_failed(error)
            return False
        return True

    def wake_loop(self) -> None:
        """In a teardown: uvloop waits in C for its wake-up fd alone, whatever signals come.

        A zero byte is no signal to any loop.
        """
        if self.app_fd != -1:
            try:
                os.write(self.app_fd, b"\0")
            except OSError:  # full, so it is about to wake; or closed
                pass

    # -- and back -----------------------------------------------------------------------------------------------------

    def give_back(self, warn: bool) -> None:
        """Any thread: the kernel's dispositions are as before at once, the rest when the main thread comes by.

        Args:
            warn: the application's `warn_on_full_buffer`.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.interrupt.connect(False)
        for signum in self._signals:
            # SIG_IGN is the application's, and so is a handler that another thread cannot set.
            if self._getsignal(signum) is self._trampoline:
                disposition = self._before.pop(signum, None)
                if disposition is not None:
                    dispositions.restore(signum, disposition)
                elif not callable(self._handlers.get(signum)):
                    dispositions.set_handler(signum, dispositions.DEFAULT)
        self._in_c.clear()
        self._before.clear()

        def run_on_main_thread() -> None:
            if self._listener is not None:
                self._take_on_main()  # armed again meanwhile
            else:
                fd, self.app_fd, self._fd = self.app_fd, -1, -1
                try:
                    self._set_wakeup_fd(fd, warn_on_full_buffer=warn)
                except (OSError, ValueError):  # the event loop's fd is gone: so be it
                    self._set_wakeup_fd(-1)
            if listener.here:
                listener.close()  # not before: its fd was where signals are written

        if unpatched.on_main_thread():
            run_on_main_thread()
        else:
            dispositions.call_on_main(run_on_main_thread)

    def forget(self) -> None:
        """In a forked child."""
        dispositions.forget_errands()
        self.interrupt.forget()
