"""Keeps DataLoader workers alive until their rank has finished its last iteration, and no longer.

1. torchrun signals whole process groups, so the workers of a rank get the SIGTERM that the rank gets. If they died
   of it, the rank's main thread would raise "DataLoader worker killed by signal" 20 ms later, and never reach the
   iteration that the group has agreed on. So a worker of an armed rank has a process group of its own.
2. A worker must end without running Python: it may be stuck in C, on a mutex that was held at the fork. So torch's
   own handler stays, and what a SIGKILL to the process group would have ended, the kernel ends: the worker asks for
   a SIGKILL when the pipe closes whose other end its parent holds.
3. Rejected: a handler in Python (a worker stuck in C never runs it, and `terminate()` would look like an error);
   SIGTERM blocked, with a thread that waits for it (needs bytecode, and the worker's own children inherit the mask);
   PR_SET_PDEATHSIG (means the thread that forked, not the process, or the fork server); to continue in the rank
   without its workers (there is no next batch).
"""

from __future__ import annotations

import fcntl
import os
import signal

from autoteardown import settings
from autoteardown.node import registry

_SET_SIGNAL = 10  # F_SETSIG, which `fcntl` does not name; Linux only


def stand_apart() -> None:
    """In a worker, after torch has set its handlers: leave the process group of the rank, if the rank is armed.

    Raises:
        OSError: the kernel refuses; the worker is then as without the agent.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not hasattr(os, "O_ASYNC") or _on_a_terminal():
        return
    if registry.state_of(settings.load(os.environ)[0].runtime_dir, parent.pid) is None:
        return
    _end_with(parent.sentinel)
    os.setpgid(0, 0)


def _on_a_terminal() -> bool:
    """Whether Ctrl-C and Ctrl-Z can reach this process. They go to a process group, so the worker must stay in the
    rank's.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _end_with(pipe: int) -> None:
    """Have the kernel kill this process when the last writer of `pipe` has closed it. Nothing is ever written to it.

    Workers that were forked later hold the writing end, too: they are killed first, by their own pipes.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _SET_SIGNAL, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
