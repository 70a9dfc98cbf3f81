"""Limits how many more threads this process can start, as a container's PID limit does.

`LIMIT=rlimit:N` sets RLIMIT_NPROC (which does not bind root: the process becomes a user of its own); `LIMIT=cgroup:N`
uses a pids cgroup. N threads are left.
"""

import os
import resource
import threading
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def hierarchy():
    """Where a pids cgroup can be made; None where it cannot."""
    first, second = CGROUPS / "pids", CGROUPS / "cgroup.subtree_control"
    if (first / "cgroup.procs").exists():
        return first
    return CGROUPS if second.exists() and "pids" in second.read_text().split() else None


def rlimit(spare):
    user = 20000 + os.getpid()  # nobody else's, whatever runs beside
    os.setuid(user)
    of_user = (
        pid for pid in os.listdir("/proc") if pid.isdecimal() and os.stat(f"/proc/{pid}").st_uid == user
    )
    threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in of_user)
    resource.setrlimit(resource.RLIMIT_NPROC, (threads + spare,) * 2)


def cgroup(spare):
    group = hierarchy() / f"autoteardown-test-{os.getpid()}"
    group.mkdir(exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    (group / "pids.max").write_text(str(int((group / "pids.current").read_text()) + spare))


def remove_cgroups(pids):
    """Remove the cgroups of processes that have ended."""
    for pid in pids:
        group = hierarchy() / f"autoteardown-test-{pid}" if hierarchy() else None
        if group is not None and group.exists():
            group.rmdir()


def limit():
    """Set the limit that LIMIT names, and show that it holds."""
    how, _, spare = os.environ.get("LIMIT", "").partition(":")
    if not how:
        return
    for _ in range(20):  # a thread that was counted may have ended since
        {"rlimit": rlimit, "cgroup": cgroup}[how](int(spare))
        if threads_left(int(spare) + 1) == int(spare):
            print("limited", flush=True)
            return
    raise SystemExit("no limit here")


def threads_left(most):
    """How many threads can be started, up to so many."""
    go_on, started = threading.Event(), []
    try:
        for _ in range(most):
            thread = threading.Thread(target=go_on.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    go_on.set()
    for thread in started:
        thread.join()
    return len(started)
