"""A drain that is followed by a kill tells the ranks how long they have, which may be less than their grace period."""

from __future__ import annotations

import signal

import pytest

from autoteardown.node import drain

# Its handler sets a flag that nobody looks at: it has all the time that the grace period leaves.
OWNER = """
    import signal, time
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda *_: print("its handler", flush=True))
    dist.init_process_group("gloo")
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("killed_after", [True, False])
def test_an_application_with_a_handler_of_its_own(job, killed_after):
    """Its part of the grace period becomes shorter with it."""
    (rank,) = job.world(OWNER, 1, AUTOTEARDOWN_GRACE=40)
    rank.wait_for("^ready$")
    signum = int(signal.SIGTERM)
    ((told,), _) = drain.drain(str(job.runtime), signum, 9, print, killed_after=killed_after)
    rank.wait_for("^its handler$")
    if not killed_after:
        assert told.outcome == "running"
        rank.wait_for("SIGTERM: the application ends by itself, and has 33s", stream="stderr")
        return
    assert (told.outcome, told.exit_code) == ("clean", 0), rank.transcript()
    assert rank.wait() == 0
    report = rank.report()
    assert 8 < report["grace"] < 9.6
    assert report["phases"][-1]["end"] < 8.5
    assert rank.phase("yield")["end"] < 4


def test_one_that_is_shorter_anyway(job):
    """The rank's own grace period holds."""
    (rank,) = job.world(OWNER, 1, AUTOTEARDOWN_GRACE=8)
    rank.wait_for("^ready$")
    ((told,), _) = drain.drain(str(job.runtime), int(signal.SIGTERM), 60, print, killed_after=True)
    assert told.exit_code == 0
    assert rank.wait() == 0
    assert rank.report()["grace"] == 8


def test_ranks_that_stop_together_know_it_all(job):
    """All of a node are told before the first of them is signalled."""
    program = """
        import time
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        step = 0
        while True:
            parameter.grad = torch.ones(1)
            dist.all_reduce(parameter.grad)
            optimizer.step()
            time.sleep(0.01)
            step += 1
            if step == 3:
                print("ready", flush=True)
    """
    ranks = job.world(program, 3, AUTOTEARDOWN_GRACE=40)
    for rank in ranks:
        rank.wait_for("^ready$")
    told, _ = drain.drain(str(job.runtime), int(signal.SIGTERM), 20, print, killed_after=True)
    assert sorted((each.outcome, each.exit_code) for each in told) == [("clean", 0)] * 3
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    reports = [rank.report() for rank in ranks]
    assert len({report["steps"]["stopped_at"] for report in reports}) == 1
    for report in reports:  # one that heard of a peer first may have left before it looked
        assert report["grace"] == 40 or 18 < report["grace"] < 20.6
    assert min(report["grace"] for report in reports) < 20.6
