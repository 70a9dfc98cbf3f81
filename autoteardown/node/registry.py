"""The armed processes of this node: one small file each, in a folder that only their user can write.

What a rank came to is lost with its process, whose exit code only its parent can read. So a rank leaves its
entry behind, with the outcome in it, while a drain has put up its marker; otherwise it removes it. Whoever is
killed on the way leaves a file whose name is dead (see `record.py`), and the next reader removes that.
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
    """While it is up, ranks that leave let their entries stay, for the drain to read and to remove."""

    def __init__(self, runtime_dir: str) -> None:
        """Put it up if the folder can be written; a drain without it only learns less."""
        self._path = safe_folder.absolute(runtime_dir)
        self._name = MARKER + own_name()
        self._act(lambda descriptor: safe_folder.replace(descriptor, self._name, b"{}"))

    def tell(self, names: Sequence[str], until: float) -> None:
        """Write into it, before they are signalled, when the processes of these entries will be killed.

        Args:
            names: of the entries.
            until: on the clock of `time.monotonic`, which all processes of a machine share.
        """
        content = json.dumps({"until": until, "ranks": list(names)}).encode("ascii")
        self._act(lambda descriptor: safe_folder.replace(descriptor, self._name, content))

    def close(self) -> None:
        """Take it down."""
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
    """The living ranks of this user and pid namespace. What is certainly dead is removed on the way."""
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
        say(problem, reason(runtime_dir, error))
        return []
    ours = [record for record in records if record is not None and _is_still(record)]
    return sorted(ours, key=lambda record: (record.rank is None, record.rank or 0, record.pid))


def reread(runtime_dir: str, record: Entry) -> Entry | None:
    """What the entry says now, whether its process lives or not; None when it was removed.

    Raises OSError when that cannot be told: the folder is no longer to be trusted, or the file is no entry.
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
    """How many entries belong to other pid namespaces or boots: to containers that share the folder."""
    try:
        names = os.listdir(safe_folder.absolute(runtime_dir))
    except OSError:
        return 0
    ours = f"-{procfs.space()}.json"
    return sum(
        n.endswith(".json") and not n.endswith(ours) and not n.startswith((".", MARKER)) for n in names
    )


def alive(record: Entry) -> bool:
    """Whether the very process that wrote the entry runs, as this user, and runs the same program."""
    return procfs.lives(record.pid, record.start_time) and _is_still(record)


def _is_still(record: Entry) -> bool:
    """Whether that process is this user's, and has not executed another program since."""
    image = procfs.image(record.pid) if record.image else ""
    return image in ("", record.image) and procfs.belongs_to_us(record.pid)


def state_of(runtime_dir: str, pid: int) -> str | None:
    """The state of one armed process; None when it is none. A few system calls, for whoever asks often."""
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
    """Remove what dead processes have left; return the names of all files of living ones."""
    identities = {name: identity(name) for name in os.listdir(descriptor)}
    known = {name: procfs.lives(*named) for name, named in identities.items() if named is not None}
    living = [name for name in known if known[name]]
    if not any(name.startswith(MARKER) for name in living):  # a drain has yet to read the entries of the dead
        for name in known:
            if not known[name]:
                safe_folder.remove(descriptor, name)
    return living


def markers(descriptor: int) -> list[str]:
    """The names of the markers of drains that go on."""
    markers = {name: identity(name) for name in os.listdir(descriptor) if name.startswith(MARKER)}
    return [name for name, drain in markers.items() if drain is not None and procfs.lives(*drain)]


def told(descriptor: int, marker: str, name: str) -> float | None:
    """What that drain has told the process with this entry."""
    try:
        content = json.loads(safe_folder.read(descriptor, marker))
        until = plain(content["until"])
        return float(until) if name in content["ranks"] and isinstance(until, (int, float)) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # it has just been taken down, or tells nothing


def reason(runtime_dir: str, error: Exception) -> str:
    """Why the registry is of no use, in words."""
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"the registry folder {runtime_dir!r} is not used: {detail}"


def say(problem: Problem | None, line: str) -> None:
    """Tell whoever wants to hear of it; never raises."""
    if problem is not None:
        try:
            problem(line)
        except Exception:
            pass
