"""Watches, signals and ends the processes that a drill has started, with all their descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from autoteardown.node import procfs

_PR_SET_CHILD_SUBREAPER = 36
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Process:
    """Another process, identified by pid and start time, so that a reused pid is not mistaken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = procfs.start_time(pid)

    @property
    def alive(self) -> bool:
        """Whether the process runs; False for a zombie."""
        return self._started is not None and procfs.lives(self.pid, self._started)

    def signal(self, signum: int) -> bool:
        """Send a signal; return whether the process got it."""
        if not self.alive:
            return False
        try:
            os.kill(self.pid, signum)
        except OSError:
            return False
        return True

    def main_thread(self) -> tuple[str, int]:
        """State letter and processor time (in ticks) of its main thread."""
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/stat").read_bytes()
            fields = text[text.rindex(b")") + 1 :].split()
        except (OSError, ValueError):
            return "X", 0
        return fields[0].decode("ascii"), int(fields[11]) + int(fields[12])


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Context manager that ends every process that was started inside, also after Ctrl-C, SIGTERM and SIGHUP.

    The first of these signals ends the block by an exception; later ones are ignored.
    """
    _adopt_orphans()
    before = {signum: signal.signal(signum, _interrupt) for signum in _INTERRUPTS}
    try:
        yield
    finally:
        _ignore_interrupts()
        end_all()
        for signum, handler in before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _ignore_interrupts()
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def _ignore_interrupts() -> None:
    for signum in _INTERRUPTS:
        signal.signal(signum, signal.SIG_IGN)


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that all can be found."""
    import ctypes

    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # then orphans become init's children; the ranks themselves are known by their pids


def descendants() -> set[int]:
    """The pids of all running processes below this one; zombies are left out."""
    return {pid for pid in procfs.descendants(os.getpid()) if procfs.start_time(pid) is not None}


def end_all(patience: float = 5.0) -> set[int]:
    """SIGKILL every descendant, and reap the children; return the pids that still run after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        left = descendants()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def reap(pid: int) -> int | None:
    """The exit code of a dead orphan that has become this process's child, as in `subprocess`; else None."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found else None
