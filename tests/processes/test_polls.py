"""`autoteardown.stop_requested()`: True on every rank at the same call, and False in all other circumstances."""

import sys
from types import ModuleType

import pytest
from harness import AGENT, NONE
from test_together import PATIENT, saved_together, started

import autoteardown


@pytest.mark.parametrize("style", ["no-step", "off-main", "places"])
def test_all_ranks_at_the_same_call(job, style):
    """Without optimizers (inference, rollouts), off the main thread, from several places of a loop."""
    ranks = started(job, style)
    ranks[1].signal()
    if style != "no-step":
        saved_together(job, ranks)
        return
    for rank in ranks:
        rank.signalled = rank.signalled or ranks[1].signalled
        assert rank.outlast(16) == 42, rank.transcript()
    assert len({rank.wait_for(r"^saved \d (\d+)$")[1] for rank in ranks}) == 1


def test_without_a_channel(job):
    """A rank that cannot hear its peers has its own signal only, and acts on that."""
    ranks = started(job, "no-step", AUTOTEARDOWN_PEERS="off")
    for rank in ranks:
        rank.signal()
    for rank in ranks:
        # What a collective says whose peer has left is the program's own affair; nobody is late.
        assert rank.outlast(16) in (0, 1, 42), rank.transcript()
    assert any("saved" in rank.stdout for rank in ranks), ranks[0].transcript()


def test_its_own_signal_comes_last(job):
    """A pod's ranks are not signalled at one moment: a notice may come first, and the signal in the last save."""
    ranks = job.world(
        """
        import sys, time
        import autoteardown
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        while not autoteardown.stop_requested():
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
            print("step", flush=True)
        dist.destroy_process_group()
        print("saving", flush=True)
        time.sleep(1)
        sys.exit(42)
        """,
        2,
        **PATIENT,
    )
    for rank in ranks:
        rank.wait_for("step")
    ranks[0].signal()
    ranks[1].wait_for("saving")
    assert ranks[1].evict(grace=16) == 42, ranks[1].transcript()
    assert ranks[0].outlast(16) == 42, ranks[0].transcript()


QUIET = """
    import sys, threading
    import autoteardown
    print([autoteardown.stop_requested() for _ in range(3)], flush=True)
    import torch, torch.distributed as dist
    print(autoteardown.stop_requested(), flush=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(autoteardown.stop_requested(), autoteardown.status().get("steps"), flush=True)
    dist.destroy_process_group()
    print(autoteardown.stop_requested(), flush=True)
    """


@pytest.mark.parametrize("mode", [AGENT, NONE])
def test_false(job, mode):
    """Before torch, before init, while nothing happens, after destroy; with the agent off always."""
    rank = job.start(QUIET, mode=mode, fresh=True)
    assert rank.wait() == 0, rank.transcript()
    assert rank.stdout.splitlines() == [
        "[False, False, False]",
        "False",
        "False 1" if mode == AGENT else "False None",
        "False",
    ]
    assert rank.stderr == ""


def test_polled_on_top_of_its_own_import(monkeypatch):
    """In a signal handler that interrupts the very first poll, whose import is not over."""
    unfinished = ModuleType("autoteardown.api")
    monkeypatch.setitem(sys.modules, "autoteardown.api", unfinished)
    monkeypatch.setattr(autoteardown, "api", unfinished, raising=False)
    monkeypatch.delitem(vars(autoteardown), "stop_requested", raising=False)
    assert autoteardown.stop_requested() is False
    assert "stop_requested" not in vars(autoteardown), "the next one is a real one"


def test_polled_in_a_signal_handler(job):
    """A poll in the program's own handler must not wait for the iteration that it interrupts."""
    rank, other = job.world(
        """
        import os, signal, time
        import autoteardown
        import torch, torch.distributed as dist

        def alarm(signum, frame):
            autoteardown.stop_requested()

        dist.init_process_group("gloo")
        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        step = 0
        while True:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            step += 1
            print("step", step, flush=True)
            time.sleep(0.005)
        """,
        **PATIENT,
    )
    for each in (rank, other):
        each.wait_for("^step 5$")
    rank.signal()
    # It never says what it would do with the answer: its time over, it is stopped.
    assert rank.outlast(16) == 0, rank.transcript()
    other.signalled = rank.signalled
    assert other.outlast(16) == 143, other.transcript()
