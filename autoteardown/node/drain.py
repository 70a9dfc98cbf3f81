"""Drains this node: signals its armed ranks and waits until they are gone.

For whatever forwards no signal to the ranks: raylet, which SIGKILLs its actors, or a shell as PID 1.

A rank is signalled through a pidfd that was opened before its identity was checked. So a signal cannot reach
a stranger, however the pid is reused in between: the pidfd is the process that was checked, or a dead one.
"""

from __future__ import annotations

import os
import select
import signal
import time

from autoteardown.node import procfs, registry
from autoteardown.node.entry import Entry, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MARGIN = 2.0
"""How much longer than a grace period to wait, in seconds: a rank's own clock starts with its signal."""

# On their way out already. A second signal could reach one in the last moments of its interpreter, when the
# default action, and with it another exit code, is back in force.
_ON_ITS_WAY = ("yielding", "stopping", "parked", "leaving", "left")
_POLL = 0.1


class Drained:
    """What became of one rank.

    `outcome` is what its own teardown said (`clean`, `partial`, `aborted`, `forced`), or `ended`: it withdrew its
    entry, as at the normal end of a job; `died`: it left its entry and said nothing; `unknown`: it is gone, and
    its entry cannot be read; `running`: it is still there; `refused`: it could not be signalled.
    """

    __slots__ = ("_pidfd", "detail", "exit_code", "outcome", "record", "seconds", "signalled")

    def __init__(self, record: Entry) -> None:
        """Use `drain`."""
        self.record = record
        self.outcome = "running"
        self.exit_code: int | None = None
        self.seconds = 0.0
        self.signalled: int | None = None
        self.detail = ""
        self._pidfd: int | None = None

    @property
    def clean(self) -> bool:
        """Whether it left as it should."""
        return self.outcome in ("clean", "ended")

    def line(self) -> str:
        """In words."""
        said = {
            "ended": "ended on its own",
            "died": "died without a teardown",
            "unknown": f"gone, nothing is known of how: {self.detail}",
            "running": "still running",
            "refused": f"not signalled: {self.detail}",
        }.get(self.outcome, printable(self.outcome))
        code = "" if self.exit_code is None else f", exit {self.exit_code}"
        return f"{named(self.record)}: {said}{code} ({self.seconds:.2f}s)"

    def _start(self, signum: int) -> bool:
        """Signal the rank; whether there is something to wait for."""
        try:
            self._pidfd = os.pidfd_open(self.record.pid)
        except (AttributeError, OSError):  # an old kernel, gVisor, seccomp; or gone
            self._pidfd = None
        if not procfs.is_ours():
            return self._refuse("without a /proc of this pid namespace it could be any process")
        if not registry.alive(self.record):
            self.close()  # it may be a stranger's
            return True
        if self.record.state in _ON_ITS_WAY:
            return True
        wanted = self.record.signal
        if wanted in signal.valid_signals() and wanted not in (signal.SIGKILL, signal.SIGSTOP):
            signum = wanted or signum
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signum)
            else:
                os.kill(self.record.pid, signum)
            self.signalled = signum
        except ProcessLookupError:
            pass
        except OSError as error:
            return self._refuse(error.strerror or str(error))
        return True

    def close(self) -> None:
        """Give the pidfd back."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _refuse(self, detail: str) -> bool:
        self.outcome, self.detail = "refused", detail
        return False

    def _conclude(self, runtime_dir: str) -> None:
        """It is gone: as what?"""
        try:
            last = registry.reread(runtime_dir, self.record)
        except OSError as error:
            self.outcome, self.detail = "unknown", str(error)
            return
        if last is None:
            self.outcome = "ended"
        else:
            executed = procfs.lives(last.pid, last.start_time)  # another program
            self.outcome, self.exit_code = last.outcome or ("ended" if executed else "died"), last.exit_code


def named(record: Entry) -> str:
    """A rank as the lines of a drain call it."""
    job = f" job={printable(record.job).replace(' ', '?')}" if record.job else ""
    return f"rank={record.place} pid={record.pid}{job} {printable(record.program)}"


class Selection:
    """Which of the armed ranks are meant: all but this process, or only those of a job, or only these pids."""

    __slots__ = ("job", "pids")

    def __init__(self, job: str | None = None, pids: Sequence[int] = ()) -> None:
        self.job = job
        self.pids = tuple(pids)

    def matches(self, record: Entry) -> bool:
        """Whether this rank is one of them."""
        if record.pid == os.getpid() or record.outcome is not None:
            return False
        return (self.job is None or record.job == self.job) and (not self.pids or record.pid in self.pids)


def would_signal(
    runtime_dir: str, which: Selection, problem: Callable[[str], object] | None = None
) -> list[Entry]:
    """Those whom `drain` would signal and wait for, if it were called now; signals nobody."""
    return [record for record in registry.read(runtime_dir, problem) if which.matches(record)]


def drain(
    runtime_dir: str,
    signum: int,
    timeout: float,
    problem: Callable[[str], object] | None = None,
    which: Selection | None = None,
    killed_after: bool = False,
) -> tuple[list[Drained], bool]:
    """Signal the armed ranks, wait for all; also whether Ctrl-C cut the waiting short.

    Args:
        runtime_dir: folder of the registry.
        signum: for ranks that do not name their own eviction signal.
        timeout: longest wait for all of them together, in seconds.
        problem: hears of a registry that cannot be used, each time that it is looked at.
        which: default all. Those of them that arm meanwhile (a launcher that restarts its workers) are drained, too.
        killed_after: whether somebody kills who is left then. A rank's own grace period begins with its signal; it is
            told that it has no more than this.
    """
    which = which or Selection()
    ranks: dict[str, Drained] = {}
    waiting: list[Drained] = []
    interrupted = False
    began = time.monotonic()
    marker = registry.DrainMarker(runtime_dir)
    try:
        while True:
            found = would_signal(runtime_dir, which, problem)
            new = [record for record in found if record.name not in ranks]
            ranks.update((record.name, Drained(record)) for record in new)
            if new and killed_after:
                marker.tell(list(ranks), began + timeout)
            for rank in [ranks[record.name] for record in new]:
                if rank._start(signum):
                    waiting.append(rank)
            left = max(0.0, timeout - (time.monotonic() - began))
            gone = _wait(waiting, min(left, _POLL)) if waiting else []
            for rank in waiting:
                rank.seconds = time.monotonic() - began
            for rank in gone:
                waiting.remove(rank)
                rank._conclude(runtime_dir)
            if not waiting or not left:
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        marker.close()
        for rank in ranks.values():
            rank.close()
    registry.read(runtime_dir)  # removes the entries of the dead, now that they have been read
    return list(ranks.values()), interrupted


def _wait(ranks: list[Drained], seconds: float) -> list[Drained]:
    """Those of the ranks that are gone, as soon as one is, or after so many seconds."""
    poll = select.poll()
    for rank in ranks:
        if rank._pidfd is not None:
            poll.register(rank._pidfd, select.POLLIN)
    ready = {pidfd for pidfd, _ in poll.poll(seconds * 1000)}
    return [
        rank
        for rank in ranks
        if (rank._pidfd in ready if rank._pidfd is not None else not registry.alive(rank.record))
    ]
