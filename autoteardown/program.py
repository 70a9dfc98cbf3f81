"""Finds out which program this process runs, from the interpreter's command line.

`sys.argv` cannot be used at start-up: under `-m` and `-c` it does not name the program yet.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_WITH_VALUE = "WX"


def command_line(pid: int | None = None) -> list[str]:
    """The full command line of this process, or of another process of this machine; empty if it cannot be read."""
    if pid is None and sys.version_info >= (3, 10):
        return list(sys.orig_argv)
    try:
        with open(f"/proc/{pid or 'self'}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        return []


def parse(argv: Sequence[str]) -> tuple[str, str]:
    """What the interpreter runs: ("-m", module), ("-c", code), ("script", path), or ("", "") when interactive."""
    words = iter(argv[1:])
    for word in words:
        if word == "-" or not word.startswith("-"):
            return ("script", word) if word != "-" else ("", "")
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
            continue
        for place, letter in enumerate(word[1:], 2):
            if letter in "mc":
                return f"-{letter}", word[place:] or next(words, "")
            if letter in _WITH_VALUE:
                if not word[place:]:
                    next(words, None)
                break
    return "", ""


def skipped(patterns: str, argv: Sequence[str] | None = None) -> str | None:
    """The name of this program that one of the comma-separated globs matches, if any does."""
    names = _names(_program() if argv is None else parse(argv))
    for pattern in patterns.split(","):
        for name in names:
            if _matches(name, pattern.strip()):
                return name
    return None


def _program() -> tuple[str, str]:
    """What this process runs; for a child process of multiprocessing, what its parent runs.

    The spawn children of a program are part of it (`torch.multiprocessing.spawn` starts ranks that way), but their own
    command line is only `-c "from multiprocessing.spawn import …"`.
    """
    kind, name = parse(command_line())
    pid = os.getppid()
    while kind == "-c" and name.startswith("from multiprocessing.") and pid > 1:
        argv = command_line(pid)
        if not argv:
            break
        kind, name = parse(argv)
        pid = parent_of(pid)
    return kind, name


def parent_of(pid: int) -> int:
    """The pid of a process's parent; 0 if there is none, or it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _names(program: tuple[str, str]) -> list[str]:
    kind, name = program
    if kind == "-m":
        return [name]
    if kind == "script":
        return [os.path.basename(name), name, os.path.abspath(name)]
    return []


def _matches(name: str, pattern: str) -> bool:
    if not pattern:
        return False
    if not any(letter in pattern for letter in "*?["):
        return name == pattern
    from fnmatch import fnmatchcase  # imports re, so only if a pattern has wildcards

    return fnmatchcase(name, pattern)
