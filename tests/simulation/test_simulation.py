"""Thousands of schedules of whole jobs, each checked against the promises of the protocol.

A failure prints the schedule; `assert_promises(<what it printed>)` replays it. `AUTOTEARDOWN_SIM_SEED=<number>` starts
the sweep elsewhere. With CI set, hypothesis tries the same schedules every time.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_rank import BREAKABLE, FATES, ONCE, POSTS, Member
from simulation import DEFAULT, Schedule, World

from autoteardown.stop.release import SKEW
from autoteardown.stop.types import Limits

FIRST_SEED = int(os.environ.get("AUTOTEARDOWN_SIM_SEED", "0"))
LETTERS = {
    "yield": "y",
    "step": "s",
    "park": "p",
    "drain": "d",
    "abort": "a",
    "quiet": "q",
    "destroy": "r",
    "exit": "e",
}
TICK = 1e-6


def grace(seconds: float) -> Limits:
    """What settings.py makes of a grace period."""
    return DEFAULT._replace(hard=seconds - 1, yield_=max(0.0, seconds - 7)).within(seconds - 1)


def total(limits: Limits) -> float:
    return sum(limits[2:])


# -- schedules --------------------------------------------------------------------------------------------------


def random_member(random: Random, signal: float | None, handler: bool, mishaps: bool) -> Member:
    member = Member(signal=signal, handler=handler)
    if random.random() < 0.2:
        member = replace(member, role=random.choice(["helper", "idle"]))
    if random.random() < 0.2:
        member = replace(member, pace=random.choice([0.1, 3.0]))
    if mishaps and random.random() < 0.25:
        fate = random.choice(FATES)
        lasts = random.choice([0.5, 6.0, 12.0, 40.0 if fate == "freeze" else inf])
        member = replace(member, fate=fate, at=random.uniform(0, random.choice([1, 3, 10])), lasts=lasts)
    if mishaps and random.random() < 0.15:
        member = replace(member, broken=frozenset(random.sample(BREAKABLE, random.choice([1, 2]))))
    if mishaps and random.random() < 0.05:
        member = replace(member, cannot=True)
    if random.random() < 0.15:
        member = replace(member, offset=random.choice([-2, -1, 1, 3]))
    if handler and random.random() < 0.3:
        member = replace(member, ignores=True)
    return member


def random_schedule(random: Random) -> Schedule:
    mishaps = random.random() < 0.7
    ranks = random.choice([1, 2, 2, 3, 3, 4, 5, 8])
    victims = random.choice([1, 1, 2, ranks])
    spread = random.choice([0.0, 0.01, 1.0, SKEW])
    handlers = random.choice([0.0, 0.0, 0.0, 0.5, 1.0])
    members = [
        random_member(
            random,
            signal=random.uniform(2, 2 + spread) if index < victims else None,
            handler=random.random() < handlers,
            mishaps=mishaps,
        )
        for index in range(ranks)
    ]
    random.shuffle(members)
    return Schedule(
        members=tuple(members),
        seed=random.randrange(1000),
        limits=grace(random.choice([25, 25, 25, 60, 10, 3])),
        accelerator=random.random() < 0.7,
        ahead=random.choice([0, 0, 1, 2]),
        step=random.choice([0.1, 0.2, 0.5, 1.5]),
        delay=random.choice([0.001, 0.05, 0.3]),
        board=random.choice(["none", "lost", "silent"]) if mishaps and random.random() < 0.2 else "ok",
        board_at=random.uniform(0, 6),
        stop_at_step=random.random() < 0.9,
        together=random.random() < 0.7,
    )


# -- promises ---------------------------------------------------------------------------------------------------


def broken_promises(world: World) -> list[str]:
    broken = [f"rank {rank.index} spins in {rank.stop.state}" for rank in world.spins]
    for rank in world.ranks:
        if rank.stop is not None and not rank.crashed:
            broken += [f"rank {rank.index} {what}" for what in of_rank(rank)]
    for rank, how, at in world.unsafe:
        if rank.left_by_itself:
            continue  # the application's own
        if at < floor(rank) - TICK:
            broken.append(f"rank {rank.index} did {how} at {at:.3f} s under another's kernels")
        elif is_sound(world.schedule):
            broken.append(
                f"rank {rank.index} needed the floor at {at:.3f} s, though everyone could hear and speak"
            )
    if is_healthy(world.schedule):
        broken += of_healthy(world)
    return broken


def of_rank(rank):
    stop, schedule = rank.stop, rank.world.schedule
    if rank.alive:
        yield f"is still there, in {stop.state}"
        return
    if rank.left_at > schedule.limits.hard + TICK and not rank.woken:
        yield f"left after {rank.left_at} s"
    if rank.cut_at < schedule.limits.hard - schedule.limits.exit - TICK:
        yield f"cuts a save after {rank.cut_at} s"
    if rank.left_by_itself:
        return
    if stop.phases and stop.phases[0].name == "yield" and stop.phases[0].end < schedule.limits.yield_ - SKEW:
        yield f"takes the application's time after {stop.phases[0].end} s"
    said = [do for do in rank.did if do in ONCE]
    if len(said) > len(set(said)):
        yield f"says things twice: {said}"
    if "drained" in rank.did and "abort" in rank.did[rank.did.index("drained") :]:
        yield "aborts although its device is idle"
    if stop.state == "done" and any(
        stop.on(event, None, inf) for event in ("tick", "quiet", "parked", "drained")
    ):
        yield "goes on after its end"
    owes = rank.member.handler and schedule.together and schedule.limits.yield_ > 0
    if owes and stop.outcome == "clean" and "deliver" not in rank.did and "owners_done" not in stop.received:
        yield "is clean, though its application's handler was not called"
    if "leave" in rank.did or "die" in rank.did:
        yield from of_report([phase.as_dict() for phase in stop.phases], stop.outcome)


def of_report(phases, outcome):
    letters = "".join(LETTERS[phase["name"]] for phase in phases)
    if not re.fullmatch(r"y?(sy?(p(d?a?q?r?e?)?)?)?|yp(d?a?q?r?e?)?", letters) or not (
        letters.endswith("e") or outcome == "forced"
    ):
        yield f"reports the phases {letters}, {outcome}"
    clock = 0.0
    for phase in phases:
        if phase["outcome"] not in ("ok", "skipped", "timeout", "error"):
            yield f"reports {phase['name']} as {phase['outcome']!r}"
        elif abs(phase["start"] - clock) > TICK or phase["end"] < phase["start"] - TICK:
            yield f"reports {phase['name']} from {phase['start']} to {phase['end']}, after {clock}"
        clock = phase["end"]


def floor(rank) -> float:
    """When every rank that was told at the same time has drained or aborted, with no second to spare."""
    limits, begin = rank.world.schedule.limits, 0.0
    for phase in rank.stop.phases:
        if phase.name == "yield" and phase.end is not None:
            begin = phase.end
    left = min(limits.hard - begin, rank.stop.received.get("notice", {}).get("left", inf))
    return begin + (limits.step + limits.drain + limits.abort) * min(1.0, left / total(limits))


def is_sound(schedule: Schedule) -> bool:
    """Whatever the training does, every rank hears, speaks and can abort: nobody needs a floor."""
    return (
        schedule.board == "ok"
        and schedule.limits.hard > 5
        and not any(m.handler or m.broken for m in schedule.members)
        # With a save, time may be up before the device of that rank is idle.
        and not any(m.fate in ("crash", "freeze", "deaf", "save", "backup") for m in schedule.members)
    )


def is_healthy(schedule: Schedule) -> bool:
    """Everyone can get to the agreed step in time."""
    members, limits = schedule.members, schedule.limits
    handlers = {m.handler for m in members}
    signals = [m.signal for m in members if m.signal is not None]
    yields = handlers == {True} and not schedule.together
    joins = min(SKEW, limits.yield_ / 2) if yields else inf
    left = limits.hard - (limits.yield_ if yields else 0)
    step = limits.step * min(1.0, left / total(limits))
    uneven = 2.0 if any(m.offset for m in members) else 0.0
    slowest = schedule.step * max(m.pace for m in members)
    hiccups = [m.lasts for m in members if m.fate in ("loop", "block")]
    return (
        schedule.board == "ok"
        and schedule.stop_at_step
        and any(m.role == "train" for m in members)
        and not any(m.fate not in ("", "loop", "block") or m.broken or m.cannot for m in members)
        and (len(handlers) == 1 or schedule.together)
        and max(signals) - min(signals) < joins - schedule.delay
        and slowest * (3 + schedule.ahead) + sum(hiccups) + 10 * schedule.delay + uneven < step
        and 4 * schedule.delay + 0.1 < step / 2
    )


def of_healthy(world):
    if any(rank.stop is None for rank in world.ranks):
        yield "somebody has heard nothing"
        return
    trainers = [rank for rank in world.ranks if rank.member.role == "train"]
    if any(rank.stop.received.get("steps") == (None, False) for rank in trainers):
        return  # one that has not stepped yet cannot be told from one that never does
    if any(rank.stop.received["steps"][0] == 0 and rank.member.offset < 0 for rank in trainers):
        return  # its count still stands at 0, so it does not see where its next iteration ends
    where = {rank.completed for rank in trainers}
    if world.schedule.together and any(rank.member.handler for rank in world.ranks):
        if not world.schedule.limits.yield_:
            return
        where = {rank.delivered_at for rank in trainers}
        if len(where) > 1 or None in where:
            yield f"the applications' handlers are called at {where}"
        return
    if len(where) > 1 or any(rank.stop.received.get("stopped") is None for rank in trainers):
        yield f"stopped at {where}"
    # A rank that never steps does not know where the others stop: its next collective may never end.
    unaware = any(rank.member.role == "helper" for rank in world.ranks)
    for rank in trainers if unaware else world.ranks:
        if rank.stop.outcome not in ("clean", *["partial"] * unaware) or "abort" in rank.did:
            yield f"rank {rank.index} is {rank.stop.outcome}, {rank.did}"
        if (
            "destroy" not in rank.did
            and rank.member.role == "train"
            and world.schedule.accelerator
            and not unaware
        ):
            yield f"rank {rank.index} did not destroy"
    if not unaware:
        times = [rank.start + rank.left_at for rank in world.ranks]
        if times[world.schedule.host] < max(times) - 0.1:  # which is what a process may take to leave
            yield "the host of the store did not leave last"


def assert_promises(schedule: Schedule) -> World:
    world = World(schedule).run()
    broken = broken_promises(world)
    assert not broken, "\n".join([*broken, repr(schedule)])
    return world


# -- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(8))
def test_sweep(chunk):
    for seed in range(FIRST_SEED + 500 * chunk, FIRST_SEED + 500 * (chunk + 1)):
        assert_promises(random_schedule(Random(seed)))


@settings(derandomize="CI" in os.environ, database=None, deadline=None, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_any_schedule(random):
    assert_promises(random_schedule(random))


def test_the_sweep_meets_what_it_is_about():
    schedules = [random_schedule(Random(seed)) for seed in range(1000)]
    assert sum(map(is_healthy, schedules)) > 100
    assert sum(map(is_sound, schedules)) > 100
    worlds = [World(schedule).run() for schedule in schedules]
    outcomes = {rank.stop.outcome for world in worlds for rank in world.ranks if rank.stop is not None}
    assert outcomes == {"clean", "partial", "aborted", "forced"}


def test_a_device_that_waits_for_a_slow_peer_is_not_stuck():
    slow = Member(fate="block", at=2.0, lasts=6.5)
    schedule = Schedule((Member(signal=2.0), Member(), slow), ahead=1)
    assert is_healthy(schedule)
    world = assert_promises(schedule)
    waits = [
        phase.end - phase.start for rank in world.ranks for phase in rank.stop.phases if phase.name == "step"
    ]
    assert max(waits) > schedule.limits.drain


@pytest.mark.parametrize("accelerator", [True, False])
def test_four_thousand_ranks(accelerator):
    size, random = 4096, Random(FIRST_SEED)
    members = tuple(Member(signal=random.uniform(2, 5), pace=random.uniform(0.8, 1)) for _ in range(size))
    schedule = Schedule(members, accelerator=accelerator, ahead=1, step=0.5, delay=0.12)
    assert is_healthy(schedule)
    world = assert_promises(schedule)
    # One answer, one arrival, one idle and one quiet device, one farewell each; a notice from each rank that had none.
    assert sum(do in POSTS for rank in world.ranks for do in rank.did) < 5.5 * size
