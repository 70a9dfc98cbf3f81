"""A healthy program cannot notice the agent. Each runs with the agent and without, and sees the same."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import AGENT, GRACE, NONE, SIGTERM, needs_torch, wait_until

IMPATIENT = {"AUTOTEARDOWN_GRACE": 8}


@pytest.mark.parametrize(
    "what", ["pause", "real-time", "stand-ins", "stand-ins armed", "wake-up errors", "faulthandler"]
)
def test_it_sees_the_same(job, what):
    """Interrupted calls, a survived signal, functions that are others, errors that are not said."""
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start("innocent.py", what, mode=mode, fresh=True)
        code = rank.wait()
        # Where the main thread was when the wake-up fd could not be written to: not in ours, we are late.
        lines = re.sub(r"Traceback .*\n(  .*\n)+\n", "", rank.stdout + rank.stderr).splitlines()
        seen.append([code, *(re.sub(r"0x[0-9a-f]+|, line \d+", "N", line) for line in lines)])
    assert seen[0] == seen[1]
    assert seen[0][0] == 0, seen


FAULTHANDLER = """
import faulthandler, os, signal, sys, time
import torch.distributed as dist
when = sys.argv[1]
if when in ("before", "unregistered", "noticed"):
    faulthandler.register(signal.SIGTERM)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if when == "after":
    faulthandler.register(signal.SIGTERM)
if when in ("unregistered", "noticed"):
    faulthandler.unregister(signal.SIGTERM)
if when == "noticed":
    import torch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(1100):  # nobody asks: the agent looks now and then
        optimizer.step()
elif when != "before":
    from autoteardown.signals import interception
    print("mended", interception.interceptor.prepare().reclaim(), flush=True)
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("when", ["before", "after", "unregistered", "noticed"])
def test_a_handler_in_c(job, when):
    """`faulthandler.register(SIGTERM)`: it dumps, as the application's own; its `unregister` does not make us deaf."""
    rank = job.start(FAULTHANDLER, when, **IMPATIENT)
    rank.wait_for("ready")
    assert rank.evict(8) == 0, rank.transcript()
    assert rank.stderr.count("Current thread") == (0 if when in ("unregistered", "noticed") else 1), (
        rank.transcript()
    )
    assert rank.report()["outcome"] in ("clean", "partial"), rank.transcript()
    yielded = rank.phase("yield")
    assert (yielded is not None and yielded["outcome"] == "timeout") == (when in ("before", "after"))


DUMPS = """
import faulthandler, os, signal, threading, time
from autoteardown.signals import dispositions

faulthandler.register(signal.SIGUSR1, file=open(os.devnull, "w"))
saved, ours = dispositions.save(signal.SIGUSR1), dispositions.handler_of(signal.SIGUSR1)

def dump():
    for _ in range(200):
        dispositions.run_saved(signal.SIGUSR1, saved, ours)
        time.sleep(0.003)

def deep(depth):
    return depth and deep(depth - 1)

thread = threading.Thread(target=dump)
thread.start()
while thread.is_alive():
    deep(150)
"""


def test_faulthandler_does_not_meet_running_threads():
    """It reads the frames of all threads: called on a thread of ours beside the program's, it crashed the process."""
    done = subprocess.run([sys.executable, "-c", DUMPS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done


def test_signal_first_imported_on_another_thread(job):
    """A rank all the same: what only the main thread can do is done when it comes by."""
    program = job.folder / "early.py"
    program.write_text(
        "import _thread, sys, time\n"
        "assert 'signal' not in sys.modules\n"
        "done = _thread.allocate_lock(); done.acquire()\n"
        "def load():\n"
        "    import torch.distributed as dist\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    done.release()\n"
        "    time.sleep(3600)\n"
        "_thread.start_new_thread(load, ())\n"
        "while not done.acquire(timeout=0.1): pass\n"
        "print('ready', flush=True)\n"
        "time.sleep(3600)\n"
    )
    rank = job.start(str(program), fresh=True, RANK=0, WORLD_SIZE=1)
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert "done: " in rank.log_lines[-1]


@pytest.mark.parametrize("main", ["thread.join()", "time.sleep(3600)", "signal.pause()"])
def test_armed_from_another_thread_while_the_main_one_waits(job, main):
    """No signal of ours gets it out of its wait, and the rank is guarded all the same."""
    rank = job.start(
        f"""
        import signal, threading, time
        import torch, torch.distributed as dist

        def train():
            time.sleep(0.3)
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            print("ready", flush=True)
            while True:
                time.sleep(0.01)

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        {main}
        print("woken", flush=True)
        time.sleep(3600)
        """
    )
    rank.wait_for("ready")
    time.sleep(0.3)
    os.kill(rank.pid, SIGTERM)
    assert rank.outlast() == 0, rank.transcript()
    assert rank.report()["outcome"] == "clean", rank.transcript()


def test_what_a_rank_executes_is_no_rank(job):
    """`os.execv` ends a rank and keeps its pid: `ps` does not list the new program, `drain` does not signal it."""
    rank = job.start(
        """
        import glob, os, sys, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        while not glob.glob(os.environ["AUTOTEARDOWN_RUNTIME_DIR"] + "/*.json"):
            time.sleep(0.01)  # it is written on the side
        print("rank", flush=True)
        os.execv("/bin/sleep", ["sleep", "3600"])
        """,
        fresh=True,
    )
    rank.wait_for("rank")
    wait_until(lambda: b"sleep" in Path(f"/proc/{rank.pid}/cmdline").read_bytes(), "the other program")
    assert [path for path in job.runtime.iterdir() if path.name.startswith(f"{rank.pid}-")]
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(job.runtime)}
    for command in ("ps", "drain"):
        words = [sys.executable, "-m", "autoteardown", command, "--json"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)
        assert (found["ranks"] if isinstance(found, dict) else found) == [], done.stdout
    assert rank.running


GROUPS = """
import os, sys, threading, time
import torch, torch.distributed as dist

def life(number):
    # A store for each, as a framework that restarts its group makes it.
    os.environ["MASTER_PORT"] = str(first + number)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    began = time.monotonic()
    dist.destroy_process_group()
    return time.monotonic() - began

def left():
    # gloo's own threads close theirs some time after a destroy.
    for _ in range(100):
        found = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()
        if found == best:
            break
        time.sleep(0.05)
    return found

first = int(os.environ["MASTER_PORT"])
best = None
life(0)
time.sleep(1)
best = left()
times = sorted(life(number) for number in range(1, 41))
print("same" if left() == best else f"{best} then {left()}", times[20], flush=True)
"""


@needs_torch(2, 6, "with or without the agent, gloo's destructor waits for a thread that waits for the GIL")
def test_groups_that_come_and_go(job):
    """After 41 lives of a group, descriptors and threads are as after the first, and none of them ended slowly."""
    medians = []
    for mode in (AGENT, NONE):
        ranks = job.world(GROUPS, 2, mode=mode, fresh=True)
        for rank in ranks:
            assert rank.wait() == 0, rank.transcript()
            assert rank.stderr == "", rank.transcript()
            said, median = rank.stdout.rsplit(" ", 1)
            assert said == "same", rank.transcript()
        medians.append(float(median))
    assert medians[0] < medians[1] + 0.1  # seconds: a wait of ours would be more


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root folder")
def test_a_rank_that_changes_its_root(job):
    """No module can be imported there, no registry, no /proc: it stops with its peer all the same."""
    (job.folder / "empty").mkdir()
    ranks = job.world(
        """
        import os, sys
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        if dist.get_rank() == 0:
            os.chroot("empty")
            os.chdir("/")
        while True:
            dist.all_reduce(torch.ones(1))
            optimizer.step()
            os.write(1, b"step\\n")
        """,
        2,
    )
    for rank in ranks:
        rank.wait_for("step\\n(.*\\n)*step")
    assert ranks[0].evict() == 0, ranks[0].transcript()
    assert ranks[1].outlast(GRACE) == 143, ranks[1].transcript()
    assert "done: clean, stopped at step" in ranks[0].log_lines[-1], ranks[0].transcript()
    assert ranks[1].report()["outcome"] == "clean", ranks[1].transcript()
