"""Reads facts about processes from /proc, and identifies a process so that a reused pid is never mistaken for it.

1. A pid alone does not identify a process: the kernel reuses pids, and each container counts its own. Here a process is
   identified by its pid, its start time and its *space*: the pid namespace and the kernel's boot.
2. Where /proc does not show this process's own pid namespace (other systems, or the host's /proc mounted into a
   container), processes cannot be told apart. Start times are 0 then, and no process may be signalled.
"""

from __future__ import annotations

import os
import time

from autoteardown import program

_boot = ""


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def available() -> bool:
    """Whether /proc exists and shows the pid namespace of this process."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def _fields(pid: int) -> list[bytes]:
    """The fields of /proc/<pid>/stat from the third (the state) on: field N is at index N - 3."""
    stat = _read(f"/proc/{pid}/stat")
    return stat[stat.rindex(b")") + 1 :].split()


def parse_stat(text: bytes) -> tuple[str, int]:
    """The state letter and the start time (field 22, in ticks since boot) from the text of a /proc/<pid>/stat.

    The second field is the program's name in parentheses, which may itself contain spaces and parentheses.
    """
    fields = text[text.rindex(b")") + 1 :].split()
    return fields[0].decode("ascii"), int(fields[19])


def start_time(pid: int) -> int | None:
    """The start time of a running process; None if there is no such process, or only its zombie."""
    try:
        state, started = parse_stat(_read(f"/proc/{pid}/stat"))
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZXx" else started


def age_and_use(pid: int) -> tuple[float, float] | None:
    """A process's age and the processor time that it has used, in seconds; None if it has ended."""
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
    """The pids of a process's children, their children and so on; zombies are included."""
    listed = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # CONFIG_PROC_CHILDREN
    children_of = _listed_children if listed else _scan().get
    found: list[int] = []
    parents = [pid]
    while parents:
        children = children_of(parents.pop()) or []
        found += children
        parents += children
    return found


def _listed_children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    except (OSError, ValueError):
        pass
    return found


def _scan() -> dict[int, list[int]]:
    """The children of every process, found through all processes' parents, which takes longer."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            found.setdefault(program.parent_of(int(name)), []).append(int(name))
    return found


def open_files(pid: int) -> list[tuple[str, int]]:
    """The paths and open(2) flags of the files that a process has open, without those that are deleted or have no path.

    Raises:
        PermissionError: this user may not see them.
        FileNotFoundError: there is no such process.
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
    """Seconds that a thread of this process has waited for a processor while it could run; 0 if unknown."""
    try:
        return int(_read(f"/proc/self/task/{tid}/schedstat").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def ancestors(pid: int) -> list[int]:
    """The pids of a process's parent, its parent and so on, as far as they can be read."""
    found: list[int] = []
    while len(found) < 64:
        pid = program.parent_of(pid)
        if pid < 1:
            break
        found.append(pid)
    return found


def name(pid: int) -> str:
    """The name of a process's program, at most 15 characters; empty if there is no such process."""
    try:
        return _read(f"/proc/{pid}/comm").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def image(pid: int) -> str:
    """Identifies the program that a process executes, by the random addresses of its code and stack, new at each exec.

    Empty where they cannot be read.
    """
    try:
        code, _, stack = _fields(pid)[23:26]  # fields 26 and 28
    except (OSError, ValueError, IndexError):
        return ""
    return f"{int(code):x}-{int(stack):x}" if int(stack) else ""


def user(pid: int) -> int | None:
    """The effective uid of a process; None if unknown.

    Not the owner of /proc/<pid>: that is root for a process that is not dumpable.
    """
    try:
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith(b"Uid:"):
                return int(line.split()[2])
    except (OSError, ValueError, IndexError):
        pass
    return None


def lives(pid: int, started: int) -> bool:
    """Whether the process with this pid and start time runs; without /proc, whether any process has the pid."""
    if available():
        return start_time(pid) == started
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def same_user(pid: int) -> bool:
    """Whether the process runs as this user; True if unknown."""
    return user(pid) in (os.geteuid(), None)


def space() -> str:
    """Identifies the set of processes in which a pid is unique: the pid namespace and the kernel's boot."""
    global _boot
    if not available():
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
