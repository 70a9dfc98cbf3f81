"""Reads and sets kernel signal dispositions (`sigaction`) from any thread, and saves and restores them whole.

1. The `signal` module knows only handlers that were set through it, and sets them on the main thread only. Handlers
   that C code has installed (faulthandler, MPI, UCX, abseil) are seen here.
2. A disposition is saved as the bytes that `sigaction` wrote, so their layout need not be known.
3. The functions are CPython's public ones, and the C library's that CPython itself uses. ctypes is imported for
   them, as `import torch` does; so this module is never imported at start-up.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Callable

from autoteardown import spare_threads
from autoteardown.fail_open import fail_open, report_failure
from autoteardown.loaded_symbols import locate

DEFAULT, IGNORE = 0, 1  # SIG_DFL and SIG_IGN; any other value is the address of a handler
_LARGEST = 512  # bytes; struct sigaction has 152 on Linux, and 16 on macOS

# Own prototypes: those in `ctypes.pythonapi` are shared with everyone else who sets their types.
_getsig = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(("PyOS_getsig", ctypes.pythonapi))
_setsig = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(("PyOS_setsig", ctypes.pythonapi))
_Pending = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_add_pending = ctypes.PYFUNCTYPE(ctypes.c_int, _Pending, ctypes.c_void_p)(
    ("Py_AddPendingCall", ctypes.pythonapi)
)
_sigaction = ctypes.CDLL(None, use_errno=True).sigaction
_sigaction.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p]

_errands: list[Callable[[], object]] = []


def handler_of(signum: int) -> int:
    """The address of the handler in force, `DEFAULT` or `IGNORE`."""
    return _getsig(signum) or DEFAULT


def set_handler(signum: int, handler: int) -> None:
    """Put a handler in force, as `signal.signal` does in C."""
    _setsig(signum, handler)


def save(signum: int) -> bytes:
    """The whole disposition of a signal: handler, mask and flags."""
    disposition = ctypes.create_string_buffer(_LARGEST)
    if _sigaction(signum, None, disposition):
        raise OSError(ctypes.get_errno(), "sigaction")
    return disposition.raw


def restore(signum: int, disposition: bytes) -> None:
    """Put back what `save` has returned."""
    if _sigaction(signum, disposition, None):
        raise OSError(ctypes.get_errno(), "sigaction")


def call_on_main(errand: Callable[[], object]) -> bool:
    """Have the main thread call `function` when it next runs bytecode. No signal is sent: a sleep is not interrupted.

    Returns:
        False if too many calls are pending already.
    """
    _errands.append(errand)
    return bool(_add_pending(_run_errands, None) == 0)


def forget_errands() -> None:
    """In a forked child: drop the calls that are pending for the parent's main thread."""
    _errands.clear()


def _do_errands(_: object) -> int:
    # On the main thread. One call may run the functions of several, whose own calls then find nothing.
    while _errands:
        errand = _errands.pop(0)
        try:
            errand()
        except Exception as error:
            report_failure("errand", error)
    return 0


_run_errands = _Pending(_do_errands)  # kept alive: C has its address


def run_saved(signum: int, disposition: bytes, interpreters: int) -> None:
    """Run a saved handler on a new thread; then put the interpreter's handler back.

    faulthandler's may chain: it puts back what it has replaced, which may be the default action, and raises the signal
    again. While the process is armed, that is the agent's to decide. So faulthandler's is called as a function, on a
    thread on which the signal is blocked: what it raises for that thread ends with the thread.

    Without a thread it is not run: it might never return, and the agent's thread has to listen.
    """

    def run() -> None:
        restore(signum, disposition)
        handler = handler_of(signum)
        try:
            if _is_pythons(handler):
                # It reads the frames of all threads and crashes if they run on meanwhile, so it is called with the GIL
                # held. If it then blocks, the POSIX timer ends the process.
                set_handler(signum, interpreters)
                signal.pthread_sigmask(signal.SIG_BLOCK, (signum,))
                _Handler(handler)(signum)
            else:
                _raise(signum)  # for this thread: the handler has run when the call returns
        finally:
            set_handler(signum, interpreters)

    spare_threads.start(fail_open(run))


def _is_pythons(handler: int) -> bool:
    """Whether a handler is part of the interpreter, as faulthandler's is."""
    found = locate(handler)
    interpreter = locate(ctypes.cast(_setsig, ctypes.c_void_p).value)
    return found is not None and interpreter is not None and found.library == interpreter.library


_raise = ctypes.CDLL(None)["raise"]
_Handler = ctypes.PYFUNCTYPE(None, ctypes.c_int)  # called with the GIL held
