"""Writes lines to stderr without blocking: a line is dropped if the pipe is full.

A pipe that no process reads would block the writer for ever.
"""

from __future__ import annotations

import os
import select

from autoteardown import unpatched


def say(line: str, stderr: tuple[int, int] | None = None) -> None:
    """Write one line to fd 2 if it takes the line at once.

    Args:
        line: without its newline.
        stderr: identity of the file that fd 2 must still refer to. After the program has closed its stderr, a
            checkpoint that it opens may get this descriptor number.
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
    """Device and inode of the file behind a descriptor; None if the descriptor is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino
