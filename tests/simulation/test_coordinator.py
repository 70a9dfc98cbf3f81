"""What the ranks of a group decide together, rule by rule."""

from __future__ import annotations

import pytest

from autoteardown.stop.alignment import CONFIRM
from autoteardown.stop.coordinator import ABSENT, LEAD, Coordinator
from autoteardown.stop.message_types import understood


class Group:
    """A coordinator, and the messages that each rank has got so far."""

    def __init__(self, world=3):
        self.coordinator = Coordinator(world)
        self.world = world
        self.now = 0.0

    def __call__(self, rank, kind, value=None):
        """What this word leads to: kinds to everybody, and (rank, kind) to one."""
        told = self.coordinator.on(rank, kind, value, self.now)
        assert all(understood(kind, value) for _, kind, value in told), told
        return [kind if to is None else (to, kind) for to, kind, _ in told]

    def values(self, rank, kind, value=None):
        """The same with what is said."""
        return [(to, kind, said) for to, kind, said in self.coordinator.on(rank, kind, value, self.now)]

    def agreed(self, *counts):
        """All have answered; returns the plan."""
        self(0, "tell", {"left": 24.0})
        for rank, count in enumerate(counts):
            told = self.values(rank, "answer", [count, False, False])
        return told[0][2]["stop"]

    def later(self):
        """The time has come for which it asked."""
        assert self.coordinator.wake < float("inf")
        self.now = self.coordinator.wake
        return self(0, "tick")


def test_the_first_notice_is_everybodys():
    group = Group()
    assert group(1, "tell", {"rank": 1, "left": 24.0}) == ["notice"]
    assert group(2, "tell", {"rank": 2, "left": 24.0}) == []


@pytest.mark.parametrize(
    ("counts", "stop"),
    [((7, 8, 7), 9), ((7, None, 7), 8), ((None, None, None), None), ((0, 0, 0), 2), ((1, 0, 0), 2)],
)
def test_the_iteration_after_the_furthest(counts, stop):
    assert Group().agreed(*counts) == stop


def test_who_cannot_step_again_in_time_ends_the_hope_of_all():
    group = Group(2)
    group(0, "tell", {})
    group(0, "answer", [7, False, False])
    ((_, kind, plan),) = group.values(1, "answer", [7, True, False])
    assert kind == "plan"
    assert plan["stop"] is None
    assert plan["why"]


def test_all_at_the_same_iteration():
    group = Group()
    group.agreed(7, 7, 7)
    assert group(0, "at", [8, 0, {}]) == []
    assert group(1, "at", [8, 0, {}]) == []
    assert group(2, "at", [8, 0, {}]) == ["aligned"]


def uneven():
    """Rank 0 counts one more than the others: it has arrived, and they wait for it."""
    group = Group()
    group.agreed(8, 7, 7)
    group(0, "at", [9, 0, {}])
    group(1, "stalled", [True, 0, {}])
    assert group(2, "stalled", [True, 0, {}]) == []
    assert group.coordinator.wake == CONFIRM
    return group


def test_who_waits_is_told_where_to_stop_before_the_others_go_on():
    group = uneven()
    assert group.later() == [(1, "advance"), (2, "advance")]
    assert group(1, "ready", 1) == []
    assert group(2, "ready", 1) == [(0, "advance")]
    for rank, count in enumerate((10, 8, 8)):
        told = group(rank, "at", [count, 1, {}])
    assert told == ["aligned"]


def test_who_waited_only_for_the_last_to_arrive_does_not_wait_any_more():
    group = uneven()
    group(1, "stalled", [False, 0, {}])
    assert group.later() == []
    group(1, "at", [9, 0, {}])
    assert group(2, "at", [9, 0, {}]) == ["aligned"]


def test_what_was_said_in_an_earlier_round_does_not_count():
    group = uneven()
    group.later()
    group(1, "at", [8, 0, {}])
    group(1, "ready", 1)
    group(2, "ready", 1)
    group(0, "at", [10, 1, {}])
    assert group(2, "at", [8, 1, {}]) == []
    assert group(1, "at", [9, 1, {}]) == ["aligned"]


def test_a_host_that_is_ahead_of_its_device_waits_for_nothing_and_is_seen_all_the_same():
    group = Group(2)
    group.agreed(8, 7)
    group(0, "at", [9, 0, {"dp": 40}])
    told = group.values(1, "at", [9, 0, {"dp": 44}])
    assert told == [(0, "advance", {"round": 1, "until": {"dp": 44}})]
    assert group(0, "at", [10, 1, {"dp": 44}]) == ["aligned"]


def test_collectives_of_other_threads_make_no_rank_behind():
    """A checkpoint writer's thread, on one rank, has launched one collective more on its own group."""
    group = Group(2)
    group.agreed(8, 8)
    group(0, "at", [9, 0, {"dp": 40, "save": 3}])
    assert group(1, "at", [9, 0, {"dp": 40, "save": None}]) == ["aligned"]


def test_they_do_not_hide_a_rank_that_is_behind():
    group = Group(2)
    group.agreed(8, 7)
    group(0, "at", [9, 0, {"dp": 40, "save": None}])
    told = group.values(1, "at", [9, 0, {"dp": 44, "save": 3}])
    assert told == [(0, "advance", {"round": 1, "until": {"dp": 44}})]


def test_a_callback_that_failed_is_told_to_all_once():
    group = Group()
    group(0, "tell", {})
    assert group.values(2, "callback_failed", "disk full") == [
        (None, "callback_failed", {"rank": 2, "why": "disk full"})
    ]
    assert group(1, "callback_failed", "too") == []


def test_no_rank_is_sent_on_for_ever():
    group = uneven()
    for number in (1, 2):
        group.later()
        group(1, "ready", number)
        group(2, "ready", number)
        group(0, "at", [9 + number, number, {}])
        group(1, "stalled", [True, number, {}])
        group(2, "stalled", [True, number, {}])
    assert "halt" in group.later()


def test_a_world_in_which_nobody_moves():
    group = Group()
    group.agreed(7, 7, 7)
    for rank in range(3):
        told = group(rank, "stalled", [True, 0, {}])
    assert told == []
    assert group.later() == ["halt"]


def test_a_lost_rank_is_not_waited_for():
    group = Group()
    group(0, "tell", {})
    group(0, "answer", [7, False, False])
    group(1, "answer", [7, False, False])
    told = group.values(2, "lost", True)
    assert [kind for _, kind, _ in told] == ["lost", "plan"]
    assert told[1][2]["stop"] is None  # no iteration without it
    group(0, "quiet", True)
    assert group.values(1, "quiet", True)[-1] == (None, "quiet", False)


def test_a_rank_that_is_only_out_of_reach_may_still_have_kernels():
    group = Group()
    group(0, "tell", {})
    group(2, "lost", False)
    group(0, "quiet", True)
    assert group(1, "quiet", True) == []


def test_nor_is_it_waited_for_any_longer_when_it_turns_out_to_be_dead():
    group = Group()
    group(0, "tell", {})
    group(2, "lost", False)
    group(0, "quiet", True)
    group(1, "quiet", True)
    assert group.values(2, "lost", True)[-1] == (None, "quiet", False)


def test_a_rank_that_has_never_come_is_not_waited_for():
    group = Group()
    for rank in (0, 1):
        group(rank, "joined")
    group.now += ABSENT
    assert group(0, "tell", {}) == ["notice"]  # and nobody is told that rank 2 is lost: it may be alive
    group(0, "answer", [7, False, False])
    ((_, _, plan),) = group.values(1, "answer", [7, False, False])
    assert (plan["stop"], plan["why"]) == (None, "rank 2 has never connected")
    group(0, "quiet", True)
    assert group(1, "quiet", True) == []  # it may still have kernels


def test_a_rank_that_may_be_about_to_come_is_waited_for():
    group = Group()
    for rank in (0, 1):
        group(rank, "joined")
    group.now += ABSENT - 1
    for rank in (0, 1):
        group(rank, "tell", {})
        group(rank, "answer", [7, False, False])
    group.now += ABSENT
    group(1, "tell", {})  # signalled as well, a little later
    group(2, "joined")
    ((_, _, plan),) = group.values(2, "answer", [8, False, False])
    assert plan["stop"] == 9


def test_a_rank_that_comes_after_all_is_waited_for_from_then_on():
    group = Group()
    for rank in (0, 1):
        group(rank, "joined")
    group.now += ABSENT
    group(0, "tell", {})
    group(0, "answer", [7, False, False])
    group(2, "joined")
    assert group(1, "answer", [7, False, False]) == []
    assert group(2, "answer", [7, False, False]) == ["plan"]


def test_wedged_ranks_abort_when_the_last_has_said_so():
    group = Group()
    group.agreed(7, 7, 7)
    group(0, "wedged")
    group(1, "quiet", True)
    ((to, kind, moment),) = group.values(2, "wedged")
    assert (to, kind, moment) == (None, "abort", group.now + LEAD)  # all at the same moment, soon
    group(0, "quiet", False)
    assert group.values(2, "quiet", False)[-1] == (None, "quiet", False)


def test_the_rest_are_stopped_when_those_that_end_by_themselves_have_left():
    group = Group()
    group(0, "tell", {})
    group(0, "answer", [7, False, True])
    group(1, "answer", [7, False, True])
    ((_, _, plan),) = group.values(2, "answer", [7, False, False])
    assert plan["owned"]
    assert group(0, "left") == ["departed"]
    assert group(1, "left") == ["owners_done"]


def test_the_hub_stays_for_the_others():
    group = Group()
    group.agreed(7, 7, 7)
    group(0, "left")
    group(1, "left")
    assert group(2, "left") == ["all_left"]


@pytest.mark.parametrize("kind", ["answer", "at", "stalled", "tell", "ready", "no such", "__init__"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, [[], {}, []]])
def test_nonsense_is_not_heard(kind, value):
    group = Group()
    group(0, kind, value)
    group(99, kind, value)
    assert group.agreed(7, 7, 7) in (8, None)


def test_a_thousand_words_cost_little():
    world = 4096
    group = Group(world)
    assert group.agreed(*[7] * world) == 8
    for kind, value in (("at", [8, 0, {}]), ("arrived", None), ("quiet", True), ("left", None)):
        for rank in range(world):
            told = group(rank, kind, value)
    assert told == ["all_left"] or "all_left" in group.coordinator._announced


def test_a_rank_that_was_lost_and_is_back():
    """Its peers would else be torn down the next time that they wait for it for long."""
    group = Group()
    assert group(1, "lost", False) == ["lost"]
    assert group(1, "lost", True) == []
    assert group.values(1, "back") == [(None, "back", 1)]
    assert group(1, "back") == []
    assert group(1, "lost", False) == ["lost"]
    assert group(1, "joined") == ["back"], "in its next life"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("plan", None),
        ("plan", {"stop": 5, "owned": False}),
        ("plan", {"stop": -1, "owned": False, "why": ""}),
        ("plan", {"stop": True, "owned": False, "why": ""}),
        ("plan", {"stop": 5, "owned": 1, "why": ""}),
        ("plan", {"stop": 5, "owned": False, "why": "x" * 9999}),
        ("advance", {"round": 1}),
        ("advance", {"round": 1, "until": {"0": "x"}}),
        ("quiet", 1),
        ("lost", "1"),
        ("halt", None),
        ("aligned", True),
        ("drained", None),
        ("parked", None),
        ("begin", None),
        ("fault", "x"),
        ("no_such_kind", None),
    ],
)
def test_messages_of_unknown_kinds_are_ignored(kind, value):
    """Not even where it would be an event of the rank's own: nobody else can say that a device is idle."""
    assert not understood(kind, value)
