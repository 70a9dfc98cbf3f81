"""`on_teardown` callbacks may save, also collectively: every rank stopped, devices idle, the group alive."""

import re

import pytest
import torch
from harness import FSDP2_ON_CPUS, NONE

PATIENT = {"AUTOTEARDOWN_GRACE": 16}


def started(job, how, ranks=2, **options):
    """A world in mid-training."""
    world = job.world("on_teardown.py", ranks, how, **{**PATIENT, **options})
    for rank in world:
        rank.wait_for("^step 3$")
    return world


def evicted(ranks, outcome="clean", grace=16):
    """One of them is evicted: all are out in time, with the contract's codes, and stopped at the same iteration."""
    ranks[1].signal()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        assert rank.outlast(grace) == (0 if rank is ranks[1] else 143), rank.transcript()
    reports = [rank.report() for rank in ranks]
    assert [report["outcome"] for report in reports] == [outcome] * len(ranks), ranks[0].transcript()
    (stopped,) = {report["steps"]["stopped_at"] for report in reports}
    return stopped, reports


def same_weights(job, ranks, stopped):
    """Each rank has saved what it had after the agreed iteration."""
    states = [torch.load(job.folder / f"saved/{number}.pt") for number in range(ranks)]
    assert {state["step"] for state in states} == {stopped}
    for name in states[0]["model"]:
        assert all(torch.equal(state["model"][name], states[0]["model"][name]) for state in states)


def test_torch_save(job):
    """`torch.save` in a callback is not stopped by our own save hook."""
    stopped, _ = evicted(started(job, "torch"))
    same_weights(job, 2, stopped)


@FSDP2_ON_CPUS
@pytest.mark.parametrize("how", ["fsdp", "async"])
def test_a_sharded_checkpoint(job, how):
    """`dcp.save` and `dcp.async_save` with FSDP2, collective; it loads, and goes on as an uninterrupted run."""
    stopped, _ = evicted(started(job, how))
    check = job.start("on_teardown.py", "compare", mode=NONE)
    assert check.wait() == 0, check.transcript()
    assert check.stdout.split()[-1] == str(stopped)


def test_a_callback_that_fails(job):
    """It is said, the stop goes on, and it is not called clean."""
    ranks = started(job, "fails")
    _, reports = evicted(ranks, "partial")
    (why,) = {report["why"] for report in reports}  # the first rank's, on every rank
    assert re.fullmatch(r"rank \d: on_teardown callback failed: .*", why)
    assert "No space left" in str(ranks[0].log_lines)


def test_a_callback_that_hangs(job):
    """It has what the grace period leaves, and no more."""
    ranks = started(job, "hangs", AUTOTEARDOWN_GRACE=10)
    _, reports = evicted(ranks, "partial", grace=10)
    (why,) = {report["why"] for report in reports}
    assert re.fullmatch(r"rank \d: an on_teardown callback did not return in time", why)


@pytest.mark.parametrize("name", ["__main__:save", "on_teardown_plugin:save"])
def test_by_name(job, name):
    """AUTOTEARDOWN_ON_TEARDOWN, for programs that must not be changed: a function of theirs, or of a module beside."""
    world = job.world("on_teardown.py", 2, "named", fresh=True, AUTOTEARDOWN_ON_TEARDOWN=name, **PATIENT)
    for rank in world:
        rank.wait_for("^step 3$")
    stopped, _ = evicted(world)
    same_weights(job, 2, stopped)


@pytest.mark.parametrize(
    "name", ["nowhere:save", "on_teardown_plugin:nothing", "__main__:nothing", "on_teardown_script:save"]
)
def test_a_name_of_nothing(job, name):
    """Said when the rank starts (but for `__main__`, which is not complete yet), and again at the eviction."""
    world = job.world("on_teardown.py", 2, "named", fresh=True, AUTOTEARDOWN_ON_TEARDOWN=name, **PATIENT)
    for rank in world:
        rank.wait_for("^step 3$")
        said = [text for text in rank.log_lines if "AUTOTEARDOWN_ON_TEARDOWN" in text]
        assert len(said) == (0 if name.startswith("__main__") else 1), rank.transcript()
    _, reports = evicted(world, "partial")
    assert all("on_teardown callback failed" in report["why"] for report in reports), reports
