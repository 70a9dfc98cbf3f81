"""Runs torchrun and writes the exit codes of its workers to a file, because torchrun itself does not report them.

1. Arguments: `LOG [ARGUMENT]…`. The lines of LOG are `<pid> <exit code>`; the code of a process that was ended by a
   signal is minus the signal, as in `subprocess`.
2. Standard input is a pipe from the drill. When it is closed, the drill has been killed, and the workers are killed,
   too.
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
    """A process whose exit code is written to the log as soon as its parent knows it."""

    log = -1
    _logged = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _workers.append(self)

    def poll(self) -> int | None:
        """As the base class, and log the exit code."""
        code = super().poll()
        self._log_code()
        return code

    def wait(self, timeout: float | None = None) -> int:
        """As the base class, and log the exit code."""
        try:
            return super().wait(timeout)
        finally:
            self._log_code()

    def _log_code(self) -> None:
        if self.returncode is not None and not self._logged:
            self._logged = True
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
    subprocess.Popen = Watched  # type: ignore[misc] # before torch imports the name
    threading.Thread(target=_end_with_the_drill, daemon=True).start()
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
