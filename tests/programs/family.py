"""A rank with a child. `family.py KIND`: prints `child PID`, then what became of the child, and trains on.

KIND  fork, early (forked before init), spawn, forkserver (multiprocessing), popen
"""

import multiprocessing
import os
import subprocess
import sys
import time


def say(*words):
    """One line in one write: several processes print here."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def child():
    """A helper that works in Python, and has no torch."""
    say("child up", os.getpid())
    while True:
        time.sleep(0.01)


def start(kind):
    """Start it; return its pid and a function that waits for it."""
    if kind in ("fork", "early"):
        pid = os.fork()
        if pid == 0:
            child()
        return pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if kind == "popen":
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; print('child up', flush=True); time.sleep(3600)"]
        )
        return process.pid, process.wait
    process = multiprocessing.get_context(kind).Process(target=child)
    process.start()

    def wait():
        process.join()
        return process.exitcode

    return process.pid, wait


if __name__ == "__main__":
    import torch.distributed as dist

    kind = sys.argv[1]
    if kind == "early":
        pid, wait = start(kind)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if kind != "early":
        pid, wait = start(kind)
    say("child", pid)
    say("it ended with", wait())
    say("group", dist.is_initialized())
    while True:
        time.sleep(0.01)
