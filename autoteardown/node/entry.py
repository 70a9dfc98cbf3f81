"""One entry of the node's registry: makes and parses its file name, and validates its content.

The name identifies its process: `<pid>-<start time>-<pid namespace>-<boot>.json`. So:

1. Whether the process of an entry runs is known without trusting the content.
2. No two processes have the same name. Removing the entry of a dead process cannot remove that of a running one, and
   containers that share the folder (a hostPath volume) neither see nor overwrite each other's entries.
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
"""The prefix of the name of a drain's marker; the rest of the name identifies a process, too."""


class Entry:
    """An entry as read from its file. Fields of the wrong type are dropped, because the file may contain anything."""

    __slots__ = (
        "age",
        "alone",
        "armed_at",
        "backend",
        "exit_code",
        "failed",
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
        "why",
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
        # Why the rank cannot reach its peers; empty: it can; None: unknown.
        self.alone = text(fields.get("alone"))
        self.outcome = text(fields.get("outcome"))
        self.exit_code = whole(fields.get("exit_code"))
        self.failed = fields.get("failed") is True
        self.why = text(fields.get("why")) or ""  # the outcome is not "clean"
        self.signal = whole(fields.get("signal"))
        self.image = text(fields.get("image")) or ""
        armed_at = plain(fields.get("armed_at"))
        self.armed_at = float(armed_at) if isinstance(armed_at, (int, float)) else 0.0
        self.age = max(0.0, time.time() - self.armed_at) if self.armed_at else 0.0

    @property
    def place(self) -> str:
        """Rank and world size as `3/16`; a rank that is still in rendezvous may not know them."""
        rank, world = ("?" if number is None else number for number in (self.rank, self.world_size))
        return f"{rank}/{world}"


def own_name() -> str:
    """The name of this process's entry."""
    return name_of(os.getpid())


def name_of(pid: int) -> str:
    """The name of a process's entry."""
    started = procfs.start_time(pid) if procfs.available() else None
    return f"{pid}-{started or 0}-{procfs.space()}.json"


def identity(name: str) -> tuple[int, int] | None:
    """The pid and start time in the name of an entry, a marker or a temporary file; None if it is not of this space."""
    stem, found, _ = name.lstrip(".").partition(".json")
    tail = f"-{procfs.space()}"
    if not found or not stem.endswith(tail) or len(name) > 200:
        return None
    pid, _, started = stem[: -len(tail)].replace(MARKER, "", 1).partition("-")
    digits = pid + started
    return (int(pid), int(started)) if pid and started and digits.isascii() and digits.isdigit() else None


def load(descriptor: int, name: str) -> Entry | None:
    """Read the entry of that name in the opened folder; None if it is missing, or is no entry."""
    process = identity(name)
    if process is None:
        return None
    try:
        fields = json.loads(safe_folder.read(descriptor, name))
        return Entry(name, *process, fields) if isinstance(fields, dict) else None
    except (OSError, ValueError, OverflowError, RecursionError):
        return None


def plain(value: object) -> str | int | float | None:
    """The value if JSON can hold it unchanged; other objects as text of at most 1,000 characters."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # neither infinite nor NaN
    return str(value)[:1000]


def printable(name: str | None) -> str:
    """The name without control characters: it comes from a file or a command line, and could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name or "-")


def whole(value: object) -> int | None:
    """The value if it is an integer of at most 64 bits; else None."""
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if fits else None  # type: ignore[return-value]


def text(value: object) -> str | None:
    """The first 1,000 characters of the value if it is text; else None."""
    return value[:1000] if isinstance(value, str) else None
