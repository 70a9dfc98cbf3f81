"""DataLoader workers, which must outlive their parent's last step, and not outlive it.

torchrun signals whole process groups, so the workers of a rank get the SIGTERM that the rank gets. If they die of it,
the rank's main thread raises "DataLoader worker killed by signal" 20 ms later and never reaches the step that the group
has agreed on. So a worker of an armed rank has a process group of its own.

What ends a worker must need no bytecode: it may be stuck in C, on a mutex that was held at the fork. So torch's own
handler stays as it is; and what a SIGKILL to the group would have ended, the kernel ends: the worker asks it for a
SIGKILL when the pipe closes whose other end is its parent's life.

Rejected: a handler in Python (stuck in C, it never runs; it makes a worker's end by `terminate()` an error); SIGTERM
blocked, with a waiter that lets it through (needs bytecode, and the worker's own children inherit the mask);
PR_SET_PDEATHSIG (means the thread that forked, not the process; the fork server, where there is one); to go on in the
rank without its workers (there is no next batch).
"""

from __future__ import annotations

import fcntl
import os
import signal

from autoteardown import settings
from autoteardown.node import registry

_SET_SIGNAL = 10  # F_SETSIG, which `fcntl` does not name; Linux only


def stand_apart() -> None:
    """In a worker, after torch's own handlers are in: leave the process group of the rank, if it is armed.

    Raises:
        OSError: the kernel does not do it; the worker is as without us then.
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
    """Whether Ctrl-C and Ctrl-Z can reach this process: they go to a process group, and the worker's is the rank's."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _end_with(pipe: int) -> None:
    """Have the kernel kill this process when the last writer of `pipe` is gone. Nothing is ever written to it.

    Workers that were forked later hold its other end, too: they are ended first, by the pipes of their own.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _SET_SIGNAL, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
