"""Raises the file descriptor limit for a hub with thousands of connections, and keeps low descriptors for the program.

1. The soft limit is 1,024 for programs that call select(2), which cannot take higher numbers. The hard limit is what
   the administrator allows. So the hub raises the soft limit as far as it needs.
2. The hub's connections get numbers from 1,024 on, so that the program keeps the low numbers.
3. Rejected: one rank on each node that relays for the others. A relay can die, has to be found again and has to be kept
   informed, all for a limit that the images in use do not have.
"""

from __future__ import annotations

import fcntl
import os
import resource

SPARE = 256
"""Descriptors that the hub leaves to the program."""
_SELECT = 1024


def reserve(wanted: int) -> int:
    """Raise the soft limit if this number of connections needs it.

    Returns:
        The number of connections that the limit now allows, at most `wanted`.
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


def move_high(fd: int) -> int:
    """Move an open file to a number that select(2) cannot use; return the old number if none is free."""
    if fd >= _SELECT:
        return fd
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SELECT)
    except OSError:
        return fd
    os.close(fd)
    return moved


def grow_table(count: int) -> None:
    """Have the kernel grow this process's descriptor table once. In a program with threads, each growth takes long."""
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _SELECT + count))
    except OSError:  # no descriptor 0, or not that many
        pass
