"""Takes over the Python handlers, kernel dispositions and wake-up fd of an armed process, and gives them back.

1. Python-level handlers can be set on the main thread only, and most Ray actors and every training function of Ray
   Train call init on another (pytorch/pytorch#135088). So the handlers are set early, while torch is imported,
   without the kernel's disposition: the process still behaves as without them. To arm the process is then to set the
   kernel's disposition, which any thread can do at once.
2. The wake-up fd can be set on the main thread only, too, and is set when that thread next runs bytecode. Until
   then, a signal is noticed if the main thread sleeps or waits for a lock, but not if it is in C code.
3. The kernel's disposition is read with `sigaction`. A handler that is not the interpreter's was set by C code: it
   runs when the signal comes, beside the agent's, and is put back in the end.
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
    """The handlers, dispositions and wake-up fd of one process.

    Args:
        module: the `signal` module.
        signals: the signals that mean eviction.
        handlers: the application's handlers, where the real handler is `trampoline`.
        trampoline: the Python-level handler that takes their place.
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
        self.ready = False  # the main thread has done its part
        self.app_fd = -1  # the application's wake-up fd; -1: none
        self._signals = signals
        self._handlers = handlers
        self._trampoline = trampoline
        self._signal, self._getsignal, self._set_wakeup_fd = functions
        self._default, self._ignore = module.SIG_DFL, module.SIG_IGN
        self.interrupt = MainThreadInterrupt(module, signals, self._signal, self._getsignal)
        self._python = 0  # the address of the interpreter's own handler
        self._before: dict[int, bytes] = {}  # dispositions from before the process was armed
        self._in_c: dict[int, bytes] = {}  # dispositions with a handler that is not Python's
        self._chained: set[int] = set()
        self._listener: Loop | None = None
        self._fd = -1  # the wake-up fd that the agent has set

    # -- before: on the main thread ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Set the Python-level handlers of the signals, and leave the kernel's dispositions as they are.

        Not on the main thread: this is done when the main thread next runs bytecode.
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
        """The same for one signal, whose handler the application has set to the default action."""
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
        """Have the interpreter's handler called and the loop's fd written to from now on. Any thread.

        Returns:
            False if the main thread has not prepared anything yet: it then does its part when it next runs bytecode.
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
        """Put the interpreter's handler in force. Returns the signals that had another."""
        found = []
        for signum in self._signals:
            handler = dispositions.handler_of(signum)
            python = self._getsignal(signum)
            if handler in (self._python, dispositions.IGNORE) or not callable(python):
                continue
            self._before[signum] = disposition = dispositions.save(signum)
            if handler != dispositions.DEFAULT:
                self._in_c[signum] = disposition
            else:  # its owner may have removed it (`faulthandler.unregister`)
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
        for signum in self._signals:  # handlers that were set without the replacements
            self.prepare_one(signum)
        self._take_kernel()
        self.interrupt.connect(True)

    def reclaim(self) -> list[int]:
        """Take back what C code has taken since. Any thread. Returns the signals that were affected."""
        if self._listener is None or not self._listener.here:
            return []
        if unpatched.on_main_thread():
            self._take_on_main()
        else:
            dispositions.call_on_main(self._take_on_main)
        return self._take_kernel() if self.ready else []

    def replaced(self, signum: int) -> None:
        """The application has set a handler through Python, so the disposition from before is obsolete."""
        self._before.pop(signum, None)
        self._in_c.pop(signum, None)

    def has_c_handler(self, signum: int) -> bool:
        """Whether C code had a handler in force."""
        return signum in self._in_c

    def chain(self, signum: int) -> None:
        """Run the C-level handler that was found, once: it is the application's, and may in turn call the agent's."""
        if signum in self._in_c and signum not in self._chained:
            self._chained.add(signum)
            dispositions.run_saved(signum, self._in_c[signum], self._python)

    def forward(self, signums: bytes, warn: bool) -> bool:
        """Write signal numbers to the wake-up fd of the application.

        Args:
            signums: the numbers, one byte each.
            warn: the application's `warn_on_full_buffer`.

        Returns:
            Whether the application has a wake-up fd and the bytes were written.
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
        """In a teardown: wake the application's event loop. uvloop waits in C for its wake-up fd alone, whatever
        signals come.

        A zero byte means no signal to any event loop.
        """
        if self.app_fd != -1:
            try:
                os.write(self.app_fd, b"\0")
            except OSError:  # full: the loop is about to wake; or closed
                pass

    # -- and back -----------------------------------------------------------------------------------------------------

    def give_back(self, warn: bool) -> None:
        """Restore the kernel's dispositions at once, and the rest when the main thread next runs bytecode. Any thread.

        Args:
            warn: the application's `warn_on_full_buffer`.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.interrupt.connect(False)
        for signum in self._signals:
            # SIG_IGN is the application's, and so is a handler that this thread cannot set.
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
                self._take_on_main()  # armed again in the meantime
            else:
                fd, self.app_fd, self._fd = self.app_fd, -1, -1
                try:
                    self._set_wakeup_fd(fd, warn_on_full_buffer=warn)
                except (OSError, ValueError):  # the event loop has closed its fd
                    self._set_wakeup_fd(-1)
            if listener.here:
                listener.close()  # not earlier: the kernel wrote signals to its fd

        if unpatched.on_main_thread():
            run_on_main_thread()
        else:
            dispositions.call_on_main(run_on_main_thread)

    def forget(self) -> None:
        """In a forked child: drop what waits for the parent's main thread."""
        dispositions.forget_errands()
        self.interrupt.forget()
