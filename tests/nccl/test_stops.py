"""Evictions of ranks on torch's own ProcessGroupNCCL: what the docs say happens."""

import signal
import time

import pytest

# Seconds from the end of an abort's kernels until its memory goes, where several ranks abort: the 20 ms that are
# assumed elsewhere would measure how busy this machine is.
TOGETHER = 0.3


def codes(world, signalled=1):
    return [0] * signalled + [143] * (len(world.ranks) - signalled)


def check(world, outcomes, within, signalled=1):
    """The exit codes of the contract, the outcomes, in time, and nothing computed on."""
    assert [rank.code for rank in world.ranks] == codes(world, signalled), world.transcript()
    assert world.outcomes == outcomes, world.transcript()
    assert max(world.seconds) < within, world.transcript()
    for rank in world.ranks:
        assert "garbage" not in rank.stdout, world.transcript()


def drained(world):
    """Every rank's device, which makes progress, has had its time."""
    for rank in world.ranks:
        assert rank.phase("drain")["outcome"] == "ok", world.transcript()
        assert (rank.phase("abort") or {}).get("outcome") not in ("ok", "timeout", "error"), (
            world.transcript()
        )


# -- a healthy program --


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ((), {}),
        (("--kind", "fsdp2"), {}),
        (("--groups", "2"), {}),
        (("--lazy",), {}),
        (("--thread",), {}),
        ((), {"TORCH_NCCL_USE_COMM_NONBLOCKING": "1"}),
        ((), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    ],
    ids=["ddp", "fsdp2", "groups", "lazy", "thread", "non-blocking", "expandable-segments"],
)
def test_training_with_the_host_ahead(world, arguments, settings):
    """All stop after the same step, and the devices catch up."""
    made = world("train", 2, "--ms", "60", *arguments, **settings)
    made.wait_for("^ahead 1[0-9]$")
    made.evict(0)
    check(made, ["clean", "clean"], within=15)
    drained(made)
    assert len({rank.report()["steps"]["stopped_at"] for rank in made.ranks}) == 1, made.transcript()


def test_a_synchronize_with_much_work_on_the_device(world):
    """The control of the two tests below: progress is seen, and waited for."""
    made = world("finish", 2, "--ms", "200", "--launches", "25")
    made.wait_for("^waiting")
    made.evict(0)
    check(made, ["partial", "partial"], within=20)
    drained(made)


def test_a_destroy_with_much_work_on_the_device(world):
    """A program at its healthy end: destroy waits for what was launched, and so does the agent."""
    made = world("finish", 2, "--ms", "200", "--launches", "25", "--wait", "destroy")
    made.wait_for("^waiting")
    time.sleep(0.5)
    made.evict(0)
    check(made, ["partial", "partial"], within=20)
    drained(made)


def test_a_blocking_wait_for_much_work(world):
    """With TORCH_NCCL_BLOCKING_WAIT torch keeps no count of what has ended."""
    settings = {"TORCH_NCCL_BLOCKING_WAIT": "1"}
    made = world("finish", 2, "--ms", "5000", "--launches", "1", "--wait", "work", **settings)
    made.wait_for("^waiting")
    made.evict(0)
    check(made, ["partial", "partial"], within=20)
    drained(made)


# -- something that never completes --


@pytest.mark.parametrize("wait", ["synchronize", "item", "work", "loop", "destroy"])
def test_a_collective_that_never_completes(world, wait):
    """The rank that waits aborts; its peer, which is idle, does not."""
    made = world("stuck", 2, "--absent", "1", "--wait", wait)
    made.wait_for("^waiting", "^absent")
    time.sleep(1)
    made.evict(0)
    check(made, ["aborted", "partial"], within=24)
    if wait != "destroy":  # it holds the lock that an abort takes (pytorch/pytorch#192105)
        assert made[0].phase("abort")["outcome"] == "ok", made.transcript()


def test_an_error_that_an_abort_has_caused_is_not_the_programs(world):
    """DDP's constructor compares the models of all ranks, and raises at what an abort leaves in its buffer."""
    later = {1: {"SIMULATED_ABORT_MS": 3000}}  # rank 0 waits for it, and has the time to raise
    made = world("stuck", 3, "--absent", "2", "--construct", each=later)
    made.wait_for("^waiting", "^waiting", "^absent")
    time.sleep(1)
    made.evict(0)
    check(made, ["aborted", "aborted", "partial"], within=20)


@pytest.mark.parametrize("wait", ["synchronize", "item"])
def test_a_thread_that_waits_comes_back_with_garbage(world, wait):
    """After an abort torch raises nothing: the wait returns, and the data is not reduced."""
    made = world("stuck", 2, "--absent", "1", "--thread", "--wait", wait)
    made.wait_for("^waiting", "^absent")
    time.sleep(1)
    made.evict(0)
    check(made, ["aborted", "partial"], within=24)


def test_the_collective_that_is_stuck_is_named(world):
    """Also where the ones before it have ended during a destroy, which no counter shows."""
    made = world("stuck", 2, "--absent", "1", "--wait", "destroy", "--good", "8", "--ms", "100")
    made.wait_for("^waiting", "^absent")
    time.sleep(2)
    made.evict(0)
    check(made, ["aborted", "partial"], within=24)
    # One all_reduce before `ready`, eight that end, and the one that does not.
    collective = made[0].report()["collective"]
    assert (collective["seq"], collective["op"]) == (10, "all_reduce"), made.transcript()


@pytest.mark.parametrize("takes", [5, 12])
def test_an_abort_that_returns_late(world, takes):
    """Nobody waits longer than until it has returned."""
    made = world("stuck", 2, "--absent", "1", settings={"abort_ms": str(takes * 1000)})
    made.wait_for("^waiting", "^absent")
    time.sleep(1)
    made.evict(0)
    check(made, ["aborted", "partial"], within=takes + 6)


def test_four_ranks_with_three_groups_abort_together(world, devices):
    """No abort frees memory that a peer's kernel still polls."""
    settings = {"abort_ms": str(int(TOGETHER * 1000))}
    made = world("stuck", 4, "--absent", "3", "--groups", "2", settings=settings)
    made.wait_for("^waiting", "^waiting", "^waiting", "^absent")
    time.sleep(1)
    made.evict(0)
    check(made, ["aborted", "aborted", "aborted", "partial"], within=15)
    by_group = {}
    for at, _, text in devices.journal:
        if "abort begins" in text:
            by_group.setdefault(text.split()[0], []).append(at)
    assert len(by_group) >= 3, made.transcript()
    assert all(max(times) - min(times) < TOGETHER for times in by_group.values()), made.transcript()


# -- a device in error, a peer that is lost --


def test_a_device_in_error(world, devices):
    """It breaks while it is drained. Its kernels are gone, an abort is refused: nothing is left to wait for."""
    made = world("broken", 2, "--absent", "1", "--ms", "3000")
    made.wait_for("^launched")
    made.evict(0)
    devices.expected = devices.faults
    assert "device-side assert" in made[1].phase("drain")["detail"], made.transcript()
    check(made, ["partial", "aborted"], within=10)


def test_nothing_was_aborted(world):
    """A rank that is blocked while its device is idle is left to its exit: that is no abort."""
    made = world("blocked", 2)
    made.wait_for("^waiting")
    time.sleep(1)
    made.evict(0)
    check(made, ["partial", "partial"], within=20)


@pytest.mark.parametrize("victim, within", [(2, 15), (0, 35)], ids=["a rank", "the hub"])
def test_a_peer_that_is_lost(world, devices, victim, within):
    """Those that wait for it are torn down by one decision, not each by its own clock.

    Without the hub nobody hears when the others have aborted: each stays until the floor.
    """
    made = world(
        *("stuck", 3, "--absent", str(victim), "--wait", "synchronize"),
        settings={"link": "net", "abort_ms": str(int(TOGETHER * 1000))},
        AUTOTEARDOWN_LOST="3",
    )
    waiting = ["^waiting"] * 3
    waiting[victim] = "^absent"
    made.wait_for(*waiting)
    time.sleep(1)
    made[victim].signal(signal.SIGKILL)
    made[victim].wait()
    made.wait_for_end(30)
    left = [rank for rank in made.ranks if rank is not made[victim]]
    assert [rank.code for rank in left] == [143, 143], made.transcript()
    assert [rank.report()["outcome"] for rank in left] == ["aborted", "aborted"], made.transcript()
    assert max(rank.ended for rank in left) - made[victim].ended < within, made.transcript()
    begins = [at for rank in left for at in devices.times_of("abort begins", rank.pid)]
    assert len(begins) == 2 and max(begins) - min(begins) < TOGETHER, made.transcript()
