"""The node's registry of armed ranks: one small file for each rank, in a folder that only their user can write to.

1. Only the parent of a process can read its exit code, so the outcome of a rank would be lost with its process. While a
   drain's marker exists, a rank leaves its entry behind with the outcome in it; otherwise it removes its entry.
2. A rank that is killed leaves a file whose name says that its process is dead (see `entry.py`). The next reader
   removes the file.
"""

from __future__ import annotations

import json
import os

from autoteardown.node import procfs, safe_folder
from autoteardown.node.entry import MARKER, Entry, identity, load, name_of, own_name, plain

TYPE_CHECKING = False  # typing costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Problem = Callable[[str], object]


class DrainMarker:
    """A file that tells ranks to leave their entries when they exit, for the drain to read and to remove."""

    def __init__(self, runtime_dir: str) -> None:
        """Create the marker if the folder is writable. Without it, the drain only learns less."""
        self._path = safe_folder.absolute(runtime_dir)
        self._name = MARKER + own_name()
        self._act(lambda descriptor: safe_folder.replace(descriptor, self._name, b"{}"))

    def announce(self, names: Sequence[str], until: float, longer: bool = False) -> None:
        """Write into the marker when ranks will be killed; call this before they are signalled.

        Args:
            names: of their entries.
            until: on the clock of `time.monotonic`, which all processes of a machine share.
            longer: the ranks have all this time, even if it is more than their grace period.
        """
        content = json.dumps({"until": until, "ranks": list(names), "longer": longer}).encode("ascii")
        self._act(lambda descriptor: safe_folder.replace(descriptor, self._name, content))

    def close(self) -> None:
        """Remove the marker."""
        self._act(lambda descriptor: safe_folder.remove(descriptor, self._name))

    def _act(self, act: Callable[[int], None]) -> None:
        try:
            descriptor = safe_folder.open_own(self._path)
            try:
                act(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            pass


def read(runtime_dir: str, problem: Problem | None = None) -> list[Entry]:
    """The entries of this user's running ranks in this pid namespace, by rank; removes entries of dead processes.

    Args:
        runtime_dir: the registry's folder.
        problem: called with one line if the folder cannot be used; the list is empty then.
    """
    try:
        descriptor = safe_folder.open_own(safe_folder.absolute(runtime_dir))
        try:
            living = [name for name in sweep(descriptor) if not name.startswith((".", MARKER))]
            records = [load(descriptor, name) for name in living]
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return []
    except OSError as error:
        notify(problem, reason(runtime_dir, error))
        return []
    ranks = [record for record in records if record is not None and _is_same_program(record)]
    return sorted(ranks, key=lambda record: (record.rank is None, record.rank or 0, record.pid))


def reread(runtime_dir: str, record: Entry) -> Entry | None:
    """Read an entry again, whether its process runs or not; None if it has been removed.

    Raises:
        OSError: the folder is not safe any more, or the file is no entry.
    """
    descriptor = safe_folder.open_own(safe_folder.absolute(runtime_dir))
    try:
        found = load(descriptor, record.name)
        if found is None and record.name in os.listdir(descriptor):
            raise OSError("not an entry")
        return found
    finally:
        os.close(descriptor)


def elsewhere(runtime_dir: str) -> int:
    """The number of entries of other pid namespaces or boots, that is, of containers that share the folder."""
    try:
        names = os.listdir(safe_folder.absolute(runtime_dir))
    except OSError:
        return 0
    suffix = f"-{procfs.space()}.json"
    return sum(
        n.endswith(".json") and not n.endswith(suffix) and not n.startswith((".", MARKER)) for n in names
    )


def alive(record: Entry) -> bool:
    """Whether the process that wrote the entry runs, as this user, and still runs the same program."""
    return procfs.lives(record.pid, record.start_time) and _is_same_program(record)


def _is_same_program(record: Entry) -> bool:
    """Whether the process is this user's, and has not executed another program since."""
    image = procfs.image(record.pid) if record.image else ""
    return image in ("", record.image) and procfs.same_user(record.pid)


def state_of(runtime_dir: str, pid: int) -> str | None:
    """The state of one armed process; None if it is not armed. Takes a few system calls, so it may be called often."""
    try:
        descriptor = safe_folder.open_own(safe_folder.absolute(runtime_dir))
        try:
            record = load(descriptor, name_of(pid))
        finally:
            os.close(descriptor)
    except Exception:
        return None
    return record.state if record is not None else None


def sweep(descriptor: int) -> list[str]:
    """Remove the files of dead processes, unless a drain will read them; return the names of the other files."""
    identities = {name: identity(name) for name in os.listdir(descriptor)}
    known = {name: procfs.lives(*process) for name, process in identities.items() if process is not None}
    living = [name for name in known if known[name]]
    if not any(name.startswith(MARKER) for name in living):
        for name in known:
            if not known[name]:
                safe_folder.remove(descriptor, name)
    return living


def markers(descriptor: int) -> list[str]:
    """The names of the markers of drains that are in progress."""
    markers = {name: identity(name) for name in os.listdir(descriptor) if name.startswith(MARKER)}
    return [name for name, drain in markers.items() if drain is not None and procfs.lives(*drain)]


def kill_time(descriptor: int, marker: str, name: str) -> tuple[float, bool] | None:
    """When the process with this entry is killed after the drain with this marker; None: not announced.

    The second value tells whether the process has all this time, even if it is more than its grace period.
    """
    try:
        content = json.loads(safe_folder.read(descriptor, marker))
        until, longer = plain(content["until"]), content.get("longer") is True
        return (
            (float(until), longer) if name in content["ranks"] and isinstance(until, (int, float)) else None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # the marker has just been removed, or announces nothing


def reason(runtime_dir: str, error: Exception) -> str:
    """One line for a log: why the registry cannot be used."""
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"the registry folder {runtime_dir!r} is not used: {detail}"


def notify(problem: Problem | None, line: str) -> None:
    """Call `problem` with the line if it is given; never raises."""
    if problem is not None:
        try:
            problem(line)
        except Exception:
            pass
