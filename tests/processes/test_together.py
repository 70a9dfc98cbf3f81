"""No step is lost that could be kept: the application saves on every rank after the same iteration."""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from harness import NONE, SHORT, SIGTERM, wait_until

EVICTIONS = int(os.environ.get("TOGETHER_EVICTIONS", "10"))
# The application has GRACE - 1 - 6 s.
PATIENT = {"AUTOTEARDOWN_GRACE": 16}
IMPATIENT = {"AUTOTEARDOWN_GRACE": 9}
WHO = {"one": [1], "the hub": [0], "two": [1, 2], "all": [0, 1, 2]}


def checkpoints(job, ranks, in_handler=False):
    """The iteration of each rank's checkpoint, all of which load and are what that iteration made of the weights.

    A handler runs at the end of `Optimizer.step`: for one that saves by itself the loop has not counted that step yet.
    """
    found = {}
    for path in sorted((job.folder / "saved").glob("*.pt")):
        state = torch.load(path)
        (made,) = set(state["weight"].tolist())
        assert state["step"] == (made - 1 if in_handler else made)
        found[int(path.stem)] = state["step"]
    assert sorted(found) == list(range(ranks)), (found, [rank.transcript() for rank in job.ranks])
    return found


def saved_together(job, ranks, grace=16, code=42, in_handler=False):
    """All are out with the program's own code, after a checkpoint of the same iteration."""
    first = min(rank.signalled for rank in ranks if rank.signalled)
    for rank in ranks:
        rank.signalled = rank.signalled or first
        assert rank.outlast(grace) == code, rank.transcript()
    found = checkpoints(job, len(ranks), in_handler)
    assert len(set(found.values())) == 1, (found, [rank.transcript() for rank in ranks])
    for rank in ranks:  # the agent has nothing to tell
        assert not [text for text in rank.log_lines if text.startswith("done")], rank.transcript()


def started(job, style, *args, ranks=3, **options):
    """A world in mid-training."""
    world = job.world("saver.py", ranks, style, *args, **{**PATIENT, **options})
    for rank in world:
        rank.wait_for("^step 3$")
    return world


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("style", ["flag", "poll"])
def test_every_rank_saves_at_the_same_iteration(job, style, who):
    """Issue: one rank signalled, or two at once, or all: every rank saves, after the same iteration."""
    ranks = started(job, style)
    for victim in WHO[who]:
        ranks[victim].signal()
    saved_together(job, ranks)


@pytest.mark.parametrize("style", ["broadcast", "exits", "inside", "asyncio", "thread"])
@pytest.mark.parametrize("who", ["one", "all"])
def test_whatever_the_handler_does(job, style, who):
    """Lightning's broadcast, Composer's SystemExit, a save inside, an event loop's, one beside the training thread."""
    ranks = started(job, style)
    for victim in WHO[who]:
        ranks[victim].signal()
    saved_together(job, ranks, in_handler=style in ("exits", "inside"))
    for rank in ranks:
        assert rank.stdout.count("handler at") == 1, rank.transcript()


@pytest.mark.parametrize("style", ["asyncio-apart", "uvloop", "uvloop-apart", "trio", "trio-apart"])
@pytest.mark.parametrize("who", ["one", "all"])
def test_an_event_loops_handler(job, style, who):
    """uvloop's, trio's; with the training on the loop's own thread, or on another while the loop has nothing to do."""
    pytest.importorskip(style.partition("-")[0])
    ranks = started(job, style)
    for victim in WHO[who]:
        ranks[victim].signal()
    saved_together(job, ranks)
    for rank in ranks:
        assert rank.stdout.count("handler at") == 1, rank.transcript()
        # Nobody waits in vain for a loop to come by.
        assert any(line.startswith("step ok") for line in rank.log_lines), rank.transcript()


def test_control_a_flag_on_one_rank(job):
    """The control: without the agent the signalled rank saves and the others hang in its absence, or fail."""
    ranks = job.world("saver.py", 3, "flag", mode=NONE)
    for rank in ranks:
        rank.wait_for("^step 3$")
    ranks[1].signal()
    assert ranks[1].outlast(SHORT * 5) == 42, ranks[1].transcript()
    for rank in (ranks[0], ranks[2]):
        rank.signalled = ranks[1].signalled
        assert rank.outlast(SHORT * 5) not in (0, 42), rank.transcript()
    assert [path.stem for path in (job.folder / "saved").glob("*.pt")] == ["1"]


@pytest.mark.parametrize("style", ["flag", pytest.param("poll", marks=pytest.mark.slow)])
def test_under_torchrun(job, style):
    """All workers of a node are signalled by their agent, at moments of their own."""
    launcher = job.torchrun("saver.py", style, ranks=3, **PATIENT)
    wait_until(lambda: launcher.count("step 5") >= 3, "three ranks at work")
    launcher.signal()
    launcher.outlast(30)
    assert launcher.code != -9, launcher.transcript()
    assert len(set(checkpoints(job, 3).values())) == 1, launcher.transcript()
    wait_until(lambda: not job.survivors(), "the end of the workers", 10)


def workers(launcher, ranks):
    """The pids of torchrun's workers."""

    def look():
        found = [
            int(pid)
            for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            if b"saver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return found if len(found) == ranks else None

    return wait_until(look, "the workers")


def test_one_worker_under_torchrun(job):
    """One worker is signalled, and torchrun signals the others when that one has left: all have saved by then."""
    launcher = job.torchrun("saver.py", "flag", ranks=3, **PATIENT)
    wait_until(lambda: launcher.count("step 5") >= 3, "three ranks at work")
    os.kill(workers(launcher, 3)[1], SIGTERM)
    launcher.wait(30)
    assert len(set(checkpoints(job, 3).values())) == 1, launcher.transcript()
    assert "exited with 42" in launcher.stderr, launcher.transcript()


def test_once_more_while_it_saves(job):
    """A second signal is the application's at once: its handler is called again, and the save goes on."""
    ranks = started(job, "slow-save")
    ranks[1].signal()
    ranks[1].wait_for("^saving$")
    time.sleep(2.2)  # sooner, it is a repetition of the first
    ranks[1].signal()
    ranks[1].wait_for(r"(?s)handler at .*handler at")
    saved_together(job, ranks)


def test_a_peers_own_signal_comes_late(job):
    """It is the same eviction (Lightning's handler passes it on to the ranks that it has launched): called once."""
    ranks = started(job, "slow-save")
    ranks[1].signal()
    ranks[0].wait_for("^saving$")
    ranks[0].signal()
    saved_together(job, ranks)
    for rank in ranks:
        assert rank.stdout.count("handler at") == 1, rank.transcript()


def test_a_save_that_needs_all_ranks(job):
    """The group is alive: what the application saves may be collective."""
    ranks = started(job, "collective")
    ranks[2].signal()
    first = ranks[2].signalled
    for rank in ranks:
        rank.signalled = first
        assert rank.outlast(16) == 42, rank.transcript()
    steps = {torch.load(path)["step"] for path in (job.folder / "saved").glob("*.pt")}
    assert len(steps) == 1
    for path in (job.folder / "saved").glob("*.pt"):
        state = torch.load(path)
        assert set(state["weight"].tolist()) == {3.0 * state["step"]}


@pytest.mark.parametrize("style", ["logs", "deaf-poll"])
def test_an_application_that_ignores_it(job, style):
    """Its time over, the group is stopped as if it had no handler: together, inside the grace period."""
    ranks = started(job, style, **IMPATIENT)
    ranks[1].signal()
    for rank, code in zip(ranks, (143, 0, 143)):
        rank.signalled = ranks[1].signalled
        assert rank.outlast(9) == code, rank.transcript()
        assert rank.phase("yield")["outcome"] == "timeout", rank.transcript()
        assert rank.report()["outcome"] == "partial"
        assert rank.stdout.count("handler at") == (style == "logs")
    assert ranks[1].seconds > 1.0


def test_ranks_without_a_handler(job):
    """They go on beside those that have one, and are stopped when those have left."""
    ranks = started(job, "mixed", ranks=4)
    ranks[1].signal()
    codes = {0: 42, 1: 0, 2: 42, 3: 143}
    for number, rank in enumerate(ranks):
        rank.signalled = ranks[1].signalled
        assert rank.outlast(16) == codes[number], rank.transcript()
    found = {number: torch.load(job.folder / f"saved/{number}.pt")["step"] for number in (0, 2)}
    assert len(set(found.values())) == 1
    for number in (1, 3):
        assert ranks[number].seconds < 9, "they need not wait for the end of its time"


def test_they_hear_of_it_before_the_group_is_gone(job):
    """One without a handler is free although the other's `destroy_process_group` takes long: it must not fail in it."""
    ranks = job.world(
        """
        import os, signal, time
        from pathlib import Path
        import torch, torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        real, asked = c10d._unregister_all_process_groups, []
        def slow():
            print("destroys", flush=True)
            while not Path("free").exists():
                time.sleep(0.01)
            real()
        c10d._unregister_all_process_groups = slow
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        step = 0
        while not asked:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            step += 1
            print("step", step, flush=True)
        dist.destroy_process_group()
        raise SystemExit(42)
        """,
        **PATIENT,
    )
    for rank in ranks:
        rank.wait_for("^step 3$")
    ranks[0].signal()
    ranks[0].wait_for("destroys")
    assert ranks[1].wait() == 143, ranks[1].transcript()
    assert ranks[0].running, "and that is not over"
    (job.folder / "free").touch()
    assert ranks[0].wait() == 42, ranks[0].transcript()


@pytest.mark.parametrize("after", ["0", "3600"], ids=["trains", "has stepped once"])
@pytest.mark.parametrize("handlers", ["together", "alone"])
def test_one_that_puts_the_default_back_and_sends_itself_the_signal(job, handlers, after):
    """As uvicorn and many others do when they have shut down: not a line of the program runs after that."""
    ranks = job.world(
        """
        import os, signal, threading, time
        import torch.distributed as dist
        import apart

        dist.init_process_group("gloo")
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        apart.begin(AFTER)
        print("ready", flush=True)
        while not asked.is_set():
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        while True:
            os.write(1, b"ran on\\n")
        """.replace("AFTER", after),
        AUTOTEARDOWN_HANDLERS=handlers,
        **PATIENT,
    )
    for rank in ranks:
        rank.wait_for("ready")
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(16) == (0 if rank is ranks[0] else 143), rank.transcript()
        assert not rank.count("ran on"), rank.transcript()


def test_its_own_signal_after_it_has_left(job):
    """The handler has run for this eviction, on a peer's notice, and its program has left the group: it is one call."""
    ranks = job.world(
        """
        import signal, sys, time
        import torch, torch.distributed as dist

        def handler(*_):
            global asked
            asked = True
            print("handler", flush=True)

        asked = False
        signal.signal(signal.SIGTERM, handler)
        dist.init_process_group("gloo")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        while not asked:
            optimizer.step()
            print("step", flush=True)
            time.sleep(0.01)
        dist.destroy_process_group()
        print("left", flush=True)
        time.sleep(1)
        sys.exit(42)
        """,
        **PATIENT,
    )
    for rank in ranks:
        rank.wait_for("step\nstep")
    ranks[0].signal()
    ranks[1].wait_for("left")
    ranks[1].signal()
    for rank in ranks:
        assert rank.outlast(16) == 42, rank.transcript()
        assert rank.count("handler") == 1, rank.transcript()


def test_a_handler_that_raises(job):
    """What it raises is raised in the training, on every rank, as without the agent; each rank keeps its own code."""
    ranks = started(job, "raises")
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(16) == 1, rank.transcript()
        assert "ValueError: the handler has failed" in rank.stderr
    assert len({rank.stdout.split("handler at ")[1].split()[0] for rank in ranks}) == 1


def test_a_delivery_on_top_of_the_signal_s_own_handler(job):
    """The agreement can be faster than Python's handler on the main thread: one signal is still one call."""
    (rank,) = job.world(
        """
        import _thread, signal, sys, time
        from autoteardown.rank.eviction_owner import EvictionOwner
        import torch.distributed as dist

        def owner(self, signum):
            if _thread.get_native_id() == main:
                time.sleep(0.5)
            return real(self, signum)

        real, EvictionOwner.application_owns = EvictionOwner.application_owns, owner
        main = _thread.get_native_id()
        calls = []
        signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
        dist.init_process_group("gloo")
        print("ready", flush=True)
        while not calls:
            time.sleep(0.01)
        time.sleep(1)
        sys.exit(40 + len(calls))
        """,
        1,
        **PATIENT,
    )
    rank.wait_for("ready")
    assert rank.evict(16) == 41, rank.transcript()


def test_one_that_fails_while_another_still_saves(job):
    """The hub stays a moment for the others after its own end, and keeps its exit code if their time is over then."""
    ranks = job.world(
        """
        import os, signal, sys, time
        import torch, torch.distributed as dist
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        dist.init_process_group("gloo")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        while not stop:
            dist.all_reduce(torch.ones(1))
            optimizer.step()
            os.write(1, b"step\\n")
        if dist.get_rank() == 0:
            raise RuntimeError("the disk is full")
        time.sleep(60)
        """,
        2,
        AUTOTEARDOWN_GRACE=8,
    )
    for rank in ranks:
        rank.wait_for("step\n(.*\n)*step")
    ranks[1].signal()
    assert ranks[0].outlast(8) == 1, ranks[0].transcript()
    assert ranks[1].outlast(8) == 0, ranks[1].transcript()
    assert "at exit" not in ranks[0].stderr and "terminate called" not in ranks[0].stderr, ranks[
        0
    ].transcript()


def test_an_iteration_that_does_not_end(job):
    """No agreement in time: the handlers run at once, and the application has the rest of its time."""
    ranks = started(job, "inside", 3600)
    ranks[1].signal()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        assert rank.outlast(16) == 42, rank.transcript()
    assert set(checkpoints(job, 3).values()) == {3}
    assert ranks[1].seconds < 9


def test_alone(job):
    """AUTOTEARDOWN_HANDLERS=alone: its handler runs at once, on the signalled rank only."""
    ranks = started(job, "inside", AUTOTEARDOWN_HANDLERS="alone")
    ranks[1].signal()
    assert ranks[1].outlast(16) == 42, ranks[1].transcript()
    for rank in (ranks[0], ranks[2]):
        assert "handler at" not in rank.stdout


def evict_at_random(job, seed):
    """One world, one eviction at a random moment."""
    chance = random.Random(seed)
    ranks = started(job, "flag", 0, ranks=4)
    time.sleep(chance.uniform(0, 0.1))
    for victim in chance.sample(ranks, chance.choice([1, 1, 1, 2, 4])):
        victim.signal()
        time.sleep(chance.choice([0, 0, 0.003, 0.05]))
    saved_together(job, ranks)


@pytest.mark.parametrize("seed", range(EVICTIONS))
def test_at_random_moments(job, seed):
    """Issue: evictions at random moments; `TOGETHER_EVICTIONS=100` for as many as it asks for."""
    evict_at_random(job, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(EVICTIONS))
def test_at_random_moments_under_torchrun(job, seed):
    """The same with a launcher, itself or one of its workers, which reacts to the first who leaves."""
    chance = random.Random(seed)
    launcher = job.torchrun("saver.py", "flag", 0, ranks=4, **PATIENT)
    wait_until(lambda: launcher.count("step 5") >= 4, "four ranks at work", 240)
    victim = chance.choice([launcher.pid, *workers(launcher, 4)])
    time.sleep(chance.uniform(0, 0.1))
    os.kill(victim, SIGTERM)
    assert launcher.wait(30) == 1, launcher.transcript()
    assert len(set(checkpoints(job, 4).values())) == 1, launcher.transcript()
    # Signalled itself, it does not tell.
    assert victim == launcher.pid or "exited with 42" in launcher.stderr, launcher.transcript()
    assert "SIGKILL" not in launcher.stderr, launcher.transcript()
    assert " done: " not in launcher.stderr, "the agent has nothing to tell"
    wait_until(lambda: not job.survivors(), "the end of the workers", 10)
