"""Groups made without `init_process_group`, as RL frameworks make them to sync weights: seen, guarded, released."""

from __future__ import annotations

import json
import signal

import pytest
from harness import HANDWRITTEN, NONE, SHORT, alive, free_port

ALONE = "the members of a group made without init_process_group are not told"


@pytest.fixture
def start(job):
    """Two trainers and engines; returns them when all are there."""

    def start(trainers="steps", engines=("idle",), mode="agent", **env):
        sync, port = free_port(), free_port()
        where = {"WORLD_SIZE": 2, "MASTER_PORT": port, "AUTOTEARDOWN_GRACE": 25, "mode": mode, **env}
        program, count = "custom_group.py", len(engines)
        ranks = [
            job.start(
                program, "trainer", rank, sync, trainers if rank == 0 else "steps", count, RANK=rank, **where
            )
            for rank in range(2)
        ]
        own = {"AUTOTEARDOWN_GRACE": 25, "mode": mode, **env}
        ranks += [
            job.start(program, "engine", number, sync, what, count, **own)
            for number, what in enumerate(engines)
        ]
        for rank in ranks:
            rank.wait_for("^ready$")
        return ranks[:2], ranks[2:]

    return start


def status(rank):
    return json.loads(rank.wait_for("^status (.*)$").group(1))


def test_trainers_are_evicted_and_engines_are_not_told(start):
    """The default group stops together, after the same step, and releases the other group with it."""
    trainers, (engine,) = start()
    assert status(trainers[0])["alone"] == ""
    trainers[0].evict(25)
    assert [rank.outlast(25) for rank in trainers] == [0, 143], trainers[0].transcript()
    first, second = (rank.report() for rank in trainers)
    assert (first["cause"], second["cause"]) == ("signal", "peer")
    assert (first["outcome"], second["outcome"]) == ("clean", "clean"), trainers[0].transcript()
    assert first["steps"]["stopped_at"] == second["steps"]["stopped_at"]
    assert (first["rank"], first["world_size"]) == (0, 2)
    assert trainers[0].phase("destroy")["outcome"] == "ok"
    assert engine.running
    assert engine.log_lines == []


def test_a_release_that_waits_for_the_engines(start):
    """It costs a second, and neither the default group's release nor the outcome."""
    trainers, (engine,) = start(trainers="hangs")
    trainers[0].evict(25)
    assert [rank.outlast(25) for rank in trainers] == [0, 143], trainers[0].transcript()
    assert [rank.report()["outcome"] for rank in trainers] == ["clean", "clean"], trainers[0].transcript()
    destroy = trainers[0].phase("destroy")
    assert destroy["outcome"] == "ok"
    assert destroy["end"] - destroy["start"] > 0.9
    assert engine.running


def test_a_process_that_has_only_such_a_group(start):
    """It is guarded, on its own; the trainers go on."""
    trainers, (engine,) = start()
    found = status(engine)
    assert (found["state"], found["rank"], found["world_size"], found["backend"]) == ("armed", 1, 2, "gloo")
    assert (found["connected"], found["alone"]) == (False, ALONE)
    assert engine.evict(25) == 0, engine.transcript()
    report = engine.report()
    assert (report["cause"], report["outcome"], report["rank"], report["world_size"]) == (
        "signal",
        "partial",
        1,
        2,
    )
    assert engine.phase("destroy")["outcome"] == "ok", engine.transcript()
    assert f"peers are not told: {ALONE}" in engine.log_lines
    assert engine.seconds < 8
    assert all(rank.running and rank.log_lines == [] for rank in trainers)


@pytest.mark.parametrize("mode", ["agent", HANDWRITTEN])
def test_an_engine_that_waits_for_weights(start, mode):
    """The control: a handler in Python never runs there."""
    _, (engine, other) = start(engines=("blocked", "idle"), mode=mode)
    engine.wait_blocked("^ready$")
    if mode == HANDWRITTEN:
        assert engine.evict(SHORT) == -signal.SIGKILL
        return
    assert engine.evict(25) == 0, engine.transcript()
    assert engine.report()["outcome"] == "aborted"
    assert other.running


def test_a_trainer_that_waits_in_such_a_group(start):
    """Its peers of the default group are told, as from any other wedge."""
    trainers, (engine,) = start(trainers="blocked")
    trainers[0].wait_blocked("^ready$")
    assert trainers[0].evict(25) == 0, trainers[0].transcript()
    assert trainers[1].outlast(25) == 143
    assert (trainers[0].report()["cause"], trainers[1].report()["cause"]) == ("signal", "peer")
    assert engine.running


def test_without_the_agent_an_engine_dies_of_its_signal(start):
    _, (engine,) = start(mode=NONE)
    assert engine.evict(25) == -signal.SIGTERM


LIFE = """
    import json, os, signal, sys, threading, time
    import torch, torch.distributed as dist
    import autoteardown
    from autoteardown.process_groups import operations; from autoteardown.rank import guard
    from custom_group import init_custom_process_group

    def in_registry():
        return any(name.startswith(str(os.getpid())) for name in os.listdir(os.environ["AUTOTEARDOWN_RUNTIME_DIR"]))

    def say(what):
        found = {key: autoteardown.status().get(key) for key in ("state", "rank", "world_size", "alone")}
        found["threads"] = len(os.listdir("/proc/self/task"))
        found["files"] = len(os.listdir("/proc/self/fd"))
        listed = found["state"] == "armed"
        until = time.monotonic() + 10  # the registry is written on the side
        while listed is not in_registry() and time.monotonic() < until:
            time.sleep(0.01)
        found["listed"] = in_registry()
        found["handler"] = str(signal.getsignal(signal.SIGTERM))
        print(what, json.dumps(found), flush=True)

    ports = iter(sys.argv[1:])
    os.makedirs(os.environ["AUTOTEARDOWN_RUNTIME_DIR"], 0o700, exist_ok=True)
    # What torch itself leaves behind after its first group is no business of ours.
    dist.destroy_process_group(init_custom_process_group(next(ports), 0, 1, "zero"))
    say("before")
    for _ in range(3):
        first = init_custom_process_group(next(ports), 0, 1, "first")
        say("first")
        second = init_custom_process_group(next(ports), 0, 1, "second")
        dist.destroy_process_group(first)
        say("second")
        try:
            dist.destroy_process_group()
        except (AssertionError, ValueError):
            say("still")
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{next(ports)}", rank=0, world_size=1)
        say("default")
        third = init_custom_process_group(next(ports), 0, 1, "third")
        dist.all_reduce(torch.ones(1), group=third)
        print("numbers", json.dumps([sorted(operations.sequence_numbers()), sorted(operations.comparable_numbers())]))
        dist.destroy_process_group(third)
        say("without third")
        dist.destroy_process_group()
        del first, second, third
        say("after")
    try:
        init_custom_process_group(next(ports), 0, 1, None)
    except Exception as error:
        print("failed", type(error).__name__)
    say("failed")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_life_of_such_groups(job):
    """Armed by the first, disarmed by the last; a default group comes first; nothing is left behind."""
    rank = job.start(LIFE, *(free_port() for _ in range(20)), fresh=True)
    rank.wait_for("^ready$")
    said = {}
    for line in rank.stdout.splitlines():
        what, _, rest = line.partition(" ")
        said.setdefault(what if what != "without" else "without third", []).append(
            rest.removeprefix("third ")
        )
    found = {
        what: [json.loads(line) for line in lines]
        for what, lines in said.items()
        if what not in ("ready", "failed")
    }
    for what in ("first", "second", "still"):
        assert [
            (each["state"], each["rank"], each["world_size"], each["listed"]) for each in found[what]
        ] == [("armed", 0, 1, True)] * 3, what
    for what in ("default", "without third"):
        assert [(each["state"], each["listed"]) for each in found[what]] == [("armed", True)] * 3
    before = found["before"][0]
    assert before["state"] == "idle" and not before["listed"]
    for after in found["after"]:
        assert after == before, rank.transcript()
    for every, comparable in found["numbers"]:
        assert "third" in every
        assert "third" not in comparable
        assert len(comparable) == 1
    assert rank.log_lines == [], rank.transcript()
    rank.signal()
    assert rank.wait() == -signal.SIGTERM, rank.transcript()
    assert not alive(rank.pid)


def test_of_two_members_without_a_default_group(job):
    """Nobody tells the other one, which gloo frees."""
    port = free_port()
    program = """
        import sys, time
        import torch, torch.distributed as dist
        from custom_group import init_custom_process_group
        group = init_custom_process_group(sys.argv[1], int(sys.argv[2]), 2)
        print("ready", flush=True)
        try:
            dist.all_reduce(torch.ones(1), group=group) if sys.argv[2] == "0" else time.sleep(600)
        except RuntimeError as error:
            print("error", type(error).__name__, flush=True)
            time.sleep(600)
    """
    ranks = [job.start(program, port, rank, AUTOTEARDOWN_GRACE=25, fresh=True) for rank in range(2)]
    ranks[0].wait_blocked("^ready$")
    ranks[1].wait_for("^ready$")
    assert ranks[1].evict(25) == 0, ranks[1].transcript()
    ranks[0].wait_for("^error")
    assert ranks[0].log_lines == []
    assert ranks[0].evict(25) == 0, ranks[0].transcript()
