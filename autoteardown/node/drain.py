"""Drains this node: signals its armed ranks, waits until they have exited, and collects their outcomes.

1. It is for parents that forward no signal to the ranks: raylet, which SIGKILLs its actors, or a shell as PID 1.
2. A rank is signalled through a pidfd that is opened before the rank's identity is checked. So the signal cannot reach
   another process that has got the same pid meanwhile: the pidfd refers to the process that was checked, or to none.
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
"""Seconds to wait beyond a grace period, because a rank's own clock starts when it gets its signal."""

# Ranks in these states are stopping already. A second signal could reach a rank in the last moments of its interpreter,
# when the default action, with another exit code, is back in force.
_STOPPING = ("yielding", "stopping", "parked", "leaving", "left")
_POLL = 0.1


class Drained:
    """The result of draining one rank.

    `outcome` is that of the rank's own teardown (`clean`, `partial`, `aborted`, `forced`), or one of these. `ended`:
    the rank removed its entry, as at the normal end of a job. `died`: it left its entry without an outcome. `unknown`:
    it has exited, and its entry cannot be read. `running`: it still runs. `refused`: it could not be signalled.
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
        """Whether the rank stopped cleanly or ended by itself."""
        return self.outcome in ("clean", "ended")

    def line(self) -> str:
        """The result as one line for a log."""
        words = {
            "ended": "ended on its own",
            "died": "died without a teardown",
            "unknown": f"exited, and its outcome is unknown: {self.detail}",
            "running": "still running",
            "refused": f"not signalled: {self.detail}",
        }.get(self.outcome) or printable(f"{self.outcome} ({self.detail})" if self.detail else self.outcome)
        code = "" if self.exit_code is None else f", exit {self.exit_code}"
        return f"{describe(self.record)}: {words}{code} ({self.seconds:.2f}s)"

    def _start(self, signum: int) -> bool:
        """Signal the rank; return whether its exit has to be waited for."""
        try:
            self._pidfd = os.pidfd_open(self.record.pid)
        except (AttributeError, OSError):  # an old kernel, gVisor or seccomp; or the process has exited
            self._pidfd = None
        if not procfs.available():
            return self._refuse("/proc does not show this pid namespace, so the pid could be any process")
        if not registry.alive(self.record):
            self.close()  # the pidfd may refer to another process
            return True
        if self.record.state in _STOPPING:
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
        """Close the pidfd."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _refuse(self, detail: str) -> bool:
        self.outcome, self.detail = "refused", detail
        return False

    def _conclude(self, runtime_dir: str) -> None:
        """Read the outcome of a rank that has exited."""
        try:
            last = registry.reread(runtime_dir, self.record)
        except OSError as error:
            self.outcome, self.detail = "unknown", str(error)
            return
        if last is None:
            self.outcome = "ended"
        else:
            executed = procfs.lives(last.pid, last.start_time)  # the process now runs another program
            self.detail = last.why
            self.outcome, self.exit_code = last.outcome or ("ended" if executed else "died"), last.exit_code


def describe(record: Entry) -> str:
    """A rank's name in the lines of a drain."""
    job = f" job={printable(record.job).replace(' ', '?')}" if record.job else ""
    return f"rank={record.place} pid={record.pid}{job} {printable(record.program)}"


class Selection:
    """Selects armed ranks: all except this process, or only those of a job, or only some pids."""

    __slots__ = ("job", "pids")

    def __init__(self, job: str | None = None, pids: Sequence[int] = ()) -> None:
        self.job = job
        self.pids = tuple(pids)

    def matches(self, record: Entry) -> bool:
        """Whether this rank is selected."""
        if record.pid == os.getpid() or record.outcome is not None:
            return False
        return (self.job is None or record.job == self.job) and (not self.pids or record.pid in self.pids)


def would_signal(
    runtime_dir: str, selection: Selection, problem: Callable[[str], object] | None = None
) -> list[Entry]:
    """The ranks that `drain` would signal and wait for now; signals none."""
    return [record for record in registry.read(runtime_dir, problem) if selection.matches(record)]


def drain(
    runtime_dir: str,
    signum: int,
    timeout: float,
    problem: Callable[[str], object] | None = None,
    selection: Selection | None = None,
    killed_after: bool = False,
    longer: bool = False,
    seen: Sequence[Entry] = (),
) -> tuple[list[Drained], bool]:
    """Signal the armed ranks and wait until all have exited.

    Args:
        runtime_dir: folder of the registry.
        signum: the signal for ranks whose entries do not name one.
        timeout: longest wait for all of them together, in seconds.
        problem: called with one line each time that the registry is read and cannot be used.
        selection: default: all. Selected ranks that arm meanwhile are drained, too: a launcher may restart its workers.
        killed_after: whether the remaining ranks will be killed after the timeout. A rank's own grace period begins
            with its signal, so the ranks are told that they have no more time than this.
        longer: the machine ends after the timeout, and not before, so the ranks are told that they have all this time,
            even if it is more than their grace period.
        seen: entries that the caller has read before, and has kept with a marker of its own. These ranks are part of
            the drain, too, if they have exited meanwhile or are not selected any more, unless they ended on their own.

    Returns:
        The result for each rank, and whether Ctrl-C ended the wait.
    """
    selection = selection or Selection()
    ranks: dict[str, Drained] = {}
    waiting: list[Drained] = []
    interrupted = False
    began = time.monotonic()
    kept = _still_there(runtime_dir, seen)
    marker = registry.DrainMarker(runtime_dir)
    try:
        while True:
            found = would_signal(runtime_dir, selection, problem)
            names = {record.name for record in found}
            found += [record for record in kept if record.name not in names]
            new = [record for record in found if record.name not in ranks]
            ranks.update((record.name, Drained(record)) for record in new)
            if new and longer:
                # Not those that are stopping already: each announcement stands for one signal of this drain.
                signalled = [name for name, rank in ranks.items() if rank.record.state not in _STOPPING]
                marker.announce(signalled, began + timeout, longer=True)
            elif new and killed_after:
                marker.announce(list(ranks), began + timeout)
            for rank in [ranks[record.name] for record in new]:
                if rank._start(signum):
                    waiting.append(rank)
            left = max(0.0, timeout - (time.monotonic() - began))
            exited = _wait(waiting, min(left, _POLL)) if waiting else []
            for rank in waiting:
                rank.seconds = time.monotonic() - began
            for rank in exited:
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
    registry.read(runtime_dir)  # removes the entries of dead ranks, which have been read now
    return list(ranks.values()), interrupted


def _still_there(runtime_dir: str, seen: Sequence[Entry]) -> list[Entry]:
    """These entries as they are now, without those that their ranks have removed."""
    found = []
    for record in seen:
        try:
            found.append(registry.reread(runtime_dir, record))
        except OSError:
            pass
    return [record for record in found if record is not None]


def _wait(ranks: list[Drained], seconds: float) -> list[Drained]:
    """Wait until one of the ranks has exited, at most so many seconds; return those that have."""
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
