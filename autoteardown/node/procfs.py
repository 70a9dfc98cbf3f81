"""Who a process is, by /proc, so that whoever got a dead rank's pid is never mistaken for it.

A pid alone names nobody: it is reused, and it means one process in this container and another in the next.
A process is named here by its pid, its start time and its *space*: the pid namespace and the kernel's boot.

Where there is no /proc of our own (other systems, or the host's /proc mounted into a container) processes
cannot be told apart: start times are 0 then, and whoever wants to signal a process must leave it alone.
"""

from __future__ import annotations

import os
import time

_boot = ""


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def is_ours() -> bool:
    """Whether /proc exists and shows the pid namespace that this process lives in."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def _fields(pid: int) -> list[bytes]:
    """A /proc/<pid>/stat, from its third field (the state) on: field N is the one at N - 3."""
    stat = _read(f"/proc/{pid}/stat")
    return stat[stat.rindex(b")") + 1 :].split()


def parse_stat(text: bytes) -> tuple[str, int]:
    """The state letter and the start time (field 22, in ticks since boot) of a /proc/<pid>/stat.

    The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    """
    fields = text[text.rindex(b")") + 1 :].split()
    return fields[0].decode("ascii"), int(fields[19])


def start_time(pid: int) -> int | None:
    """The start time of a running process; None when there is none, or only a zombie is left of it."""
    try:
        state, started = parse_stat(_read(f"/proc/{pid}/stat"))
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZXx" else started


def age_and_use(pid: int) -> tuple[float, float] | None:
    """Seconds since a process has started, and of processor time that it has used; None when it has ended."""
    try:
        fields = _fields(pid)
        user, system, started = int(fields[11]), int(fields[12]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
    if fields[0] in b"ZXx":
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / ticks, (user + system) / ticks


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, as far as the kernel tells (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = [int(child) for child in _read(f"/proc/{parent}/task/{thread}/children").split()]
                found += children
                parents += children
        except (OSError, ValueError):
            continue
    return found


def open_files(pid: int) -> list[tuple[str, int]]:
    """Path and flags (of open(2)) of the files that a process has open; those without a path, or deleted, are left out.

    Raises:
        OSError: that cannot be seen (PermissionError), or there is no such process (FileNotFoundError).
    """
    found = []
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            path = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            if path.startswith("/") and not path.endswith(" (deleted)"):
                about = _read(f"/proc/{pid}/fdinfo/{descriptor}").split()
                found.append((path, int(about[about.index(b"flags:") + 1], 8)))
        except (OSError, ValueError, IndexError):
            continue  # closed meanwhile
    return found


def queued(tid: int) -> float:
    """Seconds that a thread of this process has been ready to run while others had the processors; 0 if unknown."""
    try:
        return int(_read(f"/proc/self/task/{tid}/schedstat").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def ancestors(pid: int) -> list[int]:
    """Parent, its parent and so on, as far as can be seen."""
    found: list[int] = []
    while len(found) < 64:
        try:
            pid = int(_fields(pid)[1])
        except (OSError, ValueError, IndexError):
            break
        if pid < 1:
            break
        found.append(pid)
    return found


def name(pid: int) -> str:
    """The name of the program that a process executes, of at most 15 characters; empty if there is none."""
    try:
        return _read(f"/proc/{pid}/comm").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def image(pid: int) -> str:
    """Names what a process executes: where the kernel put its code and its stack, anew and at random with each exec.

    Empty where that cannot be seen.
    """
    try:
        code, _, stack = _fields(pid)[23:26]  # fields 26 and 28
    except (OSError, ValueError, IndexError):
        return ""
    return f"{int(code):x}-{int(stack):x}" if int(stack) else ""


def user(pid: int) -> int | None:
    """The effective uid of a process.

    Not the owner of /proc/<pid>, which is root for a process that may not be dumped.
    """
    try:
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith(b"Uid:"):
                return int(line.split()[2])
    except (OSError, ValueError, IndexError):
        pass
    return None


def lives(pid: int, started: int) -> bool:
    """Whether that very process runs; without /proc, whether any process has the pid."""
    if is_ours():
        return start_time(pid) == started
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def belongs_to_us(pid: int) -> bool:
    """Whether the process runs as this user, as far as can be told."""
    return user(pid) in (os.geteuid(), None)


def space() -> str:
    """Names the set of processes within which a pid means something: the pid namespace and the boot."""
    global _boot
    if not is_ours():
        return "0-0"
    if not _boot:
        try:
            _boot = _read("/proc/sys/kernel/random/boot_id").decode("ascii").strip()[:8]
            int(_boot, 16)
        except (OSError, ValueError):
            _boot = "0"
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{namespace:x}-{_boot}"
