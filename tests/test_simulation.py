"""Thousands of schedules of whole jobs, each held against the promises of the protocol."""

from __future__ import annotations

import os
import re
from math import inf
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import DEFAULT, Limits, Member, Schedule, World

FATES = ("crash", "freeze", "wedge", "backup", "loop", "block", "save", "end")
LETTERS = dict(
    {"yield": "y", "step": "s", "park": "p", "drain": "d"}, abort="a", quiet="q", destroy="r", exit="e"
)


def total(limits: Limits) -> float:
    return limits.step + limits.drain + limits.destroy + limits.abort + limits.exit


def grace(seconds: float) -> Limits:
    """As settings.py makes the limits fit."""
    scale = min(1.0, (seconds - 1) / total(DEFAULT))
    return Limits(seconds - 1, max(0.0, seconds - 7), *(each * scale for each in DEFAULT[2:]))


# -- schedules --------------------------------------------------------------------------------------------------


def random_member(random: Random, signalled: bool, spread: float, mishaps: bool) -> Member:
    def sometimes(chance: float, value, otherwise):
        return value() if random.random() < chance else otherwise

    fate = sometimes(0.25 * mishaps, lambda: random.choice(FATES), "")
    return Member(
        signal=1 + random.random() * spread if signalled else None,
        role=sometimes(0.2, lambda: random.choice(["helper", "idle"]), "train"),
        pace=sometimes(0.2, lambda: random.choice([0.1, 3.0]), 1.0),
        fate=fate,
        at=random.random() * random.choice([1, 3, 10]) if fate else 0.0,
        lasts=random.choice([0.5, 5.0, 12.0, 40.0])
        if fate == "freeze"
        else random.choice([0.5, 5.0, 12.0, inf]),
        broken=sometimes(
            0.15 * mishaps,
            lambda: frozenset(
                random.sample(["drain", "abort", "destroy", "callbacks", "exit"], random.choice([1, 2]))
            ),
            frozenset(),
        ),
        cannot=sometimes(0.05 * mishaps, lambda: True, False),
    )


def random_schedule(random: Random, mishaps: bool = True) -> Schedule:
    ranks = random.choice([1, 2, 2, 3, 3, 4, 5, 8])
    victims = random.choice([1, 1, 2, ranks])
    spread = random.choice([0.0, 0.01, 1.0, 3.0])
    handlers = random.choice([0.0, 0.0, 0.0, 0.5, 1.0])
    members = []
    for index in range(ranks):
        member = random_member(random, index < victims, spread, mishaps)
        members.append(member)
    random.shuffle(members)
    members = [Member(**{**vars(member), "handler": random.random() < handlers}) for member in members]
    board = random.choice(["none", "lost", "silent"]) if mishaps and random.random() < 0.2 else "ok"
    return Schedule(
        members=tuple(members),
        seed=random.randrange(1000),
        limits=grace(random.choice([25.0, 25.0, 25.0, 10.0, 3.0, 60.0])),
        accelerator=random.random() < 0.7,
        ahead=random.choice([0, 0, 1, 2]),
        step=random.choice([0.1, 0.2, 0.5, 1.5]),
        delay=random.choice([0.001, 0.05, 0.3]),
        board=board,
        board_at=random.random() * 6,
        host=random.choice([None, 0]),
        stop_at_step=random.random() < 0.9,
    )


# -- promises ---------------------------------------------------------------------------------------------------


def broken_promises(world: World) -> list[str]:
    schedule = world.schedule
    broken = [f"rank {rank.index} spins in {rank.stop.state}" for rank in world.spins]
    for rank in world.ranks:
        broken += [f"rank {rank.index}: {line}" for line in rank_promises(rank) if not rank.crashed]
    for rank, what, at in world.unsafe:
        if at < floor(rank) - 1e-6:
            broken.append(f"rank {rank.index} did {what} at {at:.3f}, under a running kernel of another")
        elif is_sound(schedule):
            broken.append(
                f"rank {rank.index} did {what} at {at:.3f}, floor or not, and nobody was dead or mute"
            )
    if is_healthy(schedule):
        broken += health(world)
    return broken


def rank_promises(rank):
    if rank.stop is None:
        return
    schedule, stop = rank.world.schedule, rank.stop
    if rank.alive:
        yield f"still there, in {stop.state}"
        return
    if rank.left_at > schedule.limits.hard + 1e-6 and not rank.late:
        yield f"left after {rank.left_at}"
    posts = [
        do for do in rank.did if do in ("tell", "answer", "plan_now", "arrived", "halt", "quiet", "left")
    ]
    if len(posts) != len(set(posts)):
        yield f"says things twice: {posts}"
    if "abort" in rank.did[rank.did.index("drained") :] if "drained" in rank.did else False:
        if "drain" not in rank.member.broken: yield "drained, and yet aborts"
    if any(
        stop.on(event, None, rank.left_at + 1) for event in ("tick", "quiet", "drained", "parked", "gone")
    ):
        if "die" in rank.did:
            yield "goes on after its end"
    yield from report(stop)


def report(stop):
    phases = [phase.as_dict() for phase in stop.phases]
    letters = "".join(LETTERS[phase["name"]] for phase in phases)
    if not re.fullmatch(r"y?(s(p(d?a?q?r?e?)?)?)?", letters):
        yield f"phases in the order {letters}"
    if letters[-1:] != "e" and stop.outcome != "forced":
        yield f"ends in phase {letters}"
    clock = 0.0
    for phase in phases:
        if phase["outcome"] not in ("ok", "skipped", "timeout", "error"):
            yield f"{phase['name']} has the outcome {phase['outcome']!r}"
        elif abs(phase["start"] - clock) > 1e-6 or phase["end"] < phase["start"]:
            yield f"{phase['name']} from {phase['start']} to {phase['end']} begins after {clock}"
        clock = phase["end"] or clock


def floor(rank) -> float:
    """By then every rank that was told at the same time has drained or aborted, without a second to spare."""
    limits, begin = rank.world.schedule.limits, 0.0
    for phase in rank.stop.phases:
        if phase.name == "yield":
            begin = phase.end
    left = min(limits.hard - begin, rank.stop.heard.get("notice", {}).get("left", inf))
    scale = min(1.0, left / total(limits))
    return begin + scale * (limits.step + limits.drain + limits.abort)


def is_sound(schedule: Schedule) -> bool:
    """Whatever the training does, every rank hears, speaks and can abort: then no floor is needed."""
    return (
        schedule.board == "ok"
        and not any(member.handler for member in schedule.members)
        and not any(member.fate in ("crash", "freeze", "save", "backup") for member in schedule.members)
        and not any(member.broken for member in schedule.members)
        and schedule.limits.hard >= 9
    )


def is_healthy(schedule: Schedule) -> bool:
    """Everyone can get to the agreed step in time."""
    members, limits = schedule.members, schedule.limits
    step = schedule.step * max(member.pace for member in members)
    signals = [m.signal for m in members if m.signal is not None]
    handlers = sum(member.handler for member in members)
    if handlers and max(signals) - min(signals) > min(3.0, limits.yield_ / 2) - schedule.delay:
        return False
    left = limits.hard - (limits.yield_ if handlers else 0)
    fits = limits.step * min(1, left / total(limits))
    return (
        schedule.board == "ok"
        and not any(m.fate or m.broken or m.cannot for m in members)
        and handlers in (0, len(members))
        and schedule.stop_at_step
        and any(m.role == "train" for m in members)
        and (3 + schedule.ahead) * step + 8 * schedule.delay < fits
        and 4 * schedule.delay + 0.1 < fits / 2
    )


def health(world):
    stops = [rank.stop for rank in world.ranks]
    if any(stop is None for stop in stops):
        yield "somebody was not told"
        return
    trainers = [rank for rank in world.ranks if rank.member.role == "train"]
    if not all(rank.stop.heard["steps"][0] for rank in trainers):
        return  # one that has not stepped yet cannot be told from one that never does
    where = {rank.stop.heard.get("stopped") for rank in trainers}
    if len(where) != 1 or None in where:
        yield f"stopped at {where}"
    # One that never steps does not know where the others stop: its next collective never ends.
    unaware = any(rank.member.role == "helper" for rank in world.ranks)
    for rank in trainers if unaware else world.ranks:
        if rank.stop.outcome != "clean":
            yield f"outcome {rank.stop.outcome}"
        if "abort" in rank.did:
            yield "an abort"
        if "destroy" not in rank.did and world.schedule.accelerator and not unaware:
            yield "no destroy"
    if world.schedule.host is not None and not unaware and len(world.ranks) > 1:
        host = world.ranks[world.schedule.host]
        if any(
            rank is not host and rank.start + rank.left_at > host.start + host.left_at + 0.11
            for rank in world.ranks
        ):
            yield "the host left before the others"


def run(schedule: Schedule) -> World:
    return World(schedule).run()


def assert_promises(schedule: Schedule) -> None:
    broken = broken_promises(run(schedule))
    assert not broken, f"{broken}\nin {schedule}"
