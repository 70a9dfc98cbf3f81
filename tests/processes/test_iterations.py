"""Every rank stops after the same iteration, whatever steps in it, and never inside one."""

from __future__ import annotations

import ast
import re

import pytest

KINDS = (
    "one",
    "two",
    "gan",
    "critic",
    "inside",
    "zero",
    "closure",
    "scaler",
    "accumulate",
    "freezes",
    "skips",
    "late",
)
ROOMY = {"AUTOTEARDOWN_GRACE": 25, "AUTOTEARDOWN_ON_TEARDOWN": "__main__:record"}


def recorded(rank):
    """How often each optimizer of that rank has stepped, and the checksum of its parameters."""
    steps, checksum = re.search(r"^record (\[.*\]) (\S+)$", rank.stdout, re.M).groups()
    return dict(ast.literal_eval(steps)), checksum


def evict(job, kinds, victim=0, after=25):
    """A world whose ranks do these things; one of them is evicted when all have made some iterations."""
    ranks = job.world(
        "iterations.py", len(kinds), each={rank: {"args": [kind]} for rank, kind in enumerate(kinds)}, **ROOMY
    )
    for rank in ranks:
        rank.wait_for(rf"^iteration {after}$")
    ranks[victim].signal()
    codes = [rank.outlast(25) for rank in ranks]
    assert codes == [0 if rank == victim else 143 for rank in range(len(ranks))], ranks[victim].transcript()
    return ranks


@pytest.mark.parametrize("kind", KINDS)
def test_all_stop_after_the_same_iteration(job, kind):
    ranks = evict(job, [kind] * 2)
    (steps, checksum), others = recorded(ranks[0]), recorded(ranks[1])
    assert others[1] == checksum, "they have not stopped at the same place"
    assert others[0].keys() == steps.keys() or kind == "inside"
    assert list(others[0].values()) == list(steps.values())
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
    if kind == "critic":
        assert steps["D"] == 5 * steps["G"]
    elif kind == "gan":
        assert steps["D"] == steps["G"]
    elif kind != "freezes":
        assert len(set(steps.values())) <= 1
    done = {int(re.findall(r"^iteration (\d+)$", rank.stdout, re.M)[-1]) for rank in ranks}
    assert len(done) == 1, "and their programs have got as far"


def test_ranks_that_step_different_numbers_of_optimizers(job):
    """As a pipeline's first stage beside the others. On the old clock: 10 s, and half an iteration apart."""
    ranks = evict(job, ["two", "two", "two"], victim=1)
    assert len({recorded(rank)[1] for rank in ranks}) == 1
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()


def test_in_the_very_first_iterations(job):
    ranks = evict(job, ["gan"] * 2, after=0)
    assert recorded(ranks[0]) == recorded(ranks[1])
    steps, _ = recorded(ranks[0])
    assert steps["D"] == steps["G"]
