"""A server in the same process as a rank: on the main thread, uvicorn has a SIGTERM handler of its own."""

import re
import urllib.request

import pytest
from harness import AGENT, NONE, SIGTERM

pytestmark = pytest.mark.frameworks
uvicorn = pytest.importorskip("uvicorn")
CASES = [(where, loop) for where in ("main", "thread") for loop in ("asyncio", "uvloop")]


def start(job, where, loop, mode):
    """Two ranks that serve and train."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    # `auto` leaves the application GRACE - 1 - 6 s.
    ranks = job.world("server.py", 2, where, loop, mode=mode, AUTOTEARDOWN_GRACE=12)
    for rank in ranks:
        rank.wait_for("^step 3$")
        port = rank.wait_for("^port ([0-9]+)$")[1]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30).read() == b"ok"
    return ranks


@pytest.mark.parametrize("where, loop", CASES)
def test_uvicorn(job, where, loop):
    """It shuts down, puts the handler back and raises the signal again: then the ranks stop, each where it is."""
    ranks = start(job, where, loop, AGENT)
    assert [ranks[0].evict(12), ranks[1].outlast(12)] == [0, 143], ranks[0].transcript()
    for rank in ranks:
        assert rank.report()["outcome"] == ("partial" if where == "main" else "clean"), rank.transcript()
        (last,) = re.findall(r"^step (\d+)$", rank.stdout, re.MULTILINE)[-1:]
        stopped = rank.report()["steps"]["stopped_at"]
        assert stopped is None or int(last) in (stopped - 1, stopped), "nothing runs on"
    if where == "thread":
        assert len({rank.report()["steps"]["stopped_at"] for rank in ranks}) == 1
    assert ("server shut down with a group" in ranks[0].stdout) == (where == "main"), ranks[0].transcript()
    assert ranks[0].noise == []


@pytest.mark.parametrize("where, loop", CASES)
def test_control_uvicorn(job, where, loop):
    """Without the agent the same happens, and then the process dies of the signal, with its group."""
    rank = start(job, where, loop, NONE)[0]
    assert rank.evict(12) == -SIGTERM, rank.transcript()
    assert ("server shut down with a group" in rank.stdout) == (where == "main"), rank.transcript()
