"""Runs a command as if this process were not there: its signals go to the command, its exit code is the command's.

1. Signals are blocked and taken one by one (`sigwaitinfo`), so none is lost while the command starts, and no Python
   handler runs in the middle of anything. The command gets the signal mask that this process was started with.
2. The command stays in this process group, so the terminal, its job control and a debugger work as without. A signal
   that the kernel sends (Ctrl-C) has reached the command already, and is not sent twice.
3. SIGTSTP, SIGTTIN, SIGTTOU and SIGCONT keep their default action: the shell stops and continues both.
4. As process 1 of a container, this process also reaps the orphans.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Optional

_LEFT_ALONE = ("SIGKILL", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCONT", "SIGCHLD", "SIGPIPE")
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")
_FROM_KERNEL = 128  # si_code SI_KERNEL
NOT_FOUND, NOT_EXECUTABLE = 127, 126


def block() -> set[int]:
    """Block every signal that is passed on, and SIGCHLD, in this thread and those it starts; return the old mask."""
    # If it is ignored, the kernel reaps, and no exit code is left.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kept = {getattr(signal, name) for name in (*_LEFT_ALONE, *_FAULTS)} - {signal.SIGCHLD}
    return {int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - kept)}


def taken() -> set[int]:
    """The signals that `block` has blocked."""
    return {int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


class Command:
    """A running command. Started after `block`.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, words: Sequence[str], mask: set[int]) -> None:
        # Python ignores these two; as every program that starts programs, it must not hand that on.
        default = [signal.SIGPIPE, signal.SIGXFSZ]
        self.pid = os.posix_spawnp(words[0], list(words), os.environ, setsigmask=mask, setsigdef=default)
        self._status: Optional[int] = None

    def wait(self) -> int:
        """Pass signals on until the command has ended; return its exit code, 128 + n if signal n has ended it."""
        signals = taken()
        while not self._reap():
            found = signal.sigwaitinfo(signals)
            if found.si_signo != signal.SIGCHLD and found.si_code != _FROM_KERNEL:
                try:
                    os.kill(self.pid, found.si_signo)
                except OSError:  # it has become another user's (sudo), or has ended
                    pass
        code = os.waitstatus_to_exitcode(self._status or 0)
        return 128 - code if code < 0 else code

    def _reap(self) -> bool:
        """Reap all children that have ended; return whether the command has."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self._status is not None
            if not pid:
                return self._status is not None
            if pid == self.pid:
                self._status = status
