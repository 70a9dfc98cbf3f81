"""Evictions on devices: the promises that do not depend on what wedged ranks agree on (`test_together.py`).

The journal of the simulated accelerator is what the outcome is judged by; `devices` fails a test in which it faults.
"""

import re
import time

import pytest
from harness import wait_until

pytestmark = pytest.mark.timeout(600)
GRACE = 12


def evict(world, victims=(0,), grace=GRACE):
    """SIGTERM to some, and all are out in time, each with its code; return the seconds until the last was."""
    for victim in victims:
        if world[victim].signalled is None:
            world[victim].signal()
    started = min(world[victim].signalled for victim in victims)
    for rank in world:
        rank.signalled = rank.signalled or started
    codes = [rank.outlast(grace) for rank in world]
    expected = [0 if index in victims else 143 for index in range(len(world))]
    assert codes == expected, "\n".join(rank.transcript() for rank in world)
    return max(rank.ended for rank in world) - started


def clean(world, devices):
    """Stopped together, drained, destroyed together; nobody aborted, nothing was left to be done."""
    for rank in world:
        assert rank.report()["outcome"] == "clean", f"{rank.transcript()}\n{devices.transcript()}"
        assert rank.phase("destroy")["outcome"] == "ok", rank.transcript()
        assert "pending 0" in rank.stdout, rank.transcript()
        assert "Traceback" not in rank.stderr, rank.transcript()
    assert not devices.times_of("abort begins"), devices.transcript()


def same_step(world):
    assert len({rank.report()["steps"]["stopped_at"] for rank in world}) == 1, world[0].transcript()


def test_idle(ranks_on, devices):
    world = ranks_on("idle")
    evict(world)
    clean(world, devices)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_host_is_ahead_of_the_device(ranks_on, devices, kind, victim):
    """20 steps ahead, with kernels that do not end together: the device works it off, and nobody leaves before."""
    world = ranks_on(
        "train", 2, "--kind", kind, "--ahead", 20, "--ms", 50, each={1: {"settings": {"tail_ms": 20}}}
    )
    for rank in world:
        rank.wait_for("^step 30$")
    assert evict(world, victims=[victim]) > 0.7  # what the device had to work off
    clean(world, devices)
    same_step(world)


def test_four_ranks_two_victims_two_groups(ranks_on, devices):
    """A second group, and one that was split off, each on a stream of its own."""
    world = ranks_on("train", 4, "--groups", "--ms", 10)
    for rank in world:
        rank.wait_for("^step 10$")
    evict(world, victims=[1, 3])
    clean(world, devices)
    same_step(world)


def test_the_launch_queue_is_full(ranks_on, devices):
    """The host is blocked in the launch, in C, most of the time."""
    world = ranks_on("train", 2, "--ahead", 1000, "--ms", 30, settings={"queue": 16})
    for rank in world:
        rank.wait_for("^step 8$")
    evict(world)
    clean(world, devices)
    same_step(world)


def test_the_host_waits_for_its_device(ranks_on, devices):
    """In `synchronize`, where no signal handler runs."""
    world = ranks_on("train", 2, "--wait", 5, "--ms", 60, "--ahead", 1000)
    for rank in world:
        rank.wait_for("^waiting 10$")
    evict(world)
    clean(world, devices)
    same_step(world)


def test_a_replayed_graph(ranks_on, devices):
    """Its launches are in no step: the rank parks between two bytecodes, and the device drains."""
    world = ranks_on("replay", 2, "--ms", 5)
    for rank in world:
        rank.wait_for("^replayed 20$")
    evict(world)
    assert not devices.times_of("abort begins, idle"), devices.transcript()


def test_torchrun(job, devices):
    """SIGTERM to the launcher of four ranks; the host ahead of the device."""
    launcher = job.torchrun(
        "device.py", "train", "--ms", 20, ranks=4, AUTOTEARDOWN_GRACE=GRACE, **devices.settings()
    )
    wait_until(lambda: launcher.count("step 10") == 4, "the training")
    launcher.signal()
    launcher.wait(30)
    reports = job.all_reports()
    assert {report["outcome"] for report in reports.values()} == {"clean"} and len(reports) == 4, (
        launcher.transcript()
    )
    assert not devices.times_of("abort begins"), devices.transcript()


def test_one_wedged_rank(ranks_on, devices):
    """It waits on its device for a peer that never comes; it aborts, the peer is drained and does not."""
    world = ranks_on("stuck", 2, "--absent", 1)
    world[0].wait_for("^waiting")
    time.sleep(0.3)
    evict(world)
    assert world[0].report()["outcome"] == "aborted", world[0].transcript()
    assert world[0].phase("abort")["outcome"] == "ok", world[0].transcript()
    assert "garbage" not in world[0].stdout
    assert world[1].phase("abort") is None or world[1].phase("abort")["outcome"] == "skipped"
    assert [pid for _, pid, text in devices.journal if "abort begins" in text] == [world[0].pid], (
        devices.transcript()
    )


def test_two_groups_wedged(ranks_on, devices):
    """All of its groups are aborted, the one that was split off, too."""
    world = ranks_on("stuck", 2, "--absent", 1, "--groups")
    world[0].wait_for("^waiting")
    evict(world)
    assert world[0].report()["outcome"] == "aborted", world[0].transcript()
    assert len(devices.times_of("abort ends", world[0].pid)) == 3, devices.transcript()


def test_a_destroy_in_flight(ranks_on, devices):
    """The rank is in `destroy_process_group` with work that never ends, and holds what an abort needs."""
    world = ranks_on("flight", 2, "--absent", 1)
    world[0].wait_for("^waiting")
    wait_until(lambda: devices.times_of("destroy begins, in flight"), "the destroy")
    evict(world)
    assert world[0].report()["outcome"] in ("aborted", "forced"), world[0].transcript()
    assert not devices.times_of("abort", world[1].pid), devices.transcript()


def test_a_kernel_that_never_ends(ranks_on, devices):
    """The drain has its time; the other ranks are told, and nobody waits for the grace period's end."""
    world = ranks_on("spin", 2, "--absent", 1, said="(ready|launched)")
    world[0].wait_for("^launched")
    evict(world)
    outcomes = {phase["name"]: phase["outcome"] for phase in world[0].report()["phases"]}
    assert outcomes["drain"] == "timeout" and "abort" in outcomes, world[0].transcript()
    assert world[1].report()["outcome"] != "forced", world[1].transcript()


@pytest.mark.parametrize("link", ["nvlink", "net"])
def test_a_peer_that_was_killed(ranks_on, devices, link):
    """SIGKILL to one of three whose kernels run; then one of the others is evicted. Both are out, in time.

    Over NVLink their devices fault at once, which nobody can help: to drain them raises. Over a network they wait.
    """
    world = ranks_on("stuck", 3, "--absent", 2, "--loop", settings={"link": link, "verbose": 1})
    for rank in world[:2]:
        rank.wait_for("^waiting")
    wait_until(lambda: devices.times_of("kernel 2 starts", world[1].pid), "the kernel")
    world[2].signal(9)
    world[2].wait()
    if link == "nvlink":
        wait_until(lambda: len(devices.faults) == 2, "the faults")
    devices.expected = [fault for fault in devices.faults if "peer 2 exited" in fault[1]]
    evict(world[:2], grace=GRACE + 2)
    for rank in world[:2]:
        assert rank.report()["outcome"] != "clean", rank.transcript()


def test_a_peer_that_was_killed_and_is_seen_to_be(ranks_on, devices):
    """The communicator's own watchdog ends the survivors: that is the program's exit without an eviction."""
    world = ranks_on("train", 2, "--ms", 10, settings={"link": "net", "remote_errors": 1})
    for rank in world:
        rank.wait_for("^step 10$")
    world[1].signal(9)
    assert world[0].wait(30) == -6, world[0].transcript()


def test_after_the_stop_nothing_runs_on(ranks_on, devices):
    """No step is launched once a rank has said where it stopped."""
    world = ranks_on("train", 2, "--ms", 20)
    for rank in world:
        rank.wait_for("^step 10$")
    evict(world)
    for rank in world:
        stopped = rank.report()["steps"]["stopped_at"]
        said = [int(step) for step in re.findall(r"^step (\d+)$", rank.stdout, re.MULTILINE)]
        assert said[-1] in (stopped - 1, stopped), rank.transcript()
