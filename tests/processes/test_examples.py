"""The examples: evicted, started again, and compared with an uninterrupted run."""

import re
from pathlib import Path

import pytest
from harness import FSDP2_ON_CPUS, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENT = {"AUTOTEARDOWN_GRACE": 25}
LOSS = re.compile(r"^rank (\d) step (\d+) loss ([\d.]+)$", re.MULTILINE)


def losses(ranks):
    """What the ranks have printed, by rank and step."""
    found = {}
    for rank in ranks:
        found.update({(int(who), int(step)): float(loss) for who, step, loss in LOSS.findall(rank.stdout)})
    return found


def evict_and_resume(job, example, output, option, codes, **environment):
    """Two ranks: evicted in mid-training, resumed, and the same from the start; returns all processes."""
    example = str(EXAMPLES / example)
    options = {"fresh": True, **PATIENT, **environment}
    before = job.world(example, 2, option, output, **options)
    wait_until(lambda: any(int(step) > 20 for _, step, _ in LOSS.findall(before[0].stdout)), "twenty steps")
    before[1].signal()
    for rank, code in zip(before, codes):
        rank.signalled = before[1].signalled
        assert rank.outlast(25) == code, rank.transcript()
    stopped = max(step for _, step in losses(before))
    enough = str(stopped + 10)
    after = job.world(example, 2, option, output, "--steps", enough, **options)
    control = job.world(example, 2, option, str(output) + "-control", "--steps", enough, **options)
    for rank in after + control:
        assert rank.wait() == 0, rank.transcript()
    first = min(step for _, step in losses(after))
    assert first == stopped + 1, "no step is lost, and none is done twice"
    together, whole = {**losses(before), **losses(after)}, losses(control)
    assert together.keys() == whole.keys()
    assert together == pytest.approx(whole, rel=2e-3, abs=2e-5)
    return before, after


@pytest.mark.timeout(240)
def test_ddp_with_stop_requested(job, tmp_path):
    """One line."""
    evict_and_resume(job, "ddp_stop_requested.py", tmp_path / "state.pt", "--checkpoint", (0, 0))


@FSDP2_ON_CPUS
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fsdp_with_on_teardown(job, tmp_path):
    """A callback."""
    evict_and_resume(job, "fsdp_on_teardown.py", tmp_path / "state", "--checkpoint", (143, 0))


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_hf_trainer_unchanged(job, tmp_path):
    """None: the Trainer's own checkpoint, and nothing after `train()` runs."""
    pytest.importorskip("transformers")
    before, after = evict_and_resume(
        job, "hf_trainer.py", tmp_path / "run", "--output", (143, 0), AUTOTEARDOWN_CHECKPOINT="on"
    )
    assert not any("trained" in rank.stdout for rank in before)
    assert all("trained" in rank.stdout for rank in after)
    assert not list((tmp_path / "run").glob("unfinished*"))


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_lightning_unchanged(job, tmp_path):
    """None: Lightning's own checkpoint, which `ckpt_path="last"` finds."""
    pytest.importorskip("lightning")
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    code = SIGTERMException().code or 0
    evict_and_resume(
        job, "lightning_fit.py", tmp_path / "run", "--output", (code, code), AUTOTEARDOWN_CHECKPOINT="on"
    )
