"""Once a rank has parked, the program makes no step and begins no save, whatever it catches."""

from __future__ import annotations

import pytest
from harness import wait_until

TRAINING = """
    import gc, os, sys, time, weakref
    import torch, torch.distributed as dist

    def say(text):
        os.write(1, (text + "\\n").encode())

    def stopped():
        say("stopped")

    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step():
        weight.grad = torch.ones(1)
        dist.all_reduce(weight.grad)
        optimizer.step()
        say("step")

    def save():
        torch.save(weight, "weight.pt")
        say("saved")
    {body}
"""
# Each catches what ends it, at another place.
SWALLOWS = {
    "around the loop": """
    while True:
        try:
            while True:
                step(); save()
        except BaseException as error:
            say(f"caught {type(error).__name__}")
    """,
    "around the step": """
    while True:
        try:
            step()
        except BaseException:
            pass
        try:
            save()
        except BaseException:
            pass
    """,
    "and retries": """
    def retry(function):
        for _ in range(10**9):
            try:
                return function()
            except BaseException:
                time.sleep(0.001)
    while True:
        retry(step)
    """,
    "in __del__": """
    class Late:
        def __del__(self):
            for _ in range(20):
                time.sleep(0.001)
    while True:
        step()
        Late()
        say("past")
    """,
    "in a weakref callback": """
    class Thing:
        pass
    def gone(reference):
        for _ in range(20):
            time.sleep(0.001)
    while True:
        step()
        thing = Thing()
        reference = weakref.ref(thing, gone)
        del thing
        say("past")
    """,
    "in a fork hook": """
    os.register_at_fork(before=lambda: time.sleep(0.01), after_in_parent=lambda: time.sleep(0.01))
    while True:
        step()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        say("past")
        os.waitpid(pid, 0)
    """,
    "in a signal handler": """
    import signal
    def alarm(signum, frame):
        for _ in range(5):
            time.sleep(0.001)
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    while True:
        try:
            step()
        except BaseException:
            pass
    """,
}


def after(rank, steps):
    """Wait for so many steps."""
    wait_until(lambda: rank.stdout.count("step\n") >= steps or not rank.running, f"{steps} steps")


def evicted(job, body, steps, **settings):
    """Two ranks that have trained for so many steps, the first of which was evicted: both are out, with their codes."""
    ranks = job.world(
        TRAINING.replace("{body}", body),
        2,
        AUTOTEARDOWN_ON_TEARDOWN="__main__:stopped",
        AUTOTEARDOWN_GRACE=12,
        **settings,
    )
    for rank in ranks:
        after(rank, steps)
    ranks[0].signal()
    assert [rank.outlast(12) for rank in ranks] == [0, 143], ranks[0].transcript()
    return ranks


def after_the_stop(rank):
    """What it said after it had been stopped."""
    assert "stopped\n" in rank.stdout, rank.transcript()
    return rank.stdout.partition("stopped\n")[2].splitlines()


@pytest.mark.parametrize("stop_at", ["step", "now"])
@pytest.mark.parametrize("where", SWALLOWS)
def test_a_program_that_catches_its_end(job, where, stop_at):
    ranks = evicted(job, SWALLOWS[where], steps=20, AUTOTEARDOWN_STOP_AT=stop_at)
    for rank in ranks:
        report = rank.report()
        if (
            stop_at == "now" and "stopped\n" not in rank.stdout
        ):  # it was blocked in a collective with the other
            assert report["outcome"] in ("aborted", "partial"), rank.transcript()
            continue
        ran = [line for line in after_the_stop(rank) if not line.startswith("caught")]
        assert ran == [], rank.transcript()
        assert "ignored in" not in rank.stderr, rank.transcript()
        assert report["outcome"] in ("clean", "partial")
        if report["outcome"] == "partial" and stop_at == "step":
            assert "caught the exit" in report["why"], rank.transcript()


def test_code_on_the_way_out_keeps_its_time(job):
    """`finally`, `except SystemExit`, atexit: what a program does on its way out is its own."""
    ranks = evicted(
        job,
        """
    import atexit
    atexit.register(say, "atexit")
    try:
        while True:
            step()
    except SystemExit:
        torch.save({"mine": 1}, f"own-{os.environ['RANK']}.pt")
        say("own")
        raise
    finally:
        time.sleep(1)
        say("finally")
    """,
        steps=5,
    )
    for rank in ranks:
        assert after_the_stop(rank) == ["own", "finally", "atexit"], rank.transcript()
        assert rank.report()["outcome"] == "clean", rank.transcript()


def test_a_sharded_save_does_not_begin_alone(job):
    """Seen: a rank whose group was gone overwrote a good sharded checkpoint with its own part."""
    ranks = evicted(
        job,
        """
    import torch.distributed.checkpoint as dcp
    dcp.save({"weight": weight.detach()}, checkpoint_id="sharded")
    while True:
        try:
            while True:
                step()
        finally:
            dcp.save({"weight": weight.detach() * 0 + 1e9}, checkpoint_id="sharded")
            say("overwritten")
    """,
        steps=5,
    )
    for rank in ranks:
        assert "overwritten" not in rank.stdout
