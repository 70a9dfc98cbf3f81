"""What wedged and slow ranks agree on: aborts at one moment, progress; and outcomes that are true."""

import json
import os
import random
import signal
import time

import pytest
from harness import wait_until
from test_stops import clean, evict, same_step

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("late", [False, True])
def test_several_wedged_ranks_abort_at_one_moment(ranks_on, devices, late):
    """The first abort would free what the others' kernels still poll, also those of a rank whose host is starved."""
    world = ranks_on("stuck", 4, "--absent", 3)
    for rank in world[:3]:
        rank.wait_for("^waiting")
    world[0].signal()
    if late:
        wait_until(
            lambda: any(line.startswith("step") for line in world[1].log_lines), "the rest to be parked for"
        )
        os.kill(world[1].pid, signal.SIGSTOP)
        time.sleep(3.5)  # the drain's time is over half a second ago
        os.kill(world[1].pid, signal.SIGCONT)
    evict(world)
    for rank in world[:3]:
        assert rank.report()["outcome"] == "aborted", rank.transcript()
    begun = devices.times_of("abort begins")
    assert len(begun) == 3 and not devices.times_of("abort begins, idle"), devices.transcript()


def test_a_rank_that_is_absent_while_the_rest_train(ranks_on, devices):
    """One stops launching; the hosts of the others run ahead until they wait. None of them is out after the first."""
    world = ranks_on("train", 4, "--absent", 3, "--from", 6, "--wait", 2, "--ms", 20)
    world[3].wait_for("^absent")
    time.sleep(1)
    evict(world)
    assert not devices.times_of("abort begins, idle"), devices.transcript()


def test_a_device_that_makes_progress_is_waited_for(ranks_on, devices):
    """Hosts 40 steps of 0.4 s ahead, longer than the drain's time: it is time without progress that counts."""
    world = ranks_on("train", 2, "--ahead", 40, "--ms", 400, AUTOTEARDOWN_GRACE=25)
    for rank in world:
        rank.wait_for("^step 40$")
    assert evict(world, grace=25) > 10
    clean(world, devices)
    same_step(world)


def test_uneven_ranks_are_not_wedged(ranks_on, devices):
    """One has left out a step of its optimizer, so its count is behind: a device that waits for it gets its part."""
    world = ranks_on(
        "train", 2, "--ms", 20, "--ahead", 3, each={1: {"args": ("train", "--ms", 20, "--late", 1)}}
    )
    for rank in world:
        rank.wait_for("^step 10$")
    evict(world)
    assert not devices.times_of("abort begins"), devices.transcript()


def test_a_device_that_cannot_be_waited_for(ranks_on, devices):
    """Never "drained in 0.00 s": partial, and the floor instead of quiet."""
    world = ranks_on("train", 2, "--unwaitable", "--ms", 20)
    for rank in world:
        rank.wait_for("^step 10$")
    evict(world)
    for rank in world:
        report = rank.report()
        assert report["outcome"] == "partial", rank.transcript()
        assert "simulated" in (report.get("why") or ""), rank.transcript()


def test_in_the_capture_of_a_graph(ranks_on, devices):
    """To synchronise raises: a healthy rank does not abort for it."""
    world = ranks_on("capture")
    for rank in world:
        rank.wait_for("^capturing")
    evict(world)
    assert not devices.times_of("abort begins"), devices.transcript()
    assert {rank.report()["outcome"] for rank in world} == {"partial"}, world[0].transcript()


def test_a_watchdog_that_fires_during_the_teardown(ranks_on, devices):
    """The group's time-out ends while the rank is being drained: its exit code is the contract's."""
    world = ranks_on("stuck", 2, "--absent", 1, "--timeout", 1.5)
    world[0].wait_for("^waiting")
    time.sleep(0.5)
    evict(world)
    assert devices.times_of("WATCHDOG: ALLREDUCE 2 timed out", world[0].pid), devices.transcript()


def test_the_report_names_the_collective(ranks_on, devices, job):
    """And the flight recorder's dump lies beside it."""
    world = ranks_on("stuck", 2, "--absent", 1)
    world[0].wait_for("^waiting")
    evict(world)
    text = json.dumps(world[0].report())
    assert '"allreduce"' in text or "allreduce" in text, text
    assert list(job.reports.glob("*-simulated.trace")), list(job.reports.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_evictions(ranks_on, devices, job):
    """Whatever ranks do and whichever is evicted: no fault, no abort of a drained rank, right codes, all in time."""
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(int(os.environ.get("EVICTIONS", "50"))):
        ranks = chance.choice([2, 3, 4])
        role = chance.choice(
            [["train"], ["train", "--groups"], ["idle"], ["train", "--wait", "3"], ["stuck", "--absent", "0"]]
        )
        tails = {rank: {"settings": {"tail_ms": chance.choice([0, 5, 30])}} for rank in range(ranks)}
        ahead = str(chance.choice([0, 3, 20]))
        world = ranks_on(
            role[0], ranks, *role[1:], "--ms", str(chance.choice([2, 20, 60])), "--ahead", ahead, each=tails
        )
        time.sleep(chance.random())
        victims = chance.sample(range(ranks), chance.choice([1, 1, ranks]))
        evict(world, victims)
        assert not devices.faults, f"seed {seed}\n{devices.transcript()}"
        assert not devices.times_of("abort begins, idle"), f"seed {seed}\n{devices.transcript()}"
