"""Which groups' collectives follow the iterations, by numbers alone."""

from __future__ import annotations

import pytest

from autoteardown.training.launch_history import LaunchHistory


def history(*ends, groups=("dp",)):
    """One that has recorded these numbers, a tuple for each end of an iteration."""
    now = {}
    found = LaunchHistory(lambda: ({group: lambda group=group: now[group] for group in groups}, groups))
    found.look()
    for end in ends:
        now.update(zip(groups, end))
        found.iteration_ended()
    return found


@pytest.mark.parametrize(
    ("ends", "number", "follows"),
    [
        ((10, 14, 18, 22), 22, True),
        ((10, 11, 12, 13), 13, True),
        ((10, 14, 18, 22), 23, False),  # launched since the training thread stopped
        ((10, 14, 19, 23), 23, False),  # once by another thread
        ((3, 3, 3, 3), 3, False),  # the training thread does not use it
        ((3, 3, 4, 4), 4, False),
    ],
)
def test_a_group_counts_if_it_grows_with_each_iteration(ends, number, follows):
    found = history(*((end,) for end in ends)).regular({"dp": number}, stopped=True)
    assert found == {"dp": number if follows else None}


def test_a_rank_in_the_midst_of_an_iteration_has_launched_a_part_of_it():
    assert history((10,), (14,), (18,)).regular({"dp": 20}, stopped=False) == {"dp": 20}


def test_a_group_that_was_made_since_is_unknown():
    assert history((10,), (14,)).regular({"dp": 14, "save": 1}, stopped=True) == {"dp": 14, "save": None}


def test_without_iterations_the_cpu_half_of_a_group_is_left_out():
    """A program that polls and has no optimizer."""
    found = LaunchHistory().regular({"0/cuda": 7, "0/cpu": 3, "1": 2}, stopped=True)
    assert found == {"0/cuda": 7, "0/cpu": None, "1": 2}


def test_other_groups_begin_a_new_history():
    """As soon as there are any: torch's table of groups is longer, or shorter."""
    table = ["dp"]
    found = LaunchHistory(lambda: ({group: lambda: 18 for group in table}, table))
    found.look()
    found.iteration_ended()
    table.append("tp")
    found.iteration_ended()
    assert found.regular({"dp": 18, "tp": 5}, stopped=True) == {"dp": 18, "tp": 5}  # as without a history


def test_groups_of_other_threads():
    """Known after three iterations: before, every group's collectives are progress."""
    ends = [(10, 3, 0), (14, 3, 0), (18, 4, 0)]
    assert history(*ends, groups=("dp", "save", "eval")).of_other_threads() == {"save", "eval"}
    assert history(*ends[:2], groups=("dp", "save", "eval")).of_other_threads() == set()
