"""torchrun, in a process that writes down what its workers return: it tells nobody else. `LOG [ARGUMENT]…`

The lines of LOG are `<pid> <exit code>`, as `subprocess` counts: minus the signal that ended a process. Standard input
is the line to the drill: when it breaks, the drill was killed, and the workers must not outlive it.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from typing import Any

_workers: list[subprocess.Popen[Any]] = []


class Watched(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose exit code goes into the log as soon as whoever started it knows."""

    log = -1
    _told = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _workers.append(self)

    def poll(self) -> int | None:
        """As ever."""
        code = super().poll()
        self._tell()
        return code

    def wait(self, timeout: float | None = None) -> int:
        """As ever."""
        try:
            return super().wait(timeout)
        finally:
            self._tell()

    def _tell(self) -> None:
        if self.returncode is not None and not self._told:
            self._told = True
            os.write(self.log, f"{self.pid} {self.returncode}\n".encode())


def _end_with_the_drill() -> None:
    while os.read(0, 1):
        pass
    for worker in _workers:
        if worker.returncode is None:
            try:
                os.killpg(worker.pid, signal.SIGKILL)  # torchrun gives each worker a session of its own
            except OSError:
                pass
    os._exit(1)


def main() -> None:
    """Run torchrun with the remaining arguments."""
    Watched.log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    subprocess.Popen = Watched  # type: ignore[misc] # before torch takes the name over
    threading.Thread(target=_end_with_the_drill, daemon=True).start()
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
