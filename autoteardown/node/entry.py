"""One entry of the registry: its name, and what its content is worth.

The name is the identity of its process: `<pid>-<start time>-<pid namespace>-<boot>.json`. So

- whether an entry is alive is known without believing anything that is written in it;
- no other process ever has the same name: removing a dead one's entry cannot hit a living one's, and
  containers that share the folder (a hostPath volume) neither see nor overwrite each other's.
"""

from __future__ import annotations

import json
import os
import time

from autoteardown.node import procfs, safe_folder

TYPE_CHECKING = False  # typing costs an import
if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER = "drain-"
"""What the name of a drain's marker begins with; the rest of it is an identity too."""


class Entry:
    """An entry as it was read: whatever of it has the right type, for the file may say anything."""

    __slots__ = (
        "age",
        "alone",
        "armed_at",
        "backend",
        "exit_code",
        "host",
        "image",
        "job",
        "local_rank",
        "name",
        "outcome",
        "pid",
        "program",
        "rank",
        "signal",
        "start_time",
        "state",
        "world_size",
    )

    def __init__(self, name: str, pid: int, start_time: int, fields: Mapping[str, object]) -> None:
        """Use `load`."""
        self.name = name
        self.pid = pid
        self.start_time = start_time
        self.rank = whole(fields.get("rank"))
        self.local_rank = whole(fields.get("local_rank"))
        self.world_size = whole(fields.get("world_size"))
        self.backend = text(fields.get("backend"))
        self.job = text(fields.get("job"))
        self.host = text(fields.get("host"))
        self.program = text(fields.get("program"))
        self.state = text(fields.get("state")) or "armed"
        # Why its peers cannot be told now; empty: they can; None: unknown.
        self.alone = text(fields.get("alone"))
        self.outcome = text(fields.get("outcome"))
        self.exit_code = whole(fields.get("exit_code"))
        self.signal = whole(fields.get("signal"))
        self.image = text(fields.get("image")) or ""
        armed_at = plain(fields.get("armed_at"))
        self.armed_at = float(armed_at) if isinstance(armed_at, (int, float)) else 0.0
        self.age = max(0.0, time.time() - self.armed_at) if self.armed_at else 0.0

    @property
    def place(self) -> str:
        """As `3/16`; a rank that is still in rendezvous may not know its number."""
        rank, world = ("?" if number is None else number for number in (self.rank, self.world_size))
        return f"{rank}/{world}"


def own_name() -> str:
    """The name of this process's entry."""
    return name_of(os.getpid())


def name_of(pid: int) -> str:
    """The name of a process's entry."""
    started = procfs.start_time(pid) if procfs.is_ours() else None
    return f"{pid}-{started or 0}-{procfs.space()}.json"


def identity(name: str) -> tuple[int, int] | None:
    """Pid and start time in the name of an entry, a marker or a temporary file of this space."""
    stem, found, _ = name.lstrip(".").partition(".json")
    tail = f"-{procfs.space()}"
    if not found or not stem.endswith(tail) or len(name) > 200:
        return None
    pid, _, started = stem[: -len(tail)].replace(MARKER, "", 1).partition("-")
    digits = pid + started
    return (int(pid), int(started)) if pid and started and digits.isascii() and digits.isdigit() else None


def load(descriptor: int, name: str) -> Entry | None:
    """The entry of that name in the opened folder; None when it is missing, or not an entry at all."""
    named = identity(name)
    if named is None:
        return None
    try:
        fields = json.loads(safe_folder.read(descriptor, name))
        return Entry(name, *named, fields) if isinstance(fields, dict) else None
    except (OSError, ValueError, OverflowError, RecursionError):
        return None


def plain(value: object) -> str | int | float | None:
    """What json writes and reads back as it is, no longer than an entry needs."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # neither infinite nor NaN
    return str(value)[:1000]


def printable(said: str | None) -> str:
    """For people: names come from files and command lines, and must not steer a terminal or forge a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in said or "-")


def whole(value: object) -> int | None:
    """The value if it is a whole number that anything else can hold, too."""
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if fits else None  # type: ignore[return-value]


def text(value: object) -> str | None:
    """The value if it is text, and no more of it than anybody needs."""
    return value[:1000] if isinstance(value, str) else None
