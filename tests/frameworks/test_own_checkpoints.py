"""`AUTOTEARDOWN_CHECKPOINT=on`: what each framework writes by itself. HF Trainer, Lightning: see test_examples.py."""

import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(240)]
PATIENT = {"AUTOTEARDOWN_GRACE": 25, "AUTOTEARDOWN_CHECKPOINT": "on"}


def test_accelerate_saves_its_state(job, tmp_path):
    """`save_state` of what is registered, at the agreed iteration, under its name when it is whole."""
    pytest.importorskip("accelerate")
    ranks = job.world("fw_accelerate_save.py", 2, tmp_path, fresh=True, **PATIENT)
    for rank in ranks:
        rank.wait_for("step 10$")
    ranks[0].signal()
    for rank, code in zip(ranks, (0, 143)):
        rank.signalled = ranks[0].signalled
        assert rank.outlast(25) == code, rank.transcript()
    (stopped,) = {rank.report()["steps"]["stopped_at"] for rank in ranks}
    assert {rank.report()["outcome"] for rank in ranks} == {"clean"}, ranks[0].transcript()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["autoteardown-checkpoint"]
    again = job.world("fw_accelerate_save.py", 2, tmp_path, "load", fresh=True, AUTOTEARDOWN_GRACE=25)
    for rank in again:
        assert rank.wait() == 0, rank.transcript()
        assert f"loaded {{{stopped}}}" in rank.stdout, rank.transcript()


def test_off_by_default(job, tmp_path):
    """The control: without the setting nothing is written."""
    pytest.importorskip("accelerate")
    (rank,) = job.world("fw_accelerate_save.py", 1, tmp_path, fresh=True)
    rank.wait_for("step 10$")
    rank.evict()
    assert not list(tmp_path.glob("*checkpoint*"))
