"""Collectives of other threads are no iteration, where hosts run ahead of their devices."""

import pytest
from background_runs import STYLES, begun, judge
from harness import PROGRAMS

from nccl.conftest import AGENT_PATH

GRACE = 25
START = 180


def evicted(job, devices, libraries, what, style, *more):
    """A world of two, rank 0 evicted while the other thread's collectives are under way; judged."""
    env = {"AUTOTEARDOWN_GRACE": GRACE, **devices.settings(devices="2"), **libraries}
    launcher = ("env", f"PYTHONPATH={AGENT_PATH}")
    options = {"fresh": True, "launcher": launcher, **env}
    ranks = job.world(str(PROGRAMS / "background.py"), 2, "cuda", what, style, *more, **options)

    def transcript():
        return "\n\n".join([devices.transcript(), *(rank.transcript() for rank in ranks)])

    begun(ranks, START)
    ranks[0].signal()
    codes = [rank.outlast(GRACE) for rank in ranks]
    assert codes == [0, 0 if style in ("flag", "poll") else 143], transcript()
    judge(job, ranks, what, style, transcript, uneven="--uneven" in more)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("what", ["async", "process", "group", "default", "device"])
def test_another_thread_at_its_own_pace(job, devices, libraries, what, style):
    """The same iteration, saved, clean, and DCP's own save is whole."""
    evicted(job, devices, libraries, what, style)


@pytest.mark.parametrize("what", ["nothing", "default"])
def test_ranks_whose_counts_are_off(job, devices, libraries, what):
    """What the other thread launches does not hide that a rank is behind."""
    evicted(job, devices, libraries, what, "none", "--uneven")
