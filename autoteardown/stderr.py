"""Lines on stderr that wait for nobody: a full pipe that nobody reads would block the writer for ever."""

from __future__ import annotations

import os
import select

from autoteardown import unpatched


def say(line: str, stderr: tuple[int, int] | None = None) -> None:
    """Write one line to fd 2, if it can take it at once.

    Args:
        line: without its newline.
        stderr: identity of the file that must still be behind fd 2: once the program has closed its stderr, a
            checkpoint that it opens may get that number.
    """
    try:
        if stderr is not None and identity(2) != stderr:
            return
        poll = unpatched.poll()
        poll.register(2, select.POLLOUT)
        ready = poll.poll(0)
        if ready and ready[0][1] & select.POLLOUT:
            # A pipe that polls writable takes this many bytes without blocking.
            os.write(2, line.encode("utf-8", "backslashreplace")[: select.PIPE_BUF - 1] + b"\n")
    except (OSError, ValueError):
        pass


def identity(descriptor: int) -> tuple[int, int] | None:
    """Which file is behind a descriptor; None if there is none."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino
