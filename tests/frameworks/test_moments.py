"""`AUTOTEARDOWN_CHECKPOINT=on`: one training, evicted at its start, in training, in an evaluation and while it saves.

Each time it is started again, as a scheduler would; in the end its losses are those of a run that nobody has evicted.
"""

import re
import signal

import pytest
import slow_disk
from harness import wait_until

# Slow: two minutes each.
pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(600)]
GRACE = 25
STEPS = 40
START = 120.0
LOSS = re.compile(r"^rank (\d) step (\d+) loss ([\d.]+)$", re.MULTILINE)
# Bytes a second: a checkpoint takes a second or two.
RATE = 60_000


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No hub, no configuration of the user's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def losses(ranks):
    """What the ranks have printed, by rank and step."""
    found = {}
    for rank in ranks:
        found.update({(int(who), int(step)): float(loss) for who, step, loss in LOSS.findall(rank.stdout)})
    return found


class Training:
    """One training, in as many attempts as it takes."""

    def __init__(self, job, framework, folder):
        self.job, self.framework, self.folder = job, framework, folder
        folder.mkdir()
        self.losses = {}
        self.resumed_after = 0  # the step that the last attempt began after

    def start(self):
        """Another attempt."""
        return self.job.world(
            "fw_moments.py",
            2,
            self.framework,
            self.folder,
            STEPS,
            fresh=True,
            AUTOTEARDOWN_GRACE=GRACE,
            AUTOTEARDOWN_CHECKPOINT="on",
            HF_HUB_OFFLINE=1,
            **slow_disk.environment(self.folder, RATE),
        )

    def evict(self, ranks, codes):
        """Its rank 1 is; all are out in time."""
        ranks[1].signal()
        for rank, code in zip(ranks, codes):
            rank.signalled = ranks[1].signalled
            assert rank.outlast(GRACE) == code, rank.transcript()
            assert "over\n" not in rank.stdout
        self.take(ranks)

    def take(self, ranks):
        """Its losses go on where it was resumed."""
        said = losses(ranks)
        if said:
            first = min(step for _, step in said)
            done = max((step for _, step in self.losses), default=0)
            assert first <= done + 1, (
                f"steps {done + 1} to {first - 1} were never done: {ranks[0].transcript()}"
            )
            self.resumed_after = first - 1
        self.losses.update(said)

    @property
    def done(self):
        """Steps so far."""
        return max((step for _, step in self.losses), default=0)


def at_step(ranks, step):
    """Training is there."""
    for rank in ranks:
        rank.wait_for(rf"^rank \d step {step} ", START)


def finish(training):
    """To its end, undisturbed."""
    stopped = training.done
    ranks = training.start()
    for rank in ranks:
        assert rank.wait(START) == 0, rank.transcript()
        assert "over\n" in rank.stdout
    training.take(ranks)
    assert training.resumed_after == stopped, "no step was lost"


def as_uninterrupted(job, training, folder):
    """Its losses are those of a run that nobody evicts."""
    control = Training(job, training.framework, folder)
    finish(control)
    assert training.losses.keys() == control.losses.keys()
    assert training.losses == pytest.approx(control.losses, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize(
    ("framework", "package", "codes"),
    [
        ("trainer", "transformers", (143, 0)),
        ("lightning", "lightning", (0, 0)),
        ("accelerate", "accelerate", (143, 0)),
    ],
)
def test_four_evictions(job, tmp_path, framework, package, codes):
    """In start-up, in training, in an evaluation, in a save: no step is lost, and none goes wrong."""
    pytest.importorskip(package)
    training = Training(job, framework, tmp_path / "run")

    ranks = training.start()
    for rank in ranks:
        rank.wait_for("^starting$", START)
    if framework == "lightning":  # whose handler is not there yet: there is nothing to save with
        training.evict(ranks, (143, 0))
        training.losses.clear()
    else:
        training.evict(ranks, codes)
    stopped = training.done
    assert stopped <= 2, "in its first steps, if the framework has got so far"

    ranks = training.start()
    at_step(ranks, 4)
    training.evict(ranks, codes)
    assert training.resumed_after == stopped, "no step was lost"
    stopped = training.done
    assert 4 <= stopped < 12, "before its first evaluation"

    ranks = training.start()
    for rank in ranks:
        rank.wait_for("^evaluating$", START)
    training.evict(ranks, codes)
    assert training.resumed_after == stopped, "no step was lost"
    stopped = training.done
    assert stopped in (12, 13)

    ranks = training.start()
    at_step(ranks, 14)
    before = set(training.folder.rglob("*"))
    wait_until(lambda: set(training.folder.rglob("*")) - before, "a checkpoint that is being written")
    training.evict(ranks, codes)
    assert training.resumed_after == stopped, "no step was lost"

    finish(training)
    as_uninterrupted(job, training, tmp_path / "control")


def test_trl(job, tmp_path):
    """As the Trainer that it is built on."""
    pytest.importorskip("trl")
    training = Training(job, "trl", tmp_path / "run")
    ranks = training.start()
    at_step(ranks, 4)
    training.evict(ranks, (143, 0))
    assert 4 <= training.done < 7, "before its first own checkpoint"
    finish(training)
    as_uninterrupted(job, training, tmp_path / "control")


@pytest.mark.parametrize(
    ("framework", "package", "pattern"),
    [("trainer", "transformers", "checkpoint-*"), ("accelerate", "accelerate", "checkpoint*_*")],
)
def test_a_checkpoint_that_cannot_be_finished(job, tmp_path, framework, package, pattern):
    """The disk is too slow: out in time, and nothing that looks whole is left."""
    pytest.importorskip(package)
    folder = tmp_path / "run"
    ranks = job.world(
        "fw_moments.py",
        2,
        framework,
        folder,
        fresh=True,
        AUTOTEARDOWN_GRACE=10,
        AUTOTEARDOWN_CHECKPOINT="on",
        **slow_disk.environment(folder, 2000),
    )
    at_step(ranks, 3)
    ranks[1].signal()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        assert rank.outlast(10) != -signal.SIGKILL, rank.transcript()
    assert list(folder.glob("*unfinished*")), "it was being written"
    assert not list(folder.rglob(pattern)), ranks[0].transcript()
