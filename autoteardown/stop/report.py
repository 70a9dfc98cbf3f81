"""What a teardown leaves behind: log lines, a JSON report, the termination log.

Runs while the main thread may be frozen at any bytecode and the disk or the terminal may be dead. So: no `logging`, no
`print`, no lock, nothing that raises. A line that stderr cannot take at once is dropped: a full pipe that nobody reads
would block the writer for ever.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any, Optional

from autoteardown.node import folder
from autoteardown.node.record import printable

TERMINATION_LOG_BYTES = 4096  # what Kubernetes keeps of it


class Log:
    """Lines on fd 2: `autoteardown rank=3/16 pid=4711 host=node-a +0.412s drain ok (0.02s)`."""

    def __init__(self, level: str, host: str) -> None:
        self.level = level
        self.host = printable(host).replace(" ", "?")  # one field
        self.rank: Optional[int] = None
        self.world_size: Optional[int] = None
        self._pid = os.getpid()
        self._stderr = _identity(2)

    def line(self, text: str, seconds: float = 0.0, level: str = "info") -> None:
        """Say one thing. `seconds` since the signal."""
        if self.level == "quiet" or (level == "debug" and self.level != "debug"):
            return
        rank = "?" if self.rank is None else self.rank
        size = "?" if self.world_size is None else self.world_size
        prefix = f"autoteardown rank={rank}/{size} pid={self._pid} host={self.host} +{seconds:.3f}s"
        say(f"{prefix} {printable(text)}", self._stderr)


def say(line: str, stderr: Optional[tuple[int, int]] = None) -> None:
    """Write one line to fd 2, if it can take it at once.

    Args:
        line: without its newline.
        stderr: identity of the file that must still be behind fd 2: once the program has closed its stderr, a
            checkpoint that it opens may get that number.
    """
    try:
        if stderr is not None and _identity(2) != stderr:
            return
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        ready = poll.poll(0)
        if ready and ready[0][1] & select.POLLOUT:
            # A pipe that polls writable takes this many bytes without blocking.
            os.write(2, line.encode("utf-8", "backslashreplace")[: select.PIPE_BUF - 1] + b"\n")
    except (OSError, ValueError):
        pass


def _identity(descriptor: int) -> Optional[tuple[int, int]]:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def stacks() -> list[dict[str, Any]]:
    """Where every thread stands. No `traceback`, which reads source files from a disk that may hang."""
    found = []
    for ident, frame in sys._current_frames().items():
        lines: list[str] = []
        walker: Any = frame
        while walker is not None and len(lines) < 60:
            code = walker.f_code
            lines.append(f"{code.co_filename}:{walker.f_lineno} in {code.co_name}")
            walker = walker.f_back
        found.append({"thread": ident, "frames": lines})
    return found


def write_report(directory: str, name: str, report: dict[str, Any]) -> Optional[str]:
    """Write the JSON report, whole or not at all.

    Returns:
        What went wrong, or None.
    """
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        # O_PATH: a folder that all may write to and nobody may list will do.
        descriptor = os.open(directory, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            data = json.dumps(report, indent=1, default=str).encode("ascii")
            folder.replace(descriptor, printable(name), data, 0o644)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return f"report {os.path.join(directory, name)!r} not written: {error}"
    return None


def write_termination_log(path: str, text: str) -> None:
    """Kubernetes mounts the file: where there is none, there is nobody to read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, 0)  # fails where it is no plain file
            # Not cut in the middle of a letter: the kubelet takes UTF-8 only.
            data = text.encode("utf-8", "backslashreplace")[:TERMINATION_LOG_BYTES]
            os.write(descriptor, data.decode("utf-8", "ignore").encode())
        finally:
            os.close(descriptor)
    except OSError:
        pass
