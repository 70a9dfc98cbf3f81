"""The stop of one rank, rule by rule. `test_simulation.py` has many of them at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoteardown.stop.protocol import ANSWERS, KEPT, RECONNECTING, STRAGGLER, Stop
from autoteardown.stop.release import CONNECTING, COURTESY, FIRST, LOOK, SKEW
from autoteardown.stop.types import Facts, Limits

LIMITS = Limits()  # 8 s for the step, 5 drain, 5 destroy, 3 abort, 3 exit: 24 in all
PEERS = Facts(world=4, channel=True)
GPU = PEERS._replace(accelerator=True, can_abort=True)


ALONE = GPU._replace(application_owns=True, together=False)


def plan(stop, owned=False, why=""):
    """A message of the coordinator."""
    return {"stop": stop, "owned": owned, "why": why}


class Script:
    """A machine, and what it has wanted so far."""

    def __init__(self, facts=PEERS, limits=LIMITS):
        self.stop = Stop(limits, facts)
        self.did = []

    def __call__(self, now, event, value=None):
        """What it wants done at this event; for `run until then`, pass `tick`."""
        if event == "plan" and not isinstance(value, dict):
            value = plan(value)
        actions = self.stop.on(event, value, now)
        self.did += [action.do for action in actions]
        return [action.do if action.value is None else tuple(action) for action in actions]

    def to(self, state):
        """On the straight way to that state: told to stop at 0 s, there at 1 s."""
        script = (
            ("begin", None),
            ("steps", (7, False)),
            ("notice", {}),
            ("plan", 9),
            ("stopped", 9),
            ("aligned", None),
            ("drained", None),
            ("called", None),
            ("quiet", True),
            ("destroyed", None),
            ("all_left", None),
        )
        for event, value in script:
            if self.stop.state == state:
                return self
            self(1.0 if self.stop.phases else 0.0, event, value)
        assert self.stop.state == state
        return self

    @property
    def phases(self):
        return [(phase.name, phase.outcome) for phase in self.stop.phases]


def test_the_whole_way():
    on = Script(GPU)
    assert on(0.0, "begin") == [("tell", 24.0), "hold"]
    assert on(0.1, "steps", (7, False)) == [("answer", (7, False, False))]
    assert on(0.2, "notice", {"rank": 0}) == []  # its own
    assert on(0.3, "plan", 9) == [("stop_at", 9)]
    assert on(0.8, "stopped", 9) == [("at", (9, 0))]
    assert on(0.8, "aligned") == ["park", "drain"]
    assert on(0.9, "drained")[0] == "arrived"
    assert on(0.9, "called") == [("quiet", True)]
    assert on(1.0, "quiet", True) == ["destroy"]
    assert on(1.2, "destroyed") == ["left", ("leave", True)]
    assert on(1.3, "all_left") == []
    assert on.phases == [(name, "ok") for name in ("step", "park", "drain", "quiet", "destroy", "exit")]
    assert on.stop.steps == {"at_signal": 7, "agreed": 9, "stopped_at": 9}
    assert on.stop.outcome == "clean"


def test_a_peer_goes_the_same_way_and_tells_nobody():
    on = Script(GPU._replace(cause="peer"))
    on(0.0, "notice", {"rank": 2, "left": 24.0})
    assert on(0.0, "begin") == ["hold"]


def test_without_a_board_it_finishes_the_step_it_is_in():
    on = Script(Facts())
    on(0.0, "begin")
    assert on(0.1, "steps", (7, False)) == [("stop_at", 8)]
    on(0.4, "stopped", 8)
    on(0.4, "drained")
    assert on(0.4, "called") == ["destroy"]
    assert on(0.5, "destroyed") == [("leave", True)]


@given(st.permutations(range(7)))
def test_early_messages_change_nothing(order):
    # Whatever others say may be heard at once, and twice; what this rank does itself has its order.
    said = [
        ("plan", 9),
        ("halt", None),
        ("quiet", True),
        ("all_left", None),
        ("notice", {}),
        ("plan", 5),
        ("aligned", None),
    ]
    straight, hasty = Script(GPU), Script(GPU)
    own = [
        ("begin", None),
        ("steps", (7, False)),
        ("stopped", 9),
        ("aligned", None),
        ("drained", None),
        ("called", None),
        ("destroyed", None),
    ]
    for event, value in own:
        straight(1.0, event, value)
        if event == "steps":
            straight(1.0, "plan", 9)
        if event == "called":
            straight(1.0, "quiet", True)
    hasty(0.5, "plan", 9)
    for index in order:
        hasty(0.5, *said[index])
    for event, value in own:
        hasty(1.0, event, value)
    assert straight.stop.outcome == "clean"
    assert hasty.stop.outcome == "partial"  # it was halted on its way
    skipped = {"arrived", "at", "stop_at", "tell"}  # said already, or nobody waits for it any more
    assert [do for do in straight.did if do not in skipped] == [do for do in hasty.did if do not in skipped]


# -- step -------------------------------------------------------------------------------------------------------


def test_a_plan_of_now_parks_at_once():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    assert on(1.2, "plan", None) == ["park"]
    assert on.phases[0] == ("step", "skipped")


def test_stop_at_now_is_an_answer():
    on = Script(PEERS._replace(step=False)).to("step")
    assert on(1.1, "steps", (7, False)) == [("answer", (7, True, False))]


def test_a_rank_whose_steps_are_too_long_says_so():
    on = Script().to("step")
    assert on(1.1, "steps", (7, True)) == [("answer", (7, True, False))]


def test_a_rank_that_never_steps_goes_on_until_the_others_are_there():
    on = Script().to("step")
    assert on(1.1, "steps", (None, False)) == [("answer", (None, False, False))]
    on(1.2, "plan", 9)
    assert on.stop.state == "step"
    assert on(1.5, "halt") == ["park"]
    on(1.6, "parked")
    on(1.6, "drained")
    assert "arrived" not in on.did
    assert on.stop.steps is None


def test_a_rank_that_is_about_to_make_its_first_step_makes_it():
    on = Script().to("step")
    on(1.1, "steps", (None, False))
    assert on(1.2, "plan", 9) == [("stop_at", 9)]


def test_who_is_there_says_so_when_its_device_is_idle():
    # Until then it may wait for the part of a rank that never steps.
    on = Script(GPU).to("drain")
    assert "arrived" not in on.did
    assert on(1.1, "drained")[0] == "arrived"


def test_a_missing_answer_costs_half_the_time():
    on = Script()
    on(0.0, "begin")
    on(0.1, "steps", (7, False))
    on(0.2, "notice", {})
    assert on.stop.wake == 4.1
    assert on(4.1, "tick") == ["plan_now"]
    assert on(4.2, "plan", None) == ["park"]


def test_nobody_is_late_before_the_notice_is_on_the_board():
    # A board that is still connecting: its peers have not even been told.
    on = Script()
    on(0.0, "begin")
    on(0.1, "steps", (7, False))
    assert on.stop.wake == 8.0
    on(5.0, "notice", {})
    assert on.stop.wake == 6.5
    assert on(5.1, "plan", 9) == [("stop_at", 9)]


def test_a_silent_board_costs_the_time_and_no_more():
    on = Script()
    on(0.0, "begin")
    on(0.1, "steps", (7, False))
    assert on.stop.wake == 8.0
    assert on(8.0, "tick") == [("stacks", "step"), "park"]


def test_a_line_that_is_gone_is_waited_for_a_little():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    on(1.2, "down", "reset")
    assert on.stop.wake == 1.2 + RECONNECTING
    assert on(1.2 + RECONNECTING, "tick") == ["park"]
    assert on(6.3, "parked") == ["drain"]
    on(6.3, "drained")
    assert on(6.3, "called")[-1] == ("leave", True)
    assert on.stop.outcome == "partial"


def test_a_line_that_is_back_in_time_costs_nothing():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    on(1.2, "down", "reset")
    on(1.5, "down", None)
    on(1.6, "plan", 9)
    assert on.stop.wake == 8.0


def test_with_the_step_agreed_a_lost_board_changes_nothing():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    on(1.2, "plan", 9)
    assert on(1.3, "down", "reset") == []
    assert on(1.4, "stopped", 9) == [("at", (9, 0)), "park", "drain"]


def test_a_thread_that_ends_on_its_way_halts_everybody():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    on(1.2, "plan", 9)
    assert on(1.3, "ended") == ["halt", "park", "drain"]


def test_the_end_of_a_thread_that_never_stepped_halts_nobody():
    on = Script().to("step")
    on(1.1, "steps", (None, False))
    assert on(1.3, "ended") == ["park", "drain"]


def test_a_step_that_is_not_reached_halts_everybody():
    on = Script()
    on(0.0, "begin")
    on(0.1, "steps", (7, False))
    on(0.2, "plan", 9)
    assert on.stop.wake == 8.0
    assert on(8.0, "tick") == ["halt", ("stacks", "step"), "park"]


def test_halt_parks():
    on = Script().to("step")
    on(1.1, "steps", (7, False))
    on(1.2, "plan", 9)
    assert on(1.3, "halt") == ["park"]


# -- park and drain ---------------------------------------------------------------------------------------------


def test_parking_and_draining_have_one_budget():
    on = Script(PEERS).to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    assert on.stop.wake == 6.0
    assert on(4.0, "parked") == ["drain"]
    assert on.stop.wake == 6.0


def test_who_is_there_waits_for_the_others():
    on = Script(GPU)
    on(0.0, "begin")
    on(0.0, "steps", (7, False))
    on(0.0, "plan", 9)
    assert on(1.0, "stopped", 9) == [("at", (9, 0))]
    assert on.stop.wake == 8.0
    assert on(2.0, "aligned") == ["park", "drain"]
    assert on.stop.wake == 2.0 + 5.0


def test_uneven_ranks_go_on_for_one_iteration():
    on = Script(GPU).to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "plan", 9)
    on(1.1, "stopped", 9)
    assert on(1.2, "advance", {"round": 1, "until": {"g": 5}}) == [("advance", {"g": 5}), ("ready", 1)]
    assert on(1.3, "stopped", 10) == [("at", (10, 1))]
    assert on(1.4, "aligned") == ["park", "drain"]
    assert on.stop.steps == {"at_signal": 7, "agreed": 9, "stopped_at": 10}


def test_who_waits_without_progress_says_so_whenever_that_changes():
    on = Script(GPU).to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "plan", 9)
    assert on(1.1, "stalled", True) == [("stalled", (True, 0))]
    assert on(1.2, "stalled", False) == [("stalled", (False, 0))]
    assert on(1.3, "stalled", True) == [("stalled", (True, 0))]
    assert on(1.4, "advance", {"round": 1, "until": {}}) == [("advance", {}), ("ready", 1)]
    assert on(1.5, "stalled", True) == [("stalled", (True, 1))]


def test_a_save_is_waited_for_while_there_is_time_for_an_abort():
    on = Script().to("step")
    on(1.0, "saving", True)
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    assert on(1.0, "parked") == []  # another thread saves
    assert on.stop.wake == 24.0 - 3.0 - 3.0
    assert on(10.0, "saving", False) == ["drain"]
    assert on.stop.wake == 10.0 + 5.0


def test_after_a_save_the_thread_has_its_time_to_park():
    on = Script().to("step")
    on(1.0, "saving", True)
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    on(10.0, "saving", False)
    assert on.stop.wake == 15.0
    assert on(10.1, "parked") == ["drain"]


def test_a_save_that_outlasts_everything_is_cut_by_the_exit_only():
    on = Script(GPU).to("step")
    on(1.0, "saving", True)
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    latest = 24.0 - 3.0 - 3.0 - 5.0 * LOOK
    assert on.stop.wake == latest
    assert on(latest, "tick") == [("stacks", "park"), "drain"]
    on(latest, "drained")
    assert on(latest, "quiet", False) == ["left"]
    assert on.stop.wake == 24.0 - 3.0
    assert on(20.0, "saving", False) == [("leave", False), "die"]


def test_a_blocked_thread_with_an_idle_device_is_not_aborted():
    on = Script(GPU).to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    look = 1.0 + 5.0 * (1 - LOOK)
    assert on.stop.wake == look
    assert on(look, "tick") == [("stacks", "park"), "drain"]
    assert on.stop.wake == 6.0
    assert on(look, "drained") == [("quiet", False)]
    assert on(look, "quiet", False) == ["left", ("leave", False), "die"]
    assert on.phases == [
        ("step", "skipped"), ("park", "timeout"), ("drain", "ok"), ("abort", "skipped"), ("quiet", "ok"), ("exit", "ok")
    ]  # fmt: skip
    assert on.stop.outcome == "partial"  # nothing was aborted
    assert on.stop.reason == "no iteration to wait for"


def test_a_blocked_thread_whose_device_shows_no_progress_has_all_of_the_drains_time():
    on = Script(GPU).to("step")
    on(1.0, "plan", None)
    on(1.0, "steps", (7, False))
    assert on(2.0, "stalled", True) == [("stacks", "park"), "drain"]
    assert on(2.0, "progress_unknown") == []
    assert on.stop.wake == 2.0 + LIMITS.drain
    assert on(6.0, "drained") == [("quiet", False)]


def wedged(facts=GPU):
    """A rank whose device does not become idle, at 6 s."""
    on = Script(facts).to("drain")
    assert on(6.0, "tick") == [("stacks", "drain"), "halt", "wedged"]
    assert on(6.1, "abort", 77.5) == [("abort", 77.5)]
    return on


def test_wedged_ranks_wait_for_one_another_and_not_for_long():
    on = Script(GPU).to("drain")
    on(6.0, "tick")
    assert on.stop.wake == 6.0 + SKEW
    assert on(6.0 + SKEW, "tick") == ["abort"]


def test_a_device_that_makes_progress_is_waited_for():
    on = Script(GPU).to("drain")
    assert on.stop.wake == 6.0
    on(5.0, "progress", 5.0)
    assert on.stop.wake == 10.0
    on(17.0, "progress", 17.0)
    assert on.stop.wake == 24.0 - 3.0 - 3.0


def test_a_busy_device_is_aborted_and_then_quiet():
    on = wedged()
    assert on(6.2, "aborted") == [("quiet", False)]
    assert on(6.3, "quiet", False) == ["left", ("leave", False), "die"]
    assert on.stop.outcome == "aborted"


def test_an_abort_that_does_not_return_is_not_quiet():
    on = wedged()
    assert on.stop.wake == 6.1 + 3.0
    on(9.1, "tick")
    assert "quiet" not in on.did
    assert on.stop.wake == on.stop.floor - LIMITS.exit * FIRST == 18.0


def test_a_rank_whose_kernels_nothing_ends_leaves_before_the_others():
    """They end with its process. A peer that leaves first, or at the same moment, is a fault of this rank's device."""
    stuck = wedged(GPU._replace(hub=True))
    stuck(9.1, "tick")
    assert stuck(stuck.stop.wake, "tick")[-2:] == [("leave", False), "die"]  # although it is the hub
    peer = Script(GPU).to("quiet")
    peer(2.0, "tick")
    assert peer.stop.wake == peer.stop.floor == stuck.stop.floor


def test_with_accelerators_a_lost_peer_stops_all_ranks_by_one_decision():
    on = Script(GPU._replace(cause="lost"))
    assert on(0.0, "begin") == [("tell", 24.0), ("answer", (None, True, False)), "park"]
    assert on(2.5, "stalled", True) == [("stacks", "park"), "drain"]
    assert on(3.5, "tick") == [("stacks", "drain"), "halt", "wedged"]
    assert on(3.6, "abort") == ["abort"]
    assert on(3.7, "aborted") == [("quiet", False)]
    assert on(3.8, "quiet", False) == ["left", ("leave", False), "die"]


def test_without_accelerators_a_lost_peer_is_each_ranks_own_matter():
    on = Script(PEERS._replace(cause="lost"))
    assert on(0.0, "begin") == ["park"]


def test_an_abort_that_returns_late_is_quiet_from_then_on():
    on = wedged()
    on(9.1, "tick")
    assert on(11.0, "aborted") == [("quiet", False)]
    assert on(11.1, "quiet", False) == ["left", ("leave", False), "die"]
    assert on.stop.outcome == "aborted"


def test_a_device_in_error_is_quiet_although_its_abort_is_refused():
    on = Script(GPU).to("drain")
    on(1.1, "drained", "CUDA error: device-side assert triggered")
    assert on(1.2, "abort") == ["abort"]
    assert on(1.3, "aborted", "CUDA error: device-side assert triggered") == [("quiet", False)]
    assert on(1.4, "quiet", False) == ["left", ("leave", False), "die"]


def test_a_failed_abort_is_not_quiet():
    on = wedged()
    assert on(6.2, "aborted", "NCCL error") == []


def test_a_failed_drain_is_an_abort():
    on = Script(GPU).to("drain")
    assert on(1.1, "drained", "CUDA error") == ["halt", "wedged"]


def test_a_blocked_gloo_rank_is_dropped_with_its_process():
    on = Script().to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "halt")
    did = on(6.0, "tick")
    assert did == [("stacks", "park"), ("quiet", False), "left"]
    assert on.stop.wake == 6.0 + COURTESY
    assert on(6.0 + COURTESY, "tick") == [("leave", False), "die"]
    assert on.phases[-2:] == [("abort", "skipped"), ("exit", "ok")]
    assert on.stop.outcome == "aborted"


def test_a_blocked_gloo_rank_that_its_peers_end_releases_leaves_by_itself():
    on = Script().to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "halt")
    on(6.0, "tick")
    assert on(6.1, "parked") == [("leave", True)]
    assert on.stop.outcome == "partial"


def test_what_was_heard_counts_before_what_time_it_is():
    # A process that was frozen for 10 s finds an answer, and a deadline that has passed.
    on = Script(GPU).to("drain")
    assert "abort" not in on(20.0, "halt")
    on(20.0, "drained")
    assert on.stop.state == "callbacks"


# -- quiet and release ------------------------------------------------------------------------------------------


def test_callbacks_have_the_time_that_is_left():
    on = Script(GPU).to("drain")
    assert on(2.0, "drained")[-1] == ("callbacks", 24.0 - 3.0 - 3.0 - 2.0)
    failed = ("callback_failed", "an on_teardown callback did not return in time")
    assert on(18.0, "tick") == [failed, ("quiet", True)]
    on(18.1, "callback_failed", {"rank": 2, "why": failed[1]})
    assert on.stop.reason == f"rank 2: {failed[1]}"
    assert on.stop.outcome == "partial"


def test_a_callback_that_a_blocked_thread_prevents_is_known_to_all():
    on = Script(PEERS._replace(callbacks=True)).to("step")
    on(1.0, "steps", (7, False))
    on(1.0, "plan", None)
    done = on(1.0 + 5.0, "tick")
    assert ("callback_failed", "the on_teardown callback was skipped") in done
    assert done.index(("callback_failed", "the on_teardown callback was skipped")) < done.index("left")


@pytest.mark.parametrize("facts", [PEERS, GPU])
def test_a_callback_that_takes_longer_than_the_floor_is_clean(facts):
    on = Script(facts._replace(callbacks=True), LIMITS._replace(hard=44.0)).to("callbacks")
    assert on(22.0, "called") == [("saving", False), ("quiet", True)]
    assert on(22.5, "tick") == []  # peers may be a moment later
    assert on(24.0, "quiet", True) == ["destroy"]
    assert on(24.1, "destroyed") == ["left", ("leave", True)]
    assert on.stop.outcome == "clean"


def test_ranks_that_save_longer_than_this_one_are_waited_for_from_their_end():
    on = Script(GPU._replace(callbacks=True), LIMITS._replace(hard=44.0)).to("callbacks")
    on(2.0, "called")
    on(2.0, "busy", True)
    assert on(20.0, "tick") == []
    on(30.0, "busy", False)
    assert on(30.5, "tick") == []
    assert on(31.0, "quiet", True) == ["destroy"]


AUTO = Limits(hard=109.0, step=98.0, auto=True)


def test_an_iteration_is_waited_for_as_long_as_the_grace_period_leaves():
    on = Script(PEERS, AUTO)
    on(0.0, "begin")
    assert on.stop.wake == 98.0
    on(0.1, "steps", (7, False))
    on(0.1, "plan", 9)
    assert on(90.0, "tick") == []
    on(95.0, "stopped", 9)
    assert on(95.0, "aligned") == ["park", "drain"]


@pytest.mark.parametrize(("hard", "step"), [(24.0, 13.0 * 2 / 3), (109.0, 98.0 - 30.0)])
def test_a_callback_gets_its_share_of_the_time_for_an_iteration(hard, step):
    on = Script(PEERS, Limits(hard=hard, step=hard - 11.0, auto=True, saves=True))
    on(0.0, "begin")
    assert on.stop.wake == pytest.approx(step)


def test_an_answer_that_is_missing_is_not_waited_for_as_long_as_an_iteration():
    on = Script(PEERS, AUTO)
    on(0.0, "begin")
    on(0.1, "steps", (7, False))
    on(0.1, "notice", {})
    assert on.stop.wake == 0.1 + ANSWERS
    assert on(0.1 + ANSWERS, "tick") == ["plan_now"]


def test_the_floor_counts_from_the_end_of_a_long_iteration():
    on = Script(GPU, AUTO)
    on(0.0, "begin")
    assert on.stop.floor == 106.0
    on(0.1, "steps", (7, False))
    on(0.1, "plan", 9)
    on(2.0, "stopped", 9)
    on(2.0, "aligned")
    assert on.stop.floor == 2.0 + STRAGGLER + 5.0 + 3.0 + SKEW


def test_nobody_leaves_before_all_are_quiet_or_the_floor_has_passed():
    on = Script(GPU).to("quiet")
    assert on.stop.wake == on.stop.floor == 8.0 + 5.0 + 3.0 + SKEW
    assert on(18.9, "tick") == []
    assert on(19.0, "tick") == [("stacks", "quiet"), "left", ("leave", True)]
    assert ("destroy", "skipped") in on.phases
    assert on.stop.outcome == "partial"


def test_the_floor_leaves_time_to_exit():
    on = Script(GPU, LIMITS.within(9.0)._replace(hard=9.0))
    on(0.0, "begin")
    assert on.stop.floor == 9.0 - 9.0 / 8


def test_without_an_accelerator_peers_get_a_moment():
    on = Script().to("quiet")
    on(1.0, "halt")
    assert on.stop.wake == 1.0 + SKEW
    assert on(4.0, "tick")[-1] == ("leave", True)


def test_peers_that_save_on_their_way_are_waited_for():
    on = Script().to("quiet")
    on(1.0, "busy", True)
    assert on.stop.wake == 24.0 - 3.0 - 3.0
    on(9.0, "busy", False)
    assert on.stop.wake == 9.0 + SKEW


def test_a_drained_rank_among_wedged_ones_neither_destroys_nor_aborts():
    on = Script(GPU).to("quiet")
    assert on(1.2, "quiet", False) == ["left", ("leave", True)]


def test_a_group_of_one_has_nobody_to_wait_for():
    on = Script(Facts(accelerator=True, can_abort=True)).to("destroy")
    assert on.did[-1] == "destroy"
    assert ("quiet", "skipped") in on.phases


def test_a_gpu_rank_without_a_board_waits_for_the_floor():
    on = Script(GPU._replace(channel=False))
    on(0.0, "begin")
    on(0.0, "steps", (7, False))
    on(0.5, "stopped", 8)
    on(0.5, "drained")
    assert on(0.5, "called") == []
    assert on.stop.wake == on.stop.floor
    assert "destroy" not in on(on.stop.floor, "tick")


def test_a_destroy_that_does_not_return():
    on = Script(GPU).to("destroy")
    assert on.stop.wake == 6.0
    assert on(6.0, "tick") == [("stacks", "destroy"), "left", ("leave", False), "die"]
    assert on.stop.outcome == "aborted"


def test_a_late_destroy_leaves_time_to_exit():
    on = Script(GPU).to("quiet")
    assert on(18.9, "quiet", True) == ["destroy"]
    assert on.stop.wake == 24.0 - 3.0


# -- exit -------------------------------------------------------------------------------------------------------


def test_the_host_of_the_store_leaves_last():
    on = Script(GPU._replace(hub=True)).to("exit")
    assert on.did[-1] == "left"
    assert on.stop.wake == 1.0 + 5.0  # others may still be in their destroy
    assert on(1.1, "all_left") == [("leave", True)]


def test_the_host_of_the_store_gives_ranks_that_say_nothing_the_time_to_connect():
    on = Script(PEERS._replace(hub=True)).to("quiet")
    on(1.0, "halt")
    assert on(4.0, "tick") == [("stacks", "quiet"), "left"]
    assert on.stop.wake == CONNECTING
    assert on(CONNECTING, "tick") == [("leave", True)]


def test_nobody_leaves_unheard():
    on = Script()
    on(0.0, "begin")
    on(0.1, "steps", (None, False))
    on(8.0, "tick")
    on(8.0, "parked")
    on(8.0, "drained")
    on(8.0, "called")
    assert on(11.0, "tick")[-1] == "left"
    assert on.stop.wake == 24.0 - 3.0
    assert on(12.0, "notice", {}) == [("leave", True)]


def test_the_program_has_a_moment_to_leave_by_itself():
    on = Script().to("leaving")
    assert on.stop.wake == 1.0 + 3.0
    assert on(4.0, "tick") == [("stacks", "exit"), "die"]
    assert on.phases[-1] == ("exit", "timeout")
    assert on.stop.outcome == "clean"


def test_a_rank_in_rendezvous_just_leaves():
    on = Script(Facts(joined=False))
    assert on(0.0, "begin") == ["park"]
    assert on(0.1, "parked") == [("leave", True)]
    on = Script(Facts(joined=False))
    on(0.0, "begin")
    assert on(on.stop.wake, "tick") == [("stacks", "park"), ("leave", False), "die"]


STATES = ("yield", "step", "park", "drain", "callbacks", "quiet", "destroy", "exit", "leaving")


@pytest.mark.parametrize("state", STATES)
def test_the_hard_deadline_ends_every_state(state):
    on = Script(
        (ALONE if state == "yield" else GPU)._replace(hub=True),
        LIMITS._replace(yield_=18.0 * (state == "yield")),
    )
    if state == "park":
        on.to("step")
        on(1.0, "steps", (7, False))
        on(1.0, "halt")
    else:
        on.to(state)
    assert on.stop.state == state
    assert on(24.0, "tick")[-1] == "die"
    assert on.stop.outcome == ("clean" if state == "leaving" else "forced")
    assert all(phase.end is not None for phase in on.stop.phases)
    assert on(25.0, "tick") == on(25.0, "quiet", True) == on(25.0, "drained") == []


def test_nothing_waits_beyond_the_hard_deadline():
    on = Script(ALONE, LIMITS._replace(yield_=99.0))
    on(0.0, "begin")
    assert on.stop.wake == 24.0


# -- the application's own handler ------------------------------------------------------------------------------

YIELD = LIMITS._replace(yield_=18.0)


def test_the_application_has_its_time_and_nobody_is_told():
    on = Script(ALONE, YIELD)
    assert on(0.0, "begin") == []
    assert on.stop.wake == 18.0
    assert on(18.0, "tick") == [("stacks", "yield"), ("tell", 6.0), "hold"]


def test_what_comes_after_the_yield_fits_into_what_is_left():
    on = Script(ALONE, YIELD)
    on(0.0, "begin")
    on(18.0, "tick")
    assert on.stop.limits[2:] == tuple(limit / 4 for limit in LIMITS[2:])
    assert on.stop.floor == 24.0 - 3.0 / 4


def test_a_peer_has_the_time_that_is_left_to_the_rank_that_tells():
    on = Script(GPU._replace(cause="peer"))
    on(0.0, "notice", {"rank": 0, "left": 6.0})
    on(0.0, "begin")
    assert on.stop.limits.step == 2.0
    assert on.stop.floor == 2.0 + 5.0 / 4 + 3.0 / 4 + SKEW


def test_a_notice_near_the_end_of_the_yield_ends_it():
    on = Script(ALONE, YIELD)
    on(0.0, "begin")
    assert on(18.0 - SKEW, "notice", {"left": 6.0}) == ["hold"]
    assert on.phases == [("yield", "ok"), ("step", "")]


def test_a_notice_in_the_yield_leaves_the_application_its_time():
    on = Script(ALONE, YIELD)
    on(0.0, "begin")
    assert on(1.0, "notice", {"left": 24.0}) == [("answer", (None, False, False))]
    on(1.1, "plan", 9)
    on(1.5, "halt")
    assert on.stop.state == "yield"
    assert on(16.0, "down", "reset") == []
    # The group has stopped without it: there is no step to go for.
    assert on(18.0, "tick") == [("stacks", "yield"), "park"]
    assert on.phases == [("yield", "timeout"), ("step", "skipped"), ("park", "")]


def test_an_application_in_its_exit_callbacks_has_ended_by_itself():
    """Its own exit code stays; what it waits for there is bounded."""
    on = Script(ALONE, YIELD)
    on(0.0, "begin")
    on(17.0, "leaves")
    on(17.0, "exits")
    assert on(18.0, "tick") == []
    assert on.stop.state == "yield" and on.stop.wake == YIELD.hard


def test_a_notice_takes_at_most_half_of_a_short_yield():
    on = Script(ALONE, LIMITS._replace(hard=9.0, yield_=3.0))
    on(0.0, "begin")
    assert on(1.0, "notice", {"left": 9.0}) == [("answer", (None, False, False))]


# -- anything at any time ---------------------------------------------------------------------------------------

VALUES = {
    "begin": st.none(),
    "steps": st.tuples(st.one_of(st.none(), st.integers(1, 9)), st.booleans()),
    "notice": st.sampled_from([{}, {"left": 6.0}]),
    "plan": st.one_of(st.none(), st.integers(1, 9), st.just({"stop": 4, "owned": True, "why": ""})),
    "advance": st.builds(lambda number: {"round": number, "until": {}}, st.integers(1, 2)),
    "busy": st.booleans(),
    "stalled": st.booleans(),
    "down": st.sampled_from([None, "reset"]),
    "progress": st.floats(0, 3),
    "fault": st.just("our own"),
    "quiet": st.booleans(),
    "saving": st.booleans(),
    "stopped": st.integers(1, 9),
    **dict.fromkeys(
        ("halt", "aligned", "owners_done", "abort", "all_left", "parked", "ended", "called", "released"),
        st.none(),
    ),
    **dict.fromkeys(("drained", "destroyed", "aborted"), st.sampled_from([None, "failed"])),
}
EVENTS = st.sampled_from(sorted(VALUES)).flatmap(lambda event: st.tuples(st.just(event), VALUES[event]))


@given(
    facts=st.builds(
        Facts,
        *[st.sampled_from(["signal", "peer", "lost"]), st.booleans(), st.sampled_from([1, 4])],
        *[st.booleans()] * 8,
    ),
    limits=st.sampled_from([LIMITS, YIELD, LIMITS.within(1.0)._replace(hard=1.0), LIMITS._replace(step=0.0)]),
    script=st.lists(st.tuples(st.floats(0, 3), EVENTS), max_size=20),
)
def test_it_ends_in_time_and_in_order_whatever_it_hears(facts, limits, script):
    on, now = Script(facts, limits), 0.0
    on(0.0, "begin")
    for after, (event, value) in [*script, *[(30.0, ("halt", None))]]:
        until = now + after
        while on.stop.state != "done" and on.stop.wake <= until:
            asked, now = on.stop.wake, max(now, on.stop.wake)
            on(now, "tick")
            assert on.stop.state == "done" or on.stop.wake > now, f"spins: woken at {asked}"
        now = until
        on(now, event, value)
    assert on.stop.state == "done"
    assert on.did.count("die") == 1
    assert on.did[-1] == "die"
    once = [do for do in on.did if do not in ("stacks", "saving", "stalled", "at", "advance", "ready")]
    assert len(once) == len(set(once))
    assert all(first.end == second.start for first, second in zip(on.stop.phases, on.stop.phases[1:]))
    assert all(phase.outcome and phase.start <= phase.end <= limits.hard for phase in on.stop.phases)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("step", "the other ranks' answers, until 8.0s at most"),
        ("drain", "the devices, until 6.0s at most"),
        ("quiet", "the other ranks, until "),
        ("destroy", "the release of the process groups, until "),
    ],
)
def test_it_says_what_it_waits_for(state, what):
    stop = Script().to(state).stop
    assert stop.state == state
    assert stop.waits_for.startswith(f"waits for {what}")


def test_it_says_which_iteration_it_waits_for():
    script = Script().to("step")
    script(0.1, "plan", 9)
    assert script.stop.waits_for == "waits for the end of iteration 9, until 8.0s at most"


def test_a_stop_that_has_not_begun_waits_for_nothing():
    assert Script().stop.waits_for == ""


@pytest.mark.parametrize("yields", [18.0, 0.0])
def test_a_handler_for_which_no_time_is_left_is_no_clean_end(yields):
    """A peer that was frozen answers late: its own application still saves, this one does not. 0: it was not to."""
    facts = PEERS._replace(application_owns=True)
    limits = LIMITS._replace(yield_=yields)
    go = Script(facts, limits)
    go(0.0, "begin")
    go(0.0, "steps", (7, False))
    go(18.5, "plan", plan(9, owned=True))
    go(18.6, "stopped", 9)
    assert go.stop.state == "step"
    did = go(18.7, "aligned")
    assert go.stop.state == "drain" and "deliver" not in go.did
    if yields:
        assert ("callback_failed", "no time is left for the application's handler") in did
    go(18.8, "drained")
    go(18.8, "called")
    go(18.9, "quiet", True)
    go(18.9, "destroyed")
    assert go.stop.outcome == ("partial" if yields else "clean")


def owner_before_its_iteration():
    go = Script(PEERS._replace(application_owns=True), LIMITS._replace(yield_=18.0))
    go(0.0, "begin")
    go(0.0, "steps", (7, False))
    go(0.1, "plan", plan(9, owned=True))
    return go


def test_a_save_that_does_not_end_leaves_the_handler_a_part_of_its_time():
    go = owner_before_its_iteration()
    go(0.2, "saving", True)
    assert go.stop.wake == 18.0 * (1 - KEPT)
    go(go.stop.wake, "tick")
    assert go.did[-1] == "deliver" and go.stop.state == "yield"


@pytest.mark.parametrize("whose", ["saving", "busy"])
@pytest.mark.parametrize("ends", [1.0, 7.0, 12.0])
def test_the_time_for_a_step_begins_when_the_checkpoint_is_written(whose, ends):
    """And not later: a long evaluation that follows would use up the time of the application's handler."""
    go = owner_before_its_iteration()
    go(0.2, whose, True)
    assert go.stop.wake > 8.0
    go(ends, whose, False)
    assert go.stop.wake == min(ends + 8.0, 18.0 * (1 - KEPT))
    go(go.stop.wake, "tick")
    assert go.stop.state == "yield"
