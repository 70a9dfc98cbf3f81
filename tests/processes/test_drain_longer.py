"""A drain that knows when the machine ends gives the ranks that time, even if it is more than their grace period."""

from __future__ import annotations

import signal
import threading

import pytest
from harness import wait_until
from test_drain_deadline import OWNER

from autoteardown.node import drain

TRAINING = """
    import sys, time
    import torch, torch.distributed as dist
    import autoteardown

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    @autoteardown.on_teardown
    def save():
        print("saving", flush=True)
        time.sleep(float(sys.argv[1]))
        print("saved", flush=True)

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


def begin(job, seconds, selection=None):
    """Drain in the background, with so much time until the end of the machine."""
    arguments = (str(job.runtime), int(signal.SIGTERM), seconds, print, selection)
    thread = threading.Thread(target=drain.drain, args=arguments, kwargs={"longer": True}, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("again", [False, True])
def test_an_application_with_a_handler_of_its_own(job, again):
    """It has all the time of the notice; if the platform's own signal comes meanwhile, the grace period after that."""
    (rank,) = job.world(OWNER, 1, AUTOTEARDOWN_GRACE=8)
    rank.wait_for("^ready$")
    begin(job, 60)
    rank.wait_for("^its handler$")
    rank.wait_for("SIGTERM: the application ends by itself, and has 53.", stream="stderr")
    if not again:
        return
    rank.signal(signal.SIGTERM)
    assert rank.wait() == 0
    assert rank.seconds < 20
    assert any(line.startswith("hard deadline moved forward to ") for line in rank.log_lines)
    assert rank.phase("yield")["outcome"] == "timeout"
    assert rank.report()["grace"] < 20


def test_peers_have_as_much_time(job):
    """One machine of two ends: the ranks of both save for longer than their grace period, after the same iteration."""
    ranks = job.world(TRAINING, 2, 9, AUTOTEARDOWN_GRACE=6)
    for rank in ranks:
        rank.wait_for("^ready$")
    begin(job, 60, drain.Selection(pids=[ranks[1].pid]))
    assert [rank.wait() for rank in ranks] == [143, 0]
    reports = [rank.report() for rank in ranks]
    assert [report["outcome"] for report in reports] == ["clean", "clean"], [
        rank.transcript() for rank in ranks
    ]
    assert len({report["steps"]["stopped_at"] for report in reports}) == 1
    for rank, report in zip(ranks, reports):
        assert "saved" in rank.stdout
        assert 50 < report["grace"] <= 61


def test_two_drains_at_once(job):
    """Two watchers on a node signal a rank twice: neither signal is the platform's."""
    (rank,) = job.world(OWNER, 1, AUTOTEARDOWN_GRACE=8)
    rank.wait_for("^ready$")
    # Both announce before either signals.
    barrier = threading.Barrier(2)
    real = drain.registry.DrainMarker.announce

    def announce(self, *args, **kwargs):
        real(self, *args, **kwargs)
        barrier.wait(30)

    names = iter(["1", "2"])
    own = drain.registry.own_name
    try:
        drain.registry.DrainMarker.announce = announce
        # In one process, markers have one name: the second gets a file of its own, of this process all the same.
        drain.registry.own_name = lambda: own().replace(".json", f".json{next(names)}")
        begin(job, 60), begin(job, 60)
        rank.wait_for("^its handler$")
        wait_until(lambda: rank.log_lines, "its first line")
    finally:
        drain.registry.DrainMarker.announce = real
        drain.registry.own_name = own
    assert "has 53." in rank.log_lines[0]
    assert not any("moved forward" in line for line in rank.log_lines)
