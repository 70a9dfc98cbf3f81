"""Collectives of other threads are no iteration: a checkpoint writer, a logger, a data service at its own pace."""

import pytest
from background_runs import STYLES, begun, judge
from harness import needs_torch

GRACE = 20


def evicted(job, what, style, victim, *more):
    """A world of two, evicted while the other thread's collectives are under way; judged."""
    ranks = job.world("background.py", 2, "cpu", what, style, *more, AUTOTEARDOWN_GRACE=GRACE)
    begun(ranks, 120)
    ranks[victim].signal()
    codes = [rank.outlast(GRACE) for rank in ranks]

    def transcript():
        return "\n".join(rank.transcript() for rank in ranks)

    own = 0 if style in ("flag", "poll") else 143
    assert codes == [0 if index == victim else own for index in range(2)], transcript()
    judge(job, ranks, what, style, transcript, uneven="--uneven" in more)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("what", ["async", "group"])
def test_another_thread_at_its_own_pace(job, what, style):
    """The same iteration, saved, clean, and DCP's own save is whole."""
    evicted(job, what, style, 0)


def test_the_rank_whose_part_takes_longer(job):
    """The signal comes to the rank that has launched less."""
    evicted(job, "async", "callback", 1)


@needs_torch(2, 7, "it cannot save in another process")
@pytest.mark.parametrize("style", ["none", "flag"])
def test_another_process(job, style):
    """DCP's process gathers in a group of its own."""
    evicted(job, "process", style, 0)


@pytest.mark.parametrize("style", STYLES)
def test_ranks_whose_counts_are_off(job, style):
    """What the other thread launches does not hide that a rank is behind."""
    evicted(job, "group", style, 0, "--uneven")
