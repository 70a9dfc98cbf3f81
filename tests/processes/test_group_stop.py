"""One rank is signalled, and the whole group stops: same step, quiet devices, no rank left waiting."""

import os
import re
import signal

import pytest
from harness import FSDP2_ON_CPUS, GRACE, HANDWRITTEN, NONE, SIGTERM, alive, free_port, wait_until


def ready(ranks, step=3):
    """Wait until all have trained that far."""
    for rank in ranks:
        rank.wait_for(rf"step {step}$")


# An agreement takes no longer for it, and a busy machine may need a second to connect four ranks to the board.
ROOMY = {"AUTOTEARDOWN_GRACE": 25}


def all_out(ranks, victims=(0,), peers=143, grace=GRACE):
    """Every rank is out before anybody's SIGKILL, with the code that its part in it asks for."""
    started = min(rank.signalled for rank in ranks if rank.signalled)
    for rank in ranks:
        rank.signalled = rank.signalled or started
    codes = [rank.outlast(grace) for rank in ranks]
    expected = [0 if index in victims else peers for index in range(len(ranks))]
    assert codes == expected, "\n".join(rank.transcript() for rank in ranks)


def same_step(ranks):
    """All reports name the same last step, and it is the step that the rank did stop at."""
    steps = [rank.report()["steps"] for rank in ranks]
    assert len({step["stopped_at"] for step in steps}) == 1, steps
    for step in steps:
        # Further than agreed only where ranks were uneven.
        assert step["stopped_at"] >= step["agreed"] >= step["at_signal"], steps
    return steps[0]["stopped_at"]


def clean(ranks):
    """Drained and released, everywhere, with no output beside the agent's."""
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert rank.phase("destroy")["outcome"] == "ok", rank.transcript()
        assert rank.noise == [], rank.transcript()


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_one_of_four(job, victim):
    """Four DDP ranks, one signalled: same step, clean on all, victim 0, the others 143, no traceback."""
    ranks = job.world("train.py", 4, **ROOMY)
    ready(ranks)
    ranks[victim].signal()
    all_out(ranks, victims=[victim], grace=25)
    clean(ranks)
    stopped = same_step(ranks)
    for index, rank in enumerate(ranks):
        report = rank.report()
        said = [int(step) for step in re.findall(r"step (\d+)$", rank.stdout, re.MULTILINE)]
        assert said[-1] in (
            stopped,
            stopped - 1,
        )  # it parks inside `optimizer.step`, before the script says so
        assert report["cause"] == ("signal" if index == victim else "peer")
        assert report["origin"]["rank"] == victim
        assert report["origin"]["pid"] == ranks[victim].pid
        # "within one step + 1 s", a step takes 10 ms here
        assert rank.phase("exit")["start"] < 3, report


def test_two_at_once(job):
    """Two ranks signalled at the same time."""
    ranks = job.world("train.py", 3, **ROOMY)
    ready(ranks)
    for rank in ranks[1:]:
        rank.signal()
    all_out(ranks, victims=[1, 2], grace=25)
    clean(ranks)
    same_step(ranks)
    assert len({rank.report()["origin"]["pid"] for rank in ranks}) == 1


def test_signalled_while_a_stop_is_going_on(job):
    """A second rank gets its signal while the group stops already."""
    ranks = job.world("uneven.py", 3, "slow", **ROOMY)
    ready(ranks)
    ranks[0].signal()
    wait_until(lambda: ranks[1].log_lines, "the notice to reach rank 1")
    if ranks[1].running:
        ranks[1].signal()
    started = ranks[0].signalled
    codes = []
    for rank in ranks:
        rank.signalled = started
        codes.append(rank.outlast())
    assert codes[0] == 0 and codes[2] == 143, [rank.transcript() for rank in ranks]
    assert codes[1] in (0, 143)
    assert codes[1] == ranks[1].report()["exit_code"]
    same_step(ranks)


def test_all_at_once_skewed(job):
    """A platform's signals reach the ranks of one node a second apart."""
    ranks = job.world("train.py", 3, **ROOMY)
    ready(ranks)
    for rank in ranks:
        if rank.running:
            rank.signal()
        wait_until(lambda: ranks[0].log_lines or not ranks[0].running, "the first rank to react")
    codes = []
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        codes.append(rank.outlast())
    assert codes[0] == 0 and set(codes) <= {0, 143}, [rank.transcript() for rank in ranks]
    clean(ranks)
    same_step(ranks)


@pytest.mark.parametrize(
    "kind", [pytest.param("fsdp2", marks=FSDP2_ON_CPUS), "accumulate", "scaler", "two", "lbfgs"]
)
def test_step_boundary(job, kind):
    """FSDP2, gradient accumulation, skipped steps, several optimizers, closures: the same step on all."""
    ranks = job.world("train.py", 2, "--kind", kind, **ROOMY)
    ready(ranks, 4)
    ranks[1].signal()
    all_out(ranks, victims=[1], grace=25)
    clean(ranks)
    same_step(ranks)


def test_control_one_of_two(job):
    """The hand-written handler frees one rank at best; its peer fails with a traceback (on NCCL: 600 s later)."""
    ranks = job.world("train.py", mode=HANDWRITTEN)
    ready(ranks)
    assert ranks[0].evict() in (0, -9)  # now and then its destroy hangs
    assert ranks[1].wait() == 1
    assert "Traceback" in ranks[1].stderr


def test_signalled_before_the_channel_is_connected(job):
    """The time for an agreement is not over before anybody could be told of it."""
    late = """
        from autoteardown.channel.connection import Connection
        start = Connection.start
        Connection.start = lambda self: self._loop.at(3.0, lambda: start(self))  # so long after its init
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(10**6):
            model(torch.ones(4)).sum().backward()
            optimizer.step()
            print("step", step, flush=True)
        """
    ranks = job.world(late, 2, **ROOMY)
    ranks[1].wait_for("step 5$")
    ranks[1].signal()
    all_out(ranks, victims=[1], grace=25)
    clean(ranks)
    same_step(ranks)


def test_slow_ranks_and_a_helper(job):
    """Ranks at different speeds; one that never steps is not counted, but is needed until the others are there."""
    roles = ["steps", "slow", "helper"]
    ranks = job.world(
        "uneven.py", 3, each={rank: {"args": [role]} for rank, role in enumerate(roles)}, **ROOMY
    )
    ready(ranks)
    ranks[0].signal()
    all_out(ranks, grace=25)
    same_step(ranks[:2])
    # The helper may have gone on into the next collective, which the parked ranks do not join.
    outcomes = [rank.report()["outcome"] for rank in ranks]
    assert outcomes == ["clean"] * 3 or outcomes[:2] == ["partial"] * 2, ranks[0].transcript()
    assert (ranks[2].report()["steps"] or {"stopped_at": None})["stopped_at"] is None


@pytest.mark.parametrize("how, own_code", [("returns", None), ("ends", 0), ("raises", 1)])
@pytest.mark.parametrize("who", ["one", "all"])
def test_training_ends_on_the_way(job, how, own_code, who):
    """A training thread that raises or returns on the way to the agreed step: nobody waits out the time."""
    grace = 20
    other = how if who == "all" else "slow"
    ranks = job.world("uneven.py", each={0: {"args": [how]}, 1: {"args": [other]}}, AUTOTEARDOWN_GRACE=grace)
    ready(ranks)
    (job.folder / "go").touch()
    ranks[1].signal()
    ranks[0].signalled = ranks[1].signalled
    codes = [rank.outlast(grace) for rank in ranks]
    # A rank that was through before it heard of the stop ends as it would without the agent.
    assert codes[0] in (143, 143 if own_code is None else own_code), ranks[0].transcript()
    assert codes[1] in (0, own_code if who == "all" else 0), ranks[1].transcript()
    for report in job.all_reports().values():
        steps = [phase for phase in report["phases"] if phase["name"] == "step"]
        assert all(phase["end"] < 0.6 * 8 * (grace - 1) / 24 for phase in steps), ranks[1].transcript()


@pytest.mark.parametrize("stop_at", ["step", "now"])
def test_stop_at(job, stop_at):
    """AUTOTEARDOWN_STOP_AT=now: at the next bytecode, no step is waited for."""
    ranks = job.world("train.py", AUTOTEARDOWN_STOP_AT=stop_at, **ROOMY)
    ready(ranks)
    ranks[0].signal()
    all_out(ranks, grace=25)
    for rank in ranks:
        step = rank.phase("step")
        assert (step is not None and step["outcome"] == "ok") == (stop_at == "step"), rank.report()


def test_step_longer_than_the_budget(job):
    """A step that takes longer than there is time: all are out in time nevertheless."""
    ranks = job.world("uneven.py", 2, "long")
    ready(ranks, 1)
    ranks[0].signal()
    all_out(ranks)


def test_blocked_peer_is_released(job):
    """A rank stuck in a collective that its peer (in a Python loop) never joins: all out, none SIGKILLed."""
    ranks = job.world("stuck.py", 3)
    for rank in ranks[1:]:
        rank.wait_for("ready")
    ranks[0].wait_blocked("ready")
    ranks[2].signal()
    all_out(ranks, victims=[2])
    # On gloo the exit of a peer may release it before it counts as wedged.
    assert ranks[0].report()["outcome"] in ("aborted", "partial", "clean")
    assert ranks[0].report()["cause"] == "peer"
    assert "all_reduce" in str(ranks[0].report()["stuck"])


def test_everybody_blocked(job):
    """Every rank of a world waits for one that was SIGSTOPped (a frozen node): those that can leave, leave in time."""
    ranks = job.world("train.py", 3)
    ready(ranks)
    ranks[2].signal(signal.SIGSTOP)
    ranks[0].wait_blocked("step")
    ranks[0].signalled = None
    ranks[0].signal()
    all_out(ranks[:2])


def test_a_peer_died_without_a_word(job):
    """One rank SIGKILLed, then SIGTERM to another: everyone out in time, no hang."""
    ranks = job.world("train.py", 4)
    ready(ranks)
    ranks[3].signal(signal.SIGKILL)
    ranks[1].signal()
    ranks[1].outlast()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        # gloo tells the survivors at once: they may have failed by themselves before they heard of the signal.
        assert rank.outlast() in {ranks[1]: (0, 1), ranks[3]: (-9,)}.get(rank, (143, 1)), rank.transcript()


def test_the_store_died(job):
    """The hub has ended (its host was SIGKILLed): the rank stops without its peers, in time."""
    ranks = job.world("stuck.py", 3)
    for rank in ranks:
        rank.wait_for("ready")
    ranks[0].signal(signal.SIGKILL)
    ranks[0].wait()
    assert ranks[1].evict() == 0, ranks[1].transcript()


@pytest.mark.parametrize("setting", ["victim", "all"])
def test_peers_off(job, setting):
    """AUTOTEARDOWN_PEERS=off: this rank neither tells its peers nor follows them."""
    off = {"AUTOTEARDOWN_PEERS": "off"}
    program = """
        import time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """
    ranks = job.world(program, each={0: off, 1: off if setting == "all" else {}})
    for rank in ranks:
        rank.wait_for("ready")
    victim, other = ranks if setting == "victim" else ranks[::-1]
    assert victim.evict() == 0, victim.transcript()
    assert other.running, other.transcript()
    assert other.log_lines == []


@pytest.mark.parametrize("kind", ["file", "store", "prefix", "hash"])
@pytest.mark.parametrize("victim", [0, 1])
def test_kinds_of_store(job, kind, victim):
    """`file://`, a caller's own `store=`, nested PrefixStores; a store that nobody else can see."""
    if kind == "hash" and victim:
        pytest.skip("one rank")
    # The default grace period: a store that has to be polled is looked at once a second.
    ranks = job.world("inits.py", 1 if kind == "hash" else 2, kind, AUTOTEARDOWN_GRACE=25)
    ready(ranks)
    ranks[victim].signal()
    all_out(ranks, victims=[victim], grace=25)
    clean(ranks)
    same_step(ranks)


def test_a_second_world_after_the_first(job):
    """Several inits one after another: stale messages of the first world mean nothing in the second."""
    ranks = job.world("uneven.py", 2, "again", **ROOMY)
    ready(ranks)
    ranks[1].signal()
    all_out(ranks, victims=[1], grace=25)
    clean(ranks)
    same_step(ranks)


def test_during_a_second_init(job):
    """Evicted while it waits in a second init for peers that never come."""
    rank, _ = job.world(
        """
        import os, time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()
        if os.environ["RANK"] == "1":
            time.sleep(3600)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        print("joining", flush=True)
        dist.init_process_group("gloo")
        """
    )
    rank.wait_blocked("joining")
    assert rank.evict() == 0, rank.transcript()


def test_in_the_middle_of_destroy(job):
    """Eviction in mid-`destroy_process_group` of the program's own, which never returns."""
    (rank,) = job.world(
        """
        import faults
        import torch.distributed as dist
        faults.install()
        dist.init_process_group("faulty")
        print("ready", flush=True)
        dist.destroy_process_group()
        """,
        1,
        FAULTS="destroy-hangs",
    )
    rank.wait_blocked("destroy")
    assert rank.evict() == 0, rank.transcript()


def test_the_store_host_leaves_last(job):
    """The rank that hosts the store leaves last, so that nobody's store breaks under it."""
    ranks = job.world("train.py", 3, **ROOMY)
    ready(ranks)
    ranks[0].signal()
    all_out(ranks, grace=25)
    clean(ranks)


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("how", ["destroy", "leave"])
def test_a_normal_end_in_any_order(job, order, how):
    """No new warning or traceback on a normal end, in any order, with or without destroy."""
    program = """
        import os, sys, time
        import torch.distributed as dist
        order, how = sys.argv[1:]
        dist.init_process_group("gloo")
        dist.barrier()
        if how == "destroy":
            dist.destroy_process_group()
        first = (dist.get_rank() if how == "leave" else int(os.environ["RANK"])) == (0 if order == "first" else 1)
        while not first and not os.path.exists("left"):
            time.sleep(0.01)
        """
    ranks = job.world(program, 2, order, how)
    leaver, other = ranks if order == "first" else ranks[::-1]
    assert leaver.wait() == 0, leaver.transcript()
    (job.folder / "left").touch()
    assert other.wait() == 0, other.transcript()
    assert [rank.stderr for rank in ranks] == ["", ""]


def test_the_whole_job_ends_with_the_first_failure_as_ever(job):
    """A rank that raises ends the job as it does without the agent: same codes, no teardown."""
    seen = []
    for mode in ("agent", NONE):
        ranks = job.world("uneven.py", 2, each={0: {"args": ["raises"]}, 1: {"args": ["steps"]}}, mode=mode)
        ready(ranks)
        (job.folder / "go").touch()
        seen.append([rank.wait() for rank in ranks])
        (job.folder / "go").unlink()
        assert not list(job.reports.iterdir())
    assert seen[0] == seen[1] == [1, 1]


def worker_pids(launcher, ranks):
    """The pids of a torchrun agent's workers, by rank, when all of them have trained for a while."""
    for rank in ranks:
        launcher.wait_for(rf"^rank {rank} pid \d+ step 3$")
    return {
        rank: int(re.search(rf"^rank {rank} pid (\d+)", launcher.stdout, re.MULTILINE)[1]) for rank in ranks
    }


def torchrun_clean(job, count):
    """All reports are there, clean, and name the same step."""
    reports = job.all_reports()
    assert sorted(reports) == list(range(count))
    assert {report["outcome"] for report in reports.values()} == {"clean"}
    assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1
    return reports


@pytest.mark.slow
def test_torchrun_one_worker(job):
    """DDP under torchrun, four ranks, SIGTERM to one worker: all out, same step, clean, no traceback."""
    launcher = job.torchrun("train.py", ranks=4, AUTOTEARDOWN_GRACE=25)
    pids = worker_pids(launcher, range(4))
    os.kill(pids[2], SIGTERM)
    assert launcher.wait() == 1  # torchrun's own: some of its workers left with 143
    reports = torchrun_clean(job, 4)
    assert {rank: report["exit_code"] for rank, report in reports.items()} == {0: 143, 1: 143, 2: 0, 3: 143}
    assert 'train.py", line' not in launcher.stderr, "no worker's traceback; torchrun has its own"
    # "within one step + 1 s": a step takes 10 ms here
    assert max(report["phases"][-1]["start"] for report in reports.values()) < 3
    assert not any(map(alive, pids.values()))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_torchrun_agent(job, context):
    """SIGTERM to the torchrun agent, which signals all workers with their DataLoader workers (`killpg`)."""
    launcher = job.torchrun("train.py", "--workers", 1, "--context", context, AUTOTEARDOWN_GRACE=25)
    worker_pids(launcher, range(2))
    launcher.signal()
    assert launcher.wait() == 1  # torchrun's own after a signal, whatever its workers return
    reports = torchrun_clean(job, 2)
    assert {report["exit_code"] for report in reports.values()} == {0}
    assert "DataLoader worker" not in launcher.stderr, launcher.stderr
    wait_until(lambda: not job.survivors(), "the DataLoader workers' end", 10)


def test_two_nodes(job):
    """Two torchrun agents, one is signalled: the other node's ranks are out soon, and its agent ends, too."""
    nodes = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=test",
    )
    agents = [
        job.torchrun("train.py", ranks=1, nodes=(*nodes, "--local-addr=127.0.0.1"), AUTOTEARDOWN_GRACE=25)
        for _ in range(2)
    ]
    wait_until(lambda: all(re.search(r"step 3$", agent.stdout, re.MULTILINE) for agent in agents), "training")
    victim = next(agent for agent in agents if "rank 1 " in agent.stdout)
    other = next(agent for agent in agents if "rank 0 " in agent.stdout)
    victim.signal()
    assert victim.wait() == 1
    assert other.wait() == 1
    assert "autoteardown: torchrun: its workers were evicted (exited with 143); exit 1" in other.stderr
    reports = torchrun_clean(job, 2)
    assert {rank: report["cause"] for rank, report in reports.items()} == {0: "peer", 1: "signal"}
    assert max(report["phases"][-1]["start"] for report in reports.values()) < 3


@pytest.mark.parametrize("where", ["constructor", "forward"])
def test_another_thread_that_has_yet_to_step(job, where):
    """It is parked as one that has stepped is: what it launches later would find the group released on some ranks."""
    ranks = job.world("first_iteration.py", 2, where)
    for rank in ranks:
        rank.wait_for("^computing$")
    ranks[0].signal()
    assert [rank.outlast() for rank in ranks] == [0, 143]
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert "went on" not in rank.stdout, rank.transcript()


def test_a_collective_that_an_unknown_thread_launches_after_the_drain(job):
    """The agent cannot know that this thread will train. It does not call such a stop clean."""
    ranks = job.world("first_iteration.py", 2, "elsewhere")
    for rank in ranks:
        rank.wait_for("^computing$")
    ranks[0].signal()
    assert [rank.outlast() for rank in ranks] == [0, 143]
    report = ranks[0].report()
    assert report["outcome"] == "partial", ranks[0].transcript()
    assert "a thread has launched a collective after the drain" in report["why"]
