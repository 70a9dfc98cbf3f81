"""DataLoader workers, which must outlive their parent's last step.

torchrun signals whole process groups, so the workers of a rank get the SIGTERM that the rank gets. If they die of it,
the rank's main thread raises "DataLoader worker killed by signal" 20 ms later and never reaches the step that the group
has agreed on. So a worker that is told to go asks whether its parent is on its way out, and if so stays until the
parent has parked. It does not outlive it: DataLoader's own watchdog sees to that within 5 s.
"""

from __future__ import annotations

import os
import signal
import time

from autoteardown import settings
from autoteardown.node import registry

_STAY = ("yielding", "stopping")
_GO = ("parked", "leaving")
_ASK_FOR = 0.5  # seconds until a parent that has been signalled as well must have said so


def stay_with_parent() -> None:
    """In a worker, after torch's own handlers are in: ask the parent before dying of an eviction signal."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    runtime_dir = settings.load(os.environ)[0].runtime_dir
    if parent is None or parent.pid is None or registry.state_of(runtime_dir, parent.pid) is None:
        return
    parent_pid, alive = parent.pid, parent.is_alive

    def on_signal(signum: int, frame: object) -> None:
        try:
            until = time.monotonic() + _ASK_FOR
            while alive() and time.monotonic() < until:
                state = registry.state_of(runtime_dir, parent_pid)
                if state in _STAY:
                    return
                if state in _GO:
                    os._exit(
                        0
                    )  # as torch's own handler does if the parent sends it: no error for the parent to raise
                if state is None:
                    break
                time.sleep(0.01)
        except Exception:  # what it has to do, it does
            pass
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, on_signal)
