"""Descriptors for a hub with thousands of connections, in a program that may be allowed 1,024.

The soft limit is 1,024 for the sake of programs that call select(2), which cannot take higher numbers; the hard limit
is what an administrator means. So the hub raises the soft limit as far as it needs, and keeps the low numbers for the
program: its connections get numbers from 1,024 on. Rejected: one rank a node that relays for the others. It is one
more thing to die, to be found again and to be told of, for a limit that the images in use do not have.
"""

from __future__ import annotations

import fcntl
import os
import resource
import termios

SPARE = 256
"""Descriptors that the hub leaves to the program."""
_SELECT = 1024


def afford(wanted: int) -> int:
    """Raise the soft limit if so many connections need it.

    Returns:
        How many of them there is room for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = SPARE
    if used + wanted + SPARE > soft:
        need = max(_SELECT, used) + wanted + SPARE
        most = need if hard == resource.RLIM_INFINITY else min(need, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
            soft = max(soft, most)
        except (OSError, ValueError):
            pass
    return max(0, min(wanted, soft - used - SPARE))


def high(fd: int) -> int:
    """The same open file at a number that select(2) has no use for, where there is one."""
    if fd >= _SELECT:
        return fd
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SELECT)
    except OSError:
        return fd
    os.close(fd)
    return moved


def make_room(count: int) -> None:
    """Have the kernel make its table of descriptors long enough at once: in a program with threads, each time takes
    it a while.
    """
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _SELECT + count))
    except OSError:  # no descriptor 0, or not that many
        pass


def unsent(fd: int) -> int:
    """Bytes in the kernel that the other end has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), "little")
