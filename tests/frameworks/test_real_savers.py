"""The agent waits for a whole checkpoint that real packages write, on a slow disk."""

import signal

import pytest
import slow_disk
from harness import wait_until

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(300)]
PACKAGES = {
    "safetensors": "safetensors",
    "ignite": "ignite",
    "accelerate": "accelerate",
    "megatron": "megatron.core.dist_checkpointing",
    "persistent": "megatron.core.dist_checkpointing",
}
ATOMIC = ["ignite", "megatron", "persistent"]


def saving(job, how, seconds, grace):
    """Two ranks, the first of which is in the middle of a checkpoint that takes about so many seconds."""
    pytest.importorskip(PACKAGES[how])
    size = {"safetensors": 65536, "ignite": 68000, "accelerate": 85000}.get(how, 67000)
    folder = job.folder / "saved"
    environment = slow_disk.environment(folder, size / seconds)
    ranks = job.world("fw_savers.py", 2, how, fresh=True, AUTOTEARDOWN_GRACE=grace, **environment)
    ranks[0].wait_for("^saving$", 120)
    wait_until(lambda: any(path.stat().st_size for path in folder.rglob("*") if path.is_file()), "bytes")
    return ranks, folder


def load(how, folder):
    """All that is there, each in its own way; it is whole."""
    import torch

    if how == "safetensors":
        from safetensors.torch import load_file

        assert load_file(folder / "model.safetensors")["weight"].shape == (128, 128)
        return ["model.safetensors"]
    if how == "accelerate":
        from safetensors.torch import load_file

        assert load_file(folder / "model.safetensors")["weight"].shape == (128, 128)
        for name in ("optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"):
            torch.load(folder / name, weights_only=False)
        return sorted(path.name for path in folder.iterdir())
    found = sorted(folder.glob("*.pt"))
    for path in found:
        content = torch.load(path, weights_only=False)
        assert content.get("model", content)["weight"].shape == (128, 128)
    return [path.name for path in found]


@pytest.mark.parametrize(
    ("how", "who"), [("safetensors", 0), ("ignite", 1), ("accelerate", 1), ("megatron", 0), ("persistent", 0)]
)
def test_a_slow_disk(job, how, who):
    """Ten seconds, of a grace period of 30: all of it is there, whichever rank is evicted (rank 0 saves)."""
    ranks, folder = saving(job, how, 10, 30)
    ranks[who].signal()
    for rank in ranks:
        rank.signalled = ranks[who].signalled
        assert rank.outlast(30) == (0 if rank is ranks[who] else 143), rank.transcript()
    assert load(how, folder), ranks[0].transcript()


@pytest.mark.parametrize("how", ATOMIC)
def test_a_disk_that_is_too_slow(job, how):
    """If the grace period ends first, it is not under its final name."""
    ranks, folder = saving(job, how, 120, 8)
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(8) != -signal.SIGKILL, rank.transcript()
    assert load(how, folder) == []


def test_a_writer_that_has_nothing_to_write(job):
    """Megatron-core's persistent one between two checkpoints: as if it were not there."""
    ranks, folder = saving(job, "persistent", 0.2, 30)
    wait_until((folder / "model.pt").exists, "the checkpoint")
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(30) == (0 if rank is ranks[0] else 143), rank.transcript()
        assert rank.report()["outcome"] == "clean", rank.transcript()
    assert load("persistent", folder), ranks[0].transcript()
