"""The libraries do what README.md says, without the agent: the other tests here rely on that."""

import signal
from pathlib import Path

import pytest
import torch
from harness import NONE


def compare(first, second):
    """Two checkpoints: the same losses and the same weights, but for the order of additions."""
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-5)
    for one, other in zip(first["weights"], second["weights"]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_a_training_computes_what_it_computes_on_cpus(world, tmp_path, optimizer):
    """Two ranks with DDP: NCCL on the devices against gloo on CPUs."""
    arguments = ("--steps", "8", "--optimizer", optimizer, "--ms", "1", "--out")
    for device in ("cuda", "cpu"):
        made = world("train", 2, *arguments, str(tmp_path / device), "--device", device, mode=NONE)
        made.wait_for("^trained")
        made.wait_for_end(60)
        assert [rank.code for rank in made.ranks] == [0, 0], made.transcript()
    for rank in range(2):
        on_devices, on_cpus = (torch.load(tmp_path / f"{device}-{rank}") for device in ("cuda", "cpu"))
        compare(on_devices, on_cpus)
        assert on_devices["losses"][-1] < on_devices["losses"][0]


def test_the_host_runs_ahead_of_its_device(world):
    """An input that is on the device already does not hold it up."""
    made = world("train", 2, "--ms", "100", mode=NONE)
    made.wait_for("^ahead 15$")


@pytest.mark.parametrize("link, faults", [("nvlink", 1), ("net", 0)])
def test_a_rank_that_is_killed_under_a_running_kernel(world, devices, link, faults):
    """Over NVLink its peer faults for good; over a network it waits for ever."""
    made = world("stuck", 2, "--absent", "1", mode=NONE, settings={"link": link})
    made[0].wait_for("^waiting")
    made[1].signal(signal.SIGKILL)
    made[1].wait()
    if faults:
        assert made[0].wait() not in (0, -9), made.transcript()
        assert "Invalid access of peer GPU memory over nvlink" in made[0].stderr, made.transcript()
    else:
        made[0].wait_blocked("waiting")
        assert "garbage" not in made[0].stdout
    devices.expected = devices.faults
    assert len(devices.faults) == faults, made.transcript()


def test_a_healthy_end(world, devices):
    """Destroy waits for the device, and all ranks leave together."""
    made = world("finish", 2, "--ms", "50", "--wait", "destroy", mode=NONE)
    made.wait_for("^finished")
    last = [max(devices.times_of("destroy begins", rank.pid)) for rank in made.ranks]
    ends = [min(devices.times_of("destroy ends", rank.pid)) for rank in made.ranks]
    assert max(last) <= min(ends), made.transcript()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"TORCH_NCCL_USE_COMM_NONBLOCKING": "1"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"},
    ],
    ids=["as it is", "non-blocking", "expandable segments", "no watchdog"],
)
def test_the_ways_to_use_the_class(job, devices, libraries, settings):
    """Messages, coalescing, side streams, graphs, new and split groups, gathering and scattering: right numbers."""
    program = str(Path(__file__).parent / "ways.py")
    ranks = job.world(program, 2, mode=NONE, fresh=True, **libraries, **devices.settings(), **settings)
    for rank in ranks:
        assert rank.wait(240) == 0, f"{rank.transcript()}\n{devices.transcript()}"
        assert len(rank.stdout.split()) == 7
