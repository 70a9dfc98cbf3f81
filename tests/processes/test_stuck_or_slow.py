"""The agent recognizes a stuck world, and gives a slow one its time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import wait_until

ROOMY = {"AUTOTEARDOWN_GRACE": 25}
LOOP = """
    import os, time
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    class Stalls(torch.utils.data.Dataset):
        def __len__(self):
            return 1
        def __getitem__(self, index):
            time.sleep({seconds})
            return 0

    def meanwhile():
        print("meanwhile", flush=True)
        {what}

    def {name}():
        for step in range(10**6):
            if step == 40 and dist.get_rank() == 0:
                meanwhile()
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            print("step", step, flush=True)
            time.sleep(0.02)

    {name}()
"""
SLOW = {
    "evaluation": "end = time.monotonic() + {seconds}\n        while time.monotonic() < end: sum(range(1000))",
    "data": "list(torch.utils.data.DataLoader(Stalls()))",
    "save": "import autoteardown\n        with autoteardown.protect(): time.sleep({seconds})",
    "compilation": "torch.compile(lambda x: x + 1, backend=lambda graph, _: time.sleep({seconds}) or graph)(weight)",
    "C": "a = torch.randn(700, 700, dtype=torch.double); end = time.monotonic() + {seconds}\n"
    "        while time.monotonic() < end: a @ a",
}


def world(job, what, seconds, name="train"):
    program = LOOP.replace("{what}", what).replace("{seconds}", str(seconds)).replace("{name}", name)
    ranks = job.world(program, 3, AUTOTEARDOWN_YIELD="off", **ROOMY)
    ranks[0].wait_for("^meanwhile$")
    return ranks


@pytest.mark.parametrize("name", ["train", "train_and_save_model"])
def test_stuck(job, name):
    """A rank that stays away from a collective: 9 s on the old code, and all three said "clean".

    Whatever the function is called that trains.
    """
    ranks = world(job, "time.sleep(3600)", 0, name)
    ranks[1].signal()
    assert [rank.outlast(25) for rank in ranks] == [143, 0, 143], ranks[1].transcript()
    for rank in ranks:
        report = rank.report()
        assert report["outcome"] in ("partial", "aborted")
        assert "no rank makes progress" in report["why"]
        step = rank.phase("step")
        assert step["end"] - step["start"] < 6, "the whole time for a step is 8 s"


# One call of C that needs 0.4 s of a processor, of which it gets a thirteenth.
STARVED = """import hashlib
        start = time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
        rounds = int(100_000 * 0.4 / (time.thread_time() - start))
        os.sched_setaffinity(0, {CPU})
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)"""


@pytest.mark.slow
def test_starved(job):
    """No time to compute is no sign of death."""
    # Programs of others, on the one processor that this job may use.
    cpu = min(os.sched_getaffinity(0))
    hog = f"import os; os.sched_setaffinity(0, {{{cpu}}}); print(flush=True)\nwhile True: pass"
    hogs = [
        subprocess.Popen([sys.executable, "-c", hog], stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(12)
    ]
    try:
        for each in hogs:
            each.stdout.readline()
        ranks = world(job, STARVED.replace("CPU", str(cpu)), 0)
        ranks[1].signal()
        assert [rank.outlast(25) for rank in ranks] == [143, 0, 143], ranks[1].transcript()
        for rank in ranks:
            assert rank.report()["outcome"] == "clean", rank.transcript()
    finally:
        for each in hogs:
            each.kill()
            each.communicate()


@pytest.mark.parametrize("what", SLOW)
def test_slow(job, what):
    ranks = world(job, SLOW[what], 5)
    ranks[1].signal()
    assert [rank.outlast(25) for rank in ranks] == [143, 0, 143], ranks[1].transcript()
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
    assert len({rank.report()["steps"]["stopped_at"] for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("run", "wait()"),
        ("run_and_save", "wait()"),
        ("run", 'torch.compile(lambda: torch._dynamo.disable(wait)(), backend="eager")()'),
    ],
    ids=["plain", "and saves", "compiled"],
)
def test_an_idle_host_frees_its_blocked_peer(job, name, call):
    """5 s on the old code: the host waited for the peer that waited for it."""
    ranks = job.world(
        f"""
        import time
        import torch, torch.distributed as dist

        def wait():
            print("ready", flush=True)
            dist.all_reduce(torch.ones(1))

        def {name}():
            dist.init_process_group("gloo")
            dist.barrier()
            if dist.get_rank():
                {call}
            print("ready", flush=True)
            while True:
                time.sleep(0.01)

        {name}()
        """,
        2,
        **ROOMY,
    )
    ranks[0].wait_for("ready")
    ranks[1].wait_blocked("ready")
    ranks[0].signal()
    assert [rank.outlast(25) for rank in ranks] == [0, 143]
    for rank in ranks:
        assert rank.report()["phases"][-1]["end"] < 3, rank.transcript()


def test_a_signal_long_after_a_peers_notice_is_an_eviction(job):
    """Both signalled, 1.5 s apart, with iterations of 3 s: both are signalled ranks."""
    ranks = job.world(
        """
        import time
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(10**6):
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            print("step", step, flush=True)
            time.sleep(3)
        """,
        2,
        **ROOMY,
    )
    for rank in ranks:
        rank.wait_for("step 2$")
    ranks[0].signal()
    wait_until(lambda: any("a peer is being evicted" in line for line in ranks[1].log_lines), "the notice")
    ranks[1].signal()
    assert [rank.outlast(25) for rank in ranks] == [0, 0], ranks[1].transcript()


def test_a_registry_whose_disk_hangs(job):
    """Nobody waits for it: not init, not the thread that hears signals, not the stop."""
    ranks = job.world(
        """
        import time
        from autoteardown.node import safe_folder
        import torch, torch.distributed as dist
        safe_folder.replace = lambda *args: time.sleep(600)
        dist.init_process_group("gloo")
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        while True:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            print("step", flush=True)
            time.sleep(0.01)
        """,
        **ROOMY,
    )
    for rank in ranks:
        rank.wait_for("step")
    ranks[0].signal()
    assert [rank.outlast(25) for rank in ranks] == [0, 143], ranks[0].transcript()
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
