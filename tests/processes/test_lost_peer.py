"""A rank that vanishes without notice frees its peers, and an elastic program that heals runs on."""

from __future__ import annotations

import signal
import time

import pytest

from autoteardown.stop.coordinator import ABSENT

BLOCKED = "vanished.py"


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_is_killed(job, victim):
    """Rank 0 is the hub, rank 3 is not."""
    ranks = job.world(BLOCKED, 4, AUTOTEARDOWN_LOST=2, AUTOTEARDOWN_GRACE=25)
    for rank in ranks:
        rank.wait_for("ready")
    for rank in ranks[1:3]:
        rank.wait_blocked("ready")
    ranks[victim].signal(signal.SIGKILL)
    for rank in ranks[1:3]:
        assert rank.wait() == 143, rank.transcript()
        report = rank.report()
        assert (report["cause"], report["signal"], report["origin"]["rank"]) == ("lost", None, victim)
        assert report["outcome"] in ("aborted", "partial")
    other = ranks[3 - victim]
    assert other.running, "it is not blocked: an elastic framework may heal"
    assert other.evict(25) == 0, other.transcript()


def test_a_rank_that_was_never_there(job):
    """It is killed before it has connected: nobody knows, but an eviction does not wait for its answer."""
    ranks = job.world(
        """
        import time
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
        dist.barrier()
        print("ready", flush=True)
        while True:
            optimizer.step()
            time.sleep(0.01)
        """,
        3,
        each={2: {"AUTOTEARDOWN_PEERS": "off"}},
        AUTOTEARDOWN_GRACE=25,
    )
    for rank in ranks:
        rank.wait_for("ready")
    ranks[2].signal(signal.SIGKILL)
    time.sleep(ABSENT + 1)
    assert ranks[0].running and ranks[1].running
    assert ranks[1].evict(25) == 0, ranks[1].transcript()
    assert ranks[0].wait() == 143, ranks[0].transcript()
    for rank in ranks[:2]:
        (step,) = [phase for phase in rank.report()["phases"] if phase["name"] == "step"]
        assert step["detail"] == "rank 2 has never connected", rank.transcript()


def test_not_where_it_is_off(job):
    ranks = job.world(BLOCKED, 4, AUTOTEARDOWN_LOST="off", AUTOTEARDOWN_GRACE=25)
    for rank in ranks:
        rank.wait_for("ready")
    ranks[3].signal(signal.SIGKILL)
    ranks[3].wait()
    with pytest.raises(AssertionError, match="waited 8 s"):
        ranks[1].wait(8)


@pytest.mark.parametrize("patience", [1, 30])
def test_a_program_that_heals_is_left_alone(job, patience):
    """It catches the collective's error, destroys its group, and makes one without the rank that has ended."""
    ranks = job.world(
        """
        import os, time
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        dist.barrier()
        print("ready", flush=True)
        try:
            while True:
                dist.all_reduce(torch.ones(1))
                time.sleep(0.01)
        except RuntimeError:
            pass
        dist.destroy_process_group()
        os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(int(os.environ["MASTER_PORT"]) + 1))
        dist.init_process_group("gloo")
        for step in range(400):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
        print("healed", flush=True)
        while True:
            time.sleep(0.01)
        """,
        3,
        AUTOTEARDOWN_LOST=patience,
        AUTOTEARDOWN_GRACE=25,
    )
    for rank in ranks:
        rank.wait_for("ready")
    ranks[2].signal(signal.SIGKILL)
    for rank in ranks[:2]:
        rank.wait_for("healed")
        assert rank.log_lines == [], rank.transcript()
    ranks[0].signal()
    assert [rank.outlast(25) for rank in ranks[:2]] == [0, 143]


def test_a_rank_that_was_lost_and_is_back_is_lost_no_more(job):
    """Its line was cut, and it was late to come back. Later its peers wait for it: in a healthy job, for long."""
    ranks = job.world(
        """
        import os, time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        from autoteardown.rank import guard
        channel, loop = guard.guard.channel, guard.guard.channel._loop
        dist.barrier()
        while not channel.connected:
            time.sleep(0.01)
        dist.barrier()
        if dist.get_rank() == 1:
            def cut():
                channel._end._link._sock.shutdown(2)
                time.sleep(4)
            loop.call(cut)
        time.sleep(8)
        print("connected", channel.connected, flush=True)
        if dist.get_rank() == 1:
            time.sleep(8)
        dist.barrier()
        print("past", flush=True)
        while True:
            time.sleep(0.01)
        """,
        3,
        AUTOTEARDOWN_LOST=2,
        AUTOTEARDOWN_LOG="debug",
    )
    for rank in ranks:
        rank.wait_for("connected True")
    for rank in ranks:
        rank.wait_for("past", 30)
    assert all(rank.running for rank in ranks)
