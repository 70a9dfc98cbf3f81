"""One rank is evicted, in whatever state the signal finds it. `AUTOTEARDOWN_PEERS=off` where its peers must stay."""

import contextlib
import itertools
import os
import signal
import time

import pytest
from harness import AGENT, GRACE, HANDWRITTEN, NONE, SHORT, SIGTERM, TORCH, alive, stat, wait_until
from namespaces import in_pid_namespace

# All the bounds of a wedged rank: it parks, drains and leaves within them, far from the hard deadline.
ALONE = {"AUTOTEARDOWN_PEERS": "off"}


def test_two_ranks_in_mid_training(job):
    """SIGTERM to both in mid-training: exit 0 from both, the group destroyed, under 2 s after the signal."""
    ranks = job.world("train.py")
    for rank in ranks:
        rank.wait_for("step 3$")
    for rank in ranks:
        rank.signal()
    for rank in ranks:
        assert rank.outlast() == 0, rank.transcript()
        report = rank.report()
        assert report["outcome"] == "clean"
        assert rank.phase("destroy")["outcome"] == "ok", report
        assert rank.phase("exit")["start"] < 2, report
        assert rank.noise == []


def test_two_ranks_without_peers(job):
    """The same with AUTOTEARDOWN_PEERS=off: each rank sees to itself alone."""
    ranks = job.world("train.py", **ALONE)
    for rank in ranks:
        rank.wait_for("step 3$")
    for rank in ranks:
        rank.signal()
    assert [rank.outlast() for rank in ranks] == [0, 0], ranks[0].transcript() + ranks[1].transcript()
    for rank in ranks:
        assert rank.report()["cause"] == "signal"


@pytest.mark.parametrize("mode", [AGENT, HANDWRITTEN])
def test_blocked_in_a_collective(job, mode):
    """Rank 0 in an `all_reduce` that its peer never joins leaves in time; the hand-written one does not."""
    grace = GRACE if mode == AGENT else SHORT
    stuck, peer = job.world("stuck.py", mode=mode, **ALONE)
    peer.wait_for("ready")
    stuck.wait_blocked("ready")
    code = stuck.evict(grace)
    if mode == HANDWRITTEN:
        assert code == -signal.SIGKILL, stuck.transcript()
        return
    assert code == 0, stuck.transcript()
    report = stuck.report()
    assert report["outcome"] == "aborted"
    assert stuck.phase("park")["outcome"] == "timeout"
    # "within drain + destroy time-outs": 5 s each of the default 25, scaled down with the grace period.
    assert stuck.phase("exit")["start"] < 10 / 24 * (GRACE - 1) + 1, report
    assert "all_reduce" in str(report["stuck"])
    assert peer.running, peer.transcript()


@pytest.mark.parametrize("mode", [AGENT, HANDWRITTEN])
@pytest.mark.parametrize("missing", [0, 1], ids=["store's host", "peer"])
def test_waiting_for_a_peer_in_init(job, mode, missing):
    """Inside `init_process_group` waiting for a peer, exit within 1 s."""
    if mode == HANDWRITTEN and missing == 0 and TORCH < (2, 5):
        pytest.skip("this torch waits for the store's host where a signal is handled")
    grace = GRACE if mode == AGENT else SHORT
    (rank,) = job.world("rendezvous.py", mode=mode, missing=[missing])
    rank.wait_blocked("joining")
    code = rank.evict(grace)
    if mode == HANDWRITTEN:
        assert code == -signal.SIGKILL, rank.transcript()
        return
    assert code == 0, rank.transcript()
    assert rank.seconds < 3, rank.transcript()  # 1 s, and room for a busy machine


def test_half_built_world(job):
    """In `new_group` while a peer does not come, after a first group was built."""
    first, _ = job.world(
        """
        import time
        import torch.distributed as dist

        dist.init_process_group("gloo")
        print("ready", flush=True)
        if dist.get_rank() == 0:
            dist.new_group([0, 1])
        while True:
            time.sleep(0.01)
        """,
        **ALONE,
    )
    first.wait_blocked("ready")
    assert first.evict() == 0, first.transcript()


STATES = {
    "sleeping": "time.sleep(3600)",
    "computing in Python": "while True: sum(range(1000))",
    "computing in C": "while True: torch.randn(400, 400) @ torch.randn(400, 400)",
    "in a long regular expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "joining a thread": "t = threading.Thread(target=time.sleep, args=[3600]); t.start(); t.join()",
    "waiting for a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "waiting for a child": "import subprocess; subprocess.run(['sleep', '3600'])",
    "in an except that swallows": """
while True:
    try:
        time.sleep(3600)
    except BaseException:
        pass
""",
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_the_main_thread(job, state):
    """From a signal in any state the process ends inside the grace period with the right code."""
    rank = job.start(
        "import threading, time, torch\n"
        "import torch.distributed as dist\n"
        "store = dist.HashStore()\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "print('ready', flush=True)\n" + STATES[state] + "\n"
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert rank.report()["exit_code"] == 0


@pytest.mark.parametrize("where", ["before torch", "before init", "after destroy"])
def test_no_rank_dies_as_without_us(job, where):
    """A process that has no group is not a rank: the default action ends it (Megatron-Bridge#5975, stale handler)."""
    rank = job.start(
        """
        import sys, time
        if sys.argv[1] == "before torch":
            print("ready", flush=True)
            time.sleep(3600)
        import torch.distributed as dist
        if sys.argv[1] == "after destroy":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            dist.destroy_process_group()
        print("ready", flush=True)
        time.sleep(3600)
        """,
        where,
    )
    rank.wait_for("ready")
    assert rank.evict() == -SIGTERM, rank.transcript()
    assert rank.stderr == ""
    assert not list(job.reports.iterdir())


def test_every_later_init_arms_again(job):
    """Every later init arms again; destroy disarms."""
    rank = job.start(
        """
        import time
        import torch.distributed as dist
        for _ in range(3):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        time.sleep(3600)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert rank.phase("destroy")["outcome"] == "ok"


@pytest.mark.parametrize("code, expected", [("0", 0), ("signal", 143), ("85", 85)])
@pytest.mark.parametrize("path", ["clean", "wedged"])
def test_exit_code(job, code, expected, path):
    """Exit codes are alike on the clean and on the aborted path, and `signal` means 128 + signal number."""
    rank, *_ = job.world("train.py" if path == "clean" else "stuck.py", AUTOTEARDOWN_EXIT_CODE=code, **ALONE)
    rank.wait_for("step 2$") if path == "clean" else rank.wait_blocked("ready")
    assert rank.evict() == expected, rank.transcript()
    assert rank.report()["exit_code"] == expected


def test_no_room_for_the_yield(job):
    """A platform with next to no grace period: the time-outs are scaled down, the hard deadline holds."""
    rank, _ = job.world("stuck.py", AUTOTEARDOWN_GRACE=3, **ALONE)
    rank.wait_blocked("ready")
    assert rank.evict(3) == 0, rank.transcript()


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM])
def test_signals_setting(job, signum):
    """AUTOTEARDOWN_SIGNALS: those mean eviction and no other does (SLURM's early notice may be SIGUSR2)."""
    rank = job.start(
        """
        import time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        time.sleep(3600)
        """,
        fresh=True,
        AUTOTEARDOWN_SIGNALS="SIGUSR1,USR2",
        AUTOTEARDOWN_EXIT_CODE="signal",
    )
    rank.wait_for("ready")
    code = rank.evict(signum=signum)
    assert code == (-signum if signum == SIGTERM else 128 + signum), rank.transcript()


def test_second_signal_does_not_cut_the_teardown_short(job):
    """vllm-project/vllm#50529: a second signal killed the cleanup."""
    rank, _ = job.world("stuck.py", **ALONE)
    rank.wait_blocked("ready")
    rank.signal()
    wait_until(lambda: rank.log_lines, "the teardown to begin")
    rank.signal()
    rank.signal(signal.SIGCHLD)
    assert rank.outlast() == 0, rank.transcript()
    assert rank.report()["outcome"] == "aborted"


@pytest.mark.parametrize("program", ["train.py", "stuck.py"])
def test_signal_storm(job, program):
    """200 SIGTERMs in a second: right exit code, inside the grace period."""
    rank, _ = job.world(program, **ALONE)
    rank.wait_for("step 2$") if program == "train.py" else rank.wait_blocked("ready")
    rank.signal()
    for _ in itertools.takewhile(lambda _: rank.running, range(199)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, SIGTERM)
        time.sleep(1 / 200)
    assert rank.outlast() == 0, rank.transcript()
    assert rank.report()["cause"] == "signal"


def test_eviction_during_interpreter_exit(job):
    """A signal that comes while the program is on its way out anyway: it ends, nothing hangs."""
    rank = job.start(
        """
        import atexit, time
        import torch.distributed as dist
        def slow():
            print("leaving", flush=True)
            time.sleep(3600)
        atexit.register(slow)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        """
    )
    rank.wait_for("leaving")
    assert rank.evict() == 0, rank.transcript()


@pytest.mark.parametrize("how", ["atexit", "finally", "thread"])
def test_exit_that_hangs(job, how):
    """`sys.exit` hung in interpreter teardown; torchtitan#1342: a collective on the exception path."""
    rank, _ = job.world(
        """
        import atexit, sys, threading, time
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        if sys.argv[1] == "atexit":
            atexit.register(time.sleep, 3600)
        if sys.argv[1] == "thread":
            threading.Thread(target=time.sleep, args=[3600]).start()
        print("ready", flush=True)
        try:
            time.sleep(3600)
        finally:
            if sys.argv[1] == "finally":
                dist.all_reduce(torch.ones(1))
        """,
        2,
        how,
        **ALONE,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


def test_finally_and_atexit_run(job):
    """The exit: the main thread leaves through SystemExit, so that `atexit` and `finally` run."""
    rank = job.start(
        """
        import atexit, time
        import torch.distributed as dist
        atexit.register(print, "atexit ran", flush=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        try:
            while True:
                time.sleep(0.01)
        finally:
            print("finally ran", dist.is_initialized(), flush=True)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert rank.stdout.splitlines()[1:] == ["finally ran False", "atexit ran"], rank.transcript()


def test_pid_1(job):
    """As PID 1 of a PID namespace, where the kernel drops a SIGTERM without a handler."""
    program = """
        import os, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("pid", os.getpid(), flush=True)
        time.sleep(3600)
    """
    launcher = in_pid_namespace()
    ranks = [job.start(program, mode=mode, launcher=launcher, fresh=True) for mode in (AGENT, NONE)]
    for rank in ranks:
        rank.wait_for("^pid 1$")
        (rank.inside,) = _children(rank.pid)
        rank.signalled = time.monotonic()
        os.kill(rank.inside, SIGTERM)
    fail_open, plain = ranks
    assert fail_open.outlast() == 0, fail_open.transcript()
    assert alive(plain.inside), (
        "the control is to survive: SIGTERM means nothing to a PID 1 without a handler"
    )


def _children(pid):
    from pathlib import Path

    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and alive(int(entry.name)) and int(stat(int(entry.name))[1]) == pid
    ]


@pytest.mark.parametrize("how", ["destroy", "leave"])
def test_a_normal_job_is_unchanged(job, how):
    """No output, no other exit code than without the agent."""
    seen = []
    for mode in (AGENT, NONE):
        ranks = job.world("train.py", 2, "--steps", 4, *(["--leave"] if how == "leave" else []), mode=mode)
        codes = [rank.wait() for rank in ranks]
        pids = {str(rank.pid): "PID" for rank in ranks}
        words = [[pids.get(word, word) for word in rank.stdout.split()] for rank in ranks]
        seen.append((codes, words, [rank.stderr for rank in ranks]))
    assert seen[0] == seen[1]
    assert not list(job.reports.iterdir())
    assert not list(job.runtime.glob("*.json")), "a rank that has left is still in the registry"


@pytest.mark.parametrize(
    ("setting", "signum", "name"), [("SIGTERM,40", 40, "SIGRTMIN+6"), ("SIGRTMAX-4", 60, None)]
)
def test_real_time_signals(job, setting, signum, name):
    """By number or by their distance from the first or last of them; 0.1 failed with an internal error, and "clean"."""
    options = {"AUTOTEARDOWN_SIGNALS": setting, "AUTOTEARDOWN_EXIT_CODE": "signal"}
    (rank,) = job.world("train.py", 1, fresh=True, **options)
    rank.wait_for("step 3$")
    assert rank.evict(signum=signum) == 128 + signum, rank.transcript()
    report = rank.report()
    assert report["outcome"] == "clean", rank.transcript()
    assert report["signal"] == (name or f"SIGRTMIN+{signum - signal.SIGRTMIN}")
