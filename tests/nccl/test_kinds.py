"""Evictions of trainings of many kinds: all stop after the same iteration, and release the group together."""

import json
import os

import pytest
from harness import TESTS, wait_until

from nccl.conftest import AGENT_PATH, START

KINDS = TESTS / "nccl" / "kinds.py"
GRACE = 25


def started(job, devices, libraries, kind, size, **settings):
    """A world of this kind."""
    env = {"AUTOTEARDOWN_GRACE": GRACE, **devices.settings(devices=str(size)), **libraries, **settings}
    options = {"fresh": True, "launcher": ("env", f"PYTHONPATH={AGENT_PATH}"), **env}
    return job.world(str(KINDS), size, kind, **options)


def evicted(job, devices, libraries, kind, size=2, **settings):
    """A world of this kind, its last rank evicted."""
    ranks = started(job, devices, libraries, kind, size, **settings)
    for rank in ranks:
        rank.wait_for("^step 12$", START)
    ranks[-1].signal()
    stopped(ranks, devices)


def stopped(ranks, devices):
    """All after the same iteration, clean; the last one was signalled."""

    def transcript():
        return "\n\n".join([devices.transcript(), *(rank.transcript() for rank in ranks)])

    codes = [rank.outlast(GRACE) for rank in ranks]
    assert codes == [143] * (len(ranks) - 1) + [0], transcript()
    assert [rank.report()["outcome"] for rank in ranks] == ["clean"] * len(ranks), transcript()
    assert len({rank.report()["steps"]["stopped_at"] for rank in ranks}) == 1, transcript()


@pytest.mark.parametrize(
    "kind",
    [
        *("tensor", "pipeline", "1f1b", "prefetch", "compiled", "loader", "streams", "coalesced"),
        *("groups", "split", "replayed"),
    ],
)
def test_of_two(job, devices, libraries, kind):
    evicted(job, devices, libraries, kind)


@pytest.mark.parametrize("kind", ["sharded", "pipeline", "1f1b"])
def test_of_four(job, devices, libraries, kind):
    evicted(job, devices, libraries, kind, 4)


def test_a_group_that_was_shrunk(job, devices, libraries):
    """The ranks that are left stop together, as a world of their own."""
    ranks = started(job, devices, libraries, "shrunk", 3)
    for rank in ranks[:2]:
        rank.wait_for("^step 12$", START)
    assert ranks[2].wait(GRACE) == 0
    (entry,) = job.runtime.glob(f"{ranks[1].pid}-*.json")
    assert json.loads(entry.read_text())["world_size"] == 2
    ranks[1].signal()
    stopped(ranks[:2], devices)


@pytest.mark.parametrize(
    "settings",
    [
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"},
        {"TORCH_NCCL_ENABLE_MONITORING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "2"},
        {"TORCH_NCCL_ENABLE_MONITORING": "0"},
        {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_TRACE_BUFFER_SIZE": "0"},
        {"TORCH_NCCL_ENABLE_TIMING": "1", "TORCH_NCCL_CUDA_EVENT_CACHE": "0"},
    ],
    ids=[
        *("no error handling", "tear down", "clean up only", "heartbeat", "no monitor"),
        *("no recorder", "timing"),
    ],
)
def test_with_settings(job, devices, libraries, settings):
    evicted(job, devices, libraries, "streams", **settings)


def test_four_ranks_under_torchrun(job, devices, libraries):
    """SIGTERM to the launcher; the device of each rank is that of its LOCAL_RANK."""
    env = {"AUTOTEARDOWN_GRACE": GRACE, **devices.settings(devices="4"), **libraries}
    launcher = job.torchrun(str(KINDS), "split", ranks=4, launcher=("env", f"PYTHONPATH={AGENT_PATH}"), **env)
    wait_until(lambda: launcher.count("step 12") == 4 or not launcher.running, "the training", START)
    launcher.signal()
    launcher.wait(GRACE + 10)
    reports = job.all_reports()
    assert [reports[rank]["outcome"] for rank in range(4)] == ["clean"] * 4, launcher.transcript()
    assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1, launcher.transcript()
    assert not [entry for entry in os.listdir(job.runtime) if entry.endswith(".json")], launcher.transcript()
