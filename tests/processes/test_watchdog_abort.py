"""What `abort()` on another thread does to a process that is exiting."""

import signal

import pytest
from harness import NONE

PROGRAM = """
import ctypes, os, sys, threading, time
from autoteardown.process_groups import watchdog_abort
from autoteardown.stop.posix_timer import HardDeadlineTimer

signal_handler = __import__("signal").signal
signal_handler(__import__("signal").SIGUSR1, lambda *_: None)
if {held}:
    assert watchdog_abort.hold_off()
abort = ctypes.CDLL(None).abort if {c} else os.abort  # without the GIL, or with it
if not {c}:
    HardDeadlineTimer().arm(1, 7)
threading.Thread(target=abort, daemon=True).start()
time.sleep(0.3)
for _ in range(5):
    os.kill(os.getpid(), __import__("signal").SIGUSR1)
    time.sleep(0.05)
if {main}:
    HardDeadlineTimer().arm(0.3, 7)
    abort()
os._exit(7)
"""


@pytest.mark.parametrize("c", [True, False])
@pytest.mark.parametrize("main", [False, True])
def test_the_exit_code_stays(job, main, c):
    """Whichever thread aborts, the main one too, and whatever signals come meanwhile; with the GIL, by the fuse."""
    rank = job.start(PROGRAM.format(held=True, main=main, c=c), mode=NONE)
    assert rank.wait() == 7, rank.transcript()


def test_without_it(job):
    """The control."""
    rank = job.start(PROGRAM.format(held=False, main=False, c=True), mode=NONE)
    assert rank.wait() == -signal.SIGABRT, rank.transcript()


def test_whatever_our_own_code_waits_for(job):
    """The POSIX timer is armed first: on a starved machine any hand-over of the GIL may be the last."""
    rank = job.start(
        """
        import time
        import torch.distributed as dist
        from autoteardown.frameworks import ray
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        ray.cancel_abort = lambda: time.sleep(3600)
        print("ready", flush=True)
        time.sleep(3600)
        """,
        AUTOTEARDOWN_GRACE=4,
    )
    rank.wait_for("ready")
    assert rank.evict(grace=8) == 0, rank.transcript()
    assert rank.log_lines == [], rank.transcript()  # nobody got to say anything


def test_an_exit_while_our_thread_is_in_cpp(job):
    """A thread that returns from C++ to an interpreter that has shut down aborts: none of the agent's does by then."""
    rank = job.start(
        """
        import datetime, os, signal, time
        import torch.distributed as dist
        from autoteardown.process_groups import operations
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        going = []

        def progress(others=()):  # in C++, without the GIL, nearly all the time
            for _ in range(200):
                going.append(1)
                try:
                    store.wait(["never"], datetime.timedelta(milliseconds=2))
                except Exception:
                    pass

        operations.progress = progress

        def leave(signum, frame):
            seen = len(going)
            while len(going) < seen + 3:
                time.sleep(0.001)
            raise SystemExit(5)

        signal.signal(signal.SIGTERM, leave)
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
        """,
        AUTOTEARDOWN_GRACE=20,
    )
    rank.wait_for("ready")
    assert rank.evict(grace=20) == 5, rank.transcript()
    assert "terminate called" not in rank.stderr
