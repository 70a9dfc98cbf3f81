"""No checkpoint is interrupted while time is left."""

import json
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import NONE, SIGTERM, needs_torch, wait_until

EVICTIONS = int(os.environ.get("CHECKPOINT_EVICTIONS", "20"))


def whole(job):
    """Whether everything that the job saved can be loaded; how many files that is."""
    count = 0
    for path in (job.folder / "saved").glob("*.pt"):
        loaded = torch.load(path, weights_only=False)
        assert loaded["model"]["weight"].shape == (64, 64)
        assert loaded.get("slow", "whole") == "whole"
        count += 1
    for path in (job.folder / "saved").glob("by_hand"):
        assert path.read_text() == "half, whole"
        count += 1
    for path in (job.folder / "saved").glob("dcp"):
        state = {"model": torch.nn.Linear(64, 64).state_dict()}
        dcp.load(state, checkpoint_id=path)
        count += 1
    return count


@pytest.mark.parametrize("stop_at", ["step", "now"])
@pytest.mark.parametrize("how", ["path", "file", "protect", "nested", "dcp"])
def test_a_save_in_progress_is_waited_for(job, how, stop_at):
    """`torch.save`, `torch.distributed.checkpoint`, `protect()` by the training thread."""
    # Longer than the drain time-out at this grace period (1.5 s), in which a thread has to park.
    ranks = job.world(
        "checkpoint.py",
        2 if how == "dcp" else 1,
        how,
        1.8,
        AUTOTEARDOWN_STOP_AT=stop_at,
        AUTOTEARDOWN_GRACE=12,
    )
    ranks[0].wait_for("saving")
    ranks[0].signal()
    assert ranks[0].outlast(12) == 0, ranks[0].transcript()
    assert whole(job) == 1
    # Where it stops is the program's iteration only if it is asked for.
    expected = "clean" if stop_at == "step" else "partial"
    assert ranks[0].report()["outcome"] == expected, ranks[0].transcript()


@pytest.mark.parametrize("how", ["thread", "async"])
def test_a_save_on_another_thread_is_waited_for(job, how):
    """The same for a save that goes on beside the training: the process does not leave under it."""
    (rank,) = job.world("checkpoint.py", 1, how, 1.8, AUTOTEARDOWN_GRACE=12)
    rank.wait_for("saving")
    assert rank.evict(12) == 0, rank.transcript()
    assert whole(job) == 1, rank.transcript()


@needs_torch(2, 7, "it cannot save in another process")
@pytest.mark.parametrize("everybody", [False, True], ids=["the rank", "all processes"])
def test_a_save_in_another_process_is_waited_for(job, everybody):
    """DCP's own process, a rank of a group of its own; it may get a signal itself (torchrun's `killpg`)."""
    ranks = job.world("checkpoint.py", 2, "process", 4, AUTOTEARDOWN_GRACE=20)
    ranks[0].wait_for("saving")
    for pid in job.survivors() if everybody else [ranks[0].pid]:
        os.kill(pid, SIGTERM)
    codes = []
    for rank in ranks:
        rank.signalled = time.monotonic()
        codes.append(rank.outlast(20))
    assert codes == ([0, 0] if everybody else [0, 143]), ranks[0].transcript()
    assert whole(job) == 1, ranks[0].transcript()
    wait_until(lambda: not job.survivors(), "the end of DCP's processes")
    outcomes = [json.loads(path.read_text())["outcome"] for path in job.reports.glob("*Z.json")]
    assert outcomes == ["clean"] * 4, ranks[0].transcript()


def test_control_a_save_in_progress(job):
    """The control: without protection the save is cut."""
    (rank,) = job.world("checkpoint.py", 1, "path", mode=NONE)
    rank.wait_for("saving")
    assert rank.evict() == -SIGTERM
    with pytest.raises((RuntimeError, EOFError)):
        whole(job)


@pytest.mark.parametrize("how", ["path", "protect"])
def test_a_save_longer_than_the_time_left(job, how):
    """`while time is left`: a save that does not end does not keep the rank beyond its grace period."""
    (rank,) = job.world("checkpoint.py", 1, how, 3600, AUTOTEARDOWN_EXIT_CODE="signal")
    rank.wait_for("saving")
    assert rank.evict() == 128 + SIGTERM, rank.transcript()
    assert "take_time" in str(rank.report()["stuck"])


def test_a_peer_in_a_save(job):
    """A rank that is told by a peer while it saves finishes the save first, and the peer waits for it or leaves."""
    ranks = job.world("checkpoint.py", 2, "path", 1.0, AUTOTEARDOWN_GRACE=12)
    ranks[0].wait_for("saving")
    ranks[1].signal()
    assert ranks[1].outlast(12) == 0, ranks[1].transcript()
    ranks[0].signalled = ranks[1].signalled
    assert ranks[0].outlast(12) == 143, ranks[0].transcript()
    assert whole(job) == 1


def test_protect_leaves_at_the_end_of_the_block(job):
    """`protect()` holds the stop off, not the notice: the thread parks soon after the block."""
    (rank,) = job.world("checkpoint.py", 1, "protect", 0.5, AUTOTEARDOWN_STOP_AT="now")
    rank.wait_for("saving")
    assert rank.evict() == 0, rank.transcript()
    assert "step 5" not in rank.stdout
    assert rank.report()["outcome"] == "partial"  # not at the end of an iteration


def test_saves_are_the_programs_own(job):
    """What raises in a save or in a protected block still raises, and values are passed through."""
    rank = job.start(
        """
        import io, pickle, sys
        import autoteardown, torch, torch.distributed as dist
        if len(sys.argv) > 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            torch.save({"unpicklable": lambda: None}, io.BytesIO())
        except (pickle.PicklingError, AttributeError) as error:
            print("save raised", flush=True)
        try:
            with autoteardown.protect():
                1 / 0
        except ZeroDivisionError:
            print("block raised", flush=True)
        print(torch.save([], io.BytesIO()), flush=True)
        """,
        "armed",
    )
    assert rank.wait() == 0, rank.transcript()
    assert rank.stdout.splitlines() == ["save raised", "block raised", "None"]


def evict_at_random(job, seed):
    """One world that saves after every step, one eviction."""
    chance = random.Random(seed)
    ranks = job.world("checkpoint.py", 2, "every", AUTOTEARDOWN_STOP_AT=chance.choice(["step", "now"]))
    ranks[0].wait_for("^step 5$")
    time.sleep(chance.uniform(0, 0.05))
    victim = chance.choice(ranks)
    victim.signal()
    for rank in ranks:
        rank.signalled = victim.signalled
        assert rank.outlast() == (0 if rank is victim else 143), rank.transcript()
    assert whole(job) == 4, "a file for each of the last four steps"


@pytest.mark.parametrize("seed", range(EVICTIONS))
def test_every_checkpoint_loads(job, seed):
    """A checkpoint every step, evictions at random times: every checkpoint file on disk loads."""
    evict_at_random(job, seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hundred", [1])
def test_a_hundred_evictions(job, hundred):
    """The same with a hundred evictions."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        evict_at_random(job, seed)


def test_control_checkpoints_are_cut(job):
    """The control: SIGKILL at the same place does cut a save in half, so the test above can fail."""
    for seed in range(200):
        (rank,) = job.world("checkpoint.py", 1, "every", mode=NONE)
        rank.wait_for("^step 5$")
        time.sleep(random.Random(seed).uniform(0, 0.02))
        rank.signal(signal.SIGKILL)
        rank.wait()
        try:
            whole(job)
        except (RuntimeError, EOFError):
            return
    raise AssertionError(f"{seed + 1} kills have not cut a single checkpoint")


# -- a checkpoint is more than one file ------------------------------------------------------------------------

WHOLE = {
    "pair": ["model", "optimizer"],
    "rename": ["x.pt"],
    "bytes": ["file"],
    "five": ["0.pt", "1.pt", "2.pt", "3.pt", "4.pt"],
    "forked": ["file"],
    "late": ["file"],
    "worker": ["file", "other"],
    "grandchild": ["file"],
    "slow": ["file"],
}


def files(job):
    """What is in the folder; all of it is whole."""
    found = sorted((job.folder / "saved").iterdir())
    for path in found:
        if path.suffix == ".pt":
            torch.load(path)
        elif path.suffix != ".tmp":
            assert path.read_text() == "half, whole", path
    return [path.name for path in found]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("how", WHOLE)
def test_a_checkpoint_is_waited_for(job, how, who):
    """Not one file of it: whichever rank is evicted, all the files are there, under their final names."""
    # A child's end is waited for at the exit, too: for 3 s.
    longer = dict.fromkeys(["forked", "worker", "grandchild"], 4.5)
    seconds = {"five": 2.0, "rename": 0.4, **longer}.get(how, 1.8)
    ranks = job.world("whole_checkpoint.py", 2, how, seconds, AUTOTEARDOWN_GRACE=16)
    ranks[0].wait_for("saving")
    ranks[who].signal()
    for rank in ranks:
        rank.signalled = ranks[who].signalled
        assert rank.outlast(16) == (0 if rank is ranks[who] else 143), rank.transcript()
    assert files(job) == WHOLE[how], ranks[0].transcript()


@pytest.mark.parametrize("how", ["rename", "five"])
def test_between_two_files_of_a_checkpoint(job, how):
    """No iteration is waited for here: that a save has ended a moment ago is all that holds the stop off."""
    (rank,) = job.world(
        "whole_checkpoint.py",
        1,
        how,
        {"five": 2.0}.get(how, 0.4),
        AUTOTEARDOWN_GRACE=16,
        AUTOTEARDOWN_STOP_AT="now",
    )
    rank.wait_for("saving")
    assert rank.evict(16) == 0, rank.transcript()
    assert files(job) == WHOLE[how], rank.transcript()


def test_a_slow_disk(job):
    """Ten seconds for a checkpoint, of a grace period of 25: it is all there."""
    ranks = job.world("whole_checkpoint.py", 2, "slow", 10, AUTOTEARDOWN_GRACE=25)
    ranks[0].wait_for("saving")
    ranks[1].signal()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        assert rank.outlast(25) == (0 if rank is ranks[1] else 143), rank.transcript()
    assert files(job) == ["file"]


def test_a_disk_that_is_too_slow(job):
    """If the grace period ends first, it is not under its final name."""
    ranks = job.world("whole_checkpoint.py", 2, "slow", 60, AUTOTEARDOWN_GRACE=8)
    ranks[0].wait_for("saving")
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(8) != -signal.SIGKILL, rank.transcript()
    assert files(job) == ["x.tmp"]


@pytest.mark.parametrize("how", ["pair", "five"])
def test_control_a_checkpoint_is_cut(job, how):
    """The control: without protection a part of it is there."""
    (rank,) = job.world("whole_checkpoint.py", 1, how, mode=NONE)
    rank.wait_for("saving")
    assert rank.evict() == -SIGTERM
    with pytest.raises(AssertionError):
        assert files(job) == WHOLE[how]
