"""Real Ray: actors of every kind, tasks, Ray Train and drivers as ranks.

One cluster serves the whole module. Its workers have the agent in them, as in an image with `AUTOTEARDOWN=1`; a test
without it uses what users have for that, `runtime_env`. This process is the driver.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from harness import AGENT, NONE, PROGRAMS, alive, environment, free_port, marked, stat, wait_until
from schema import validate_report

ray = pytest.importorskip("ray")
sys.path.insert(0, str(PROGRAMS))
import ray_ranks  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(700)]

# About 2 s on an idle machine. What is compared with it: the hard deadline of the default grace period, 24 s, and the
# watchdog's 600 s.
SOON = 15.0
OFF = {"AUTOTEARDOWN": "0"}
GROUPS = {"io": 1, "compute": 2}

KINDS = {
    "sync": (ray_ranks.Rank, {}, "MainThread"),
    "asyncio": (ray_ranks.AsyncRank, {}, "AsyncIO Thread: default"),
    "uvloop": (ray_ranks.AsyncRank, {}, "AsyncIO Thread: default"),
    "threaded": (ray_ranks.Rank, {"max_concurrency": 4}, "Dummy-"),
    "groups": (ray_ranks.GroupsRank, {"concurrency_groups": GROUPS}, "Dummy-"),
    "asyncio groups": (ray_ranks.AsyncGroupsRank, {"concurrency_groups": GROUPS}, "AsyncIO Thread: io"),
}


class Cluster:
    """One node, and what its workers leave behind."""

    def __init__(self):
        # Ray's sockets are in there, and their paths may not be longer than 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self.address = f"127.0.0.1:{free_port()}"
        self.reports = self.folder / "reports"
        env = environment(
            AGENT,
            self.mark,
            AUTOTEARDOWN_REPORT_DIR=self.reports,
            AUTOTEARDOWN_RUNTIME_DIR=self.folder / "runtime",
            PYTHONPATH=PROGRAMS,
            RAY_enable_metrics_collection="0",
        )
        options = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}/ray"]
        options += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
        options += ["--num-cpus=2"]  # also the number of workers that Ray starts ahead of time
        command = [str(Path(sys.executable).with_name("ray")), "start", *options]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, timeout=200)

    def report(self, pid):
        """The report of a worker; None if there is none."""
        found = list(self.reports.glob(f"*-{pid}-*Z.json"))
        return json.loads(found[0].read_text()) if found else None

    def log(self, pid):
        """What a worker has written on stderr."""
        (path,) = self.folder.glob(f"ray/session_latest/logs/worker-*-{pid}.err")
        return path.read_text()

    def close(self):
        """End every process of the cluster."""
        while pids := marked(self.mark):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    try:
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
    finally:
        cluster.close()


@pytest.fixture
def world(cluster, tmp_path):
    """Make a world of two actors. `env` is for both of them, `other` for the second one only."""
    made = []

    def make(kind, env=(), other=(), folder=tmp_path, **options):
        what, how, thread = KINDS[kind]
        actors = []
        for own in ((), other):
            env_vars = {"RAY_USE_UVLOOP": str(int(kind == "uvloop")), **dict(env), **dict(own)}
            actor = ray.remote(num_cpus=0, **how)(what)
            actors.append(actor.options(runtime_env={"env_vars": env_vars}, **options).remote())
        port = free_port()
        joined = ray.get([each.init.remote(str(folder), rank, port) for rank, each in enumerate(actors)])
        made.extend(zip(actors, (pid for pid, _ in joined)))
        for _, name in joined:
            assert name.startswith(thread)  # else this is not the case that it is meant to be
        return actors, [pid for pid, _ in joined]

    yield make
    for actor, _ in made:
        ray.kill(actor)
    gone(*(pid for _, pid in made))  # or a drain in the next test finds them


def wait_in(folder, what, rank, driver=None):
    """Wait until that rank is there, and asleep in C if it is to be blocked; return its pid."""
    path = Path(folder, f"{what}-{rank}")

    def look():
        assert driver is None or driver.running, driver.transcript()
        return path.exists()

    try:
        wait_until(look, f"rank {rank} to be {what}", 400)
    except AssertionError as error:
        raise AssertionError(f"{error}: {driver.transcript() if driver else ''}") from None
    pid, thread = map(int, path.read_text().split())
    seen, times = None, 0
    while what == "blocked" and times < 8:
        now = stat(pid, thread)
        times = times + 1 if now[0] == "S" and now == seen else 0
        seen = now
        time.sleep(0.02)
    return pid


def failure(reference, within=SOON):
    """The error that a reference ends in."""
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(reference, timeout=within)
    return caught.value


def slowness():
    """How many times longer than an idle machine this one takes just now."""
    wall, cpu = time.monotonic(), time.process_time()
    while time.process_time() < cpu + 0.1:
        pass
    return (time.monotonic() - wall) / 0.1


def gone(*pids):
    wait_until(lambda: not any(map(alive, pids)), f"the end of {pids}")


def outcomes(cluster, pids):
    """What the reports of a world say, by rank."""
    gone(*pids)
    reports = [cluster.report(pid) for pid in pids]
    assert all(reports), [cluster.log(pid) for pid in pids]
    for report in reports:
        validate_report(report)
        limits = [phase for phase in report["phases"] if phase["outcome"] in ("timeout", "error")]
        # Of a park: it waits in gloo. Of the others' quiet: one that waits so cannot say so before.
        assert {phase["name"] for phase in limits} <= {"quiet", "step", "park"}, json.dumps(report, indent=1)
        assert report["phases"][-1]["end"] < SOON / 2, json.dumps(report, indent=1)
    return [(report["cause"], report["outcome"], report["exit_code"]) for report in reports]


class Released:
    """The outcome of a rank that waited in a collective.

    On gloo it can only be dropped with its process (`aborted`), unless the one that it waits for leaves a moment
    earlier: then the collective raises, and it parks after all. Nobody calls either of them clean.
    """

    def __eq__(self, outcome):
        return outcome in ("aborted", "partial")

    def __repr__(self):
        return "'aborted' or 'partial'"


def ends(*states):
    """What they are to say where rank 0 is evicted, by the states that the ranks are in."""
    outcome = [Released() if state == "blocked" else "partial" for state in states]
    return [("signal", outcome[0], 0), ("peer", outcome[1], 143)]


CASES = [(kind, state) for kind in KINDS for state in ("idle", "busy", "blocked")]
CASES += [("asyncio", "awaits"), ("uvloop", "awaits"), ("asyncio groups", "awaits")]
FEW = {("sync", "idle"), ("sync", "busy"), ("sync", "blocked"), ("asyncio", "idle"), ("asyncio", "blocked")}
FEW |= {("uvloop", "awaits"), ("threaded", "busy"), ("groups", "blocked"), ("asyncio groups", "busy")}
CASES = [pytest.param(*each, marks=() if each in FEW else pytest.mark.slow) for each in CASES]


@pytest.mark.parametrize("kind, state", CASES)
def test_an_evicted_actor(cluster, world, tmp_path, kind, state):
    """Its group is released, the other one is freed, and the driver hears of both instead of waiting."""
    actors, pids = world(kind)
    # The evicted one waits for the other in a collective, or is waited for.
    running = [] if state == "idle" else [getattr(actors[0], state).remote()]
    if state != "blocked":
        running.append(actors[1].blocked.remote())
    for rank, what in enumerate([state, "blocked" if state != "blocked" else "idle"]):
        if what != "idle":
            assert wait_in(tmp_path, what, rank) == pids[rank]
    os.kill(pids[0], signal.SIGTERM)
    for reference in running:
        assert isinstance(failure(reference), ray.exceptions.RayActorError)
    for actor in actors:
        assert isinstance(failure(actor.pid.remote()), ray.exceptions.RayActorError)
    other = "idle" if state == "blocked" else "blocked"
    assert outcomes(cluster, pids) == ends(state, other)


@pytest.mark.parametrize(
    "kind",
    [
        "sync",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("asyncio", "threaded", "groups", "asyncio groups")
        ),
    ],
)
def test_control_a_blocked_actor_without_the_agent(cluster, world, tmp_path, kind):
    """The control of the test above, and the opt-out of single actors by `runtime_env`."""
    actors, pids = world(kind, OFF)
    reference = actors[0].blocked.remote()
    wait_in(tmp_path, "blocked", 0)
    os.kill(pids[0], signal.SIGTERM)
    assert isinstance(failure(reference, within=6), ray.exceptions.GetTimeoutError)
    assert alive(pids[0])
    assert "autoteardown" not in cluster.log(pids[0])


def test_the_driver_hears_of_it_within_two_seconds(cluster, tmp_path, world):
    """The rank whose actor is evicted waits in a collective. A machine that is busy gets more tries, and more time."""
    took = []
    while len(took) < 5 and min(took, default=3.0) >= 2.0:
        folder = tmp_path / str(len(took))
        folder.mkdir()
        actors, pids = world("sync", folder=folder)
        running = [actors[0].blocked.remote(), actors[1].busy.remote()]
        for rank, what in enumerate(["blocked", "busy"]):
            wait_in(folder, what, rank)
        sent = time.monotonic()
        os.kill(pids[0], signal.SIGTERM)
        for reference in running:
            assert isinstance(failure(reference), ray.exceptions.RayActorError)
        took.append((time.monotonic() - sent) / slowness())
    assert min(took) < 2.0, took


def test_concurrency_groups_at_once(cluster, world, tmp_path):
    """One group's thread is in a collective, the default one's in `time.sleep`, and a third one answers."""
    actors, pids = world("groups")
    running = [actors[0].blocked.remote(), actors[0].sleeps.remote(str(tmp_path))]
    assert wait_in(tmp_path, "blocked", 0) == wait_in(tmp_path, "sleeps", "none") == pids[0]
    assert ray.get(actors[0].pid.remote(), timeout=120) == pids[0]
    os.kill(pids[0], signal.SIGTERM)
    for reference in running:
        assert isinstance(failure(reference), ray.exceptions.RayActorError)
    assert outcomes(cluster, pids) == ends("blocked", "idle")


def test_one_actor_opts_out(cluster, world, tmp_path):
    """It is no rank of ours: nobody tells it, and it lives on; the other one is torn down as ever."""
    actors, pids = world("sync", other=OFF)
    running = actors[0].busy.remote()
    wait_in(tmp_path, "busy", 0)
    os.kill(pids[0], signal.SIGTERM)
    assert isinstance(failure(running), ray.exceptions.RayActorError)
    gone(pids[0])
    report = cluster.report(pids[0])
    assert (report["outcome"], report["exit_code"]) == ("partial", 0)
    assert ray.get(actors[1].pid.remote(), timeout=120) == pids[1]
    assert cluster.report(pids[1]) is None
    assert "autoteardown" not in cluster.log(pids[1])


def test_drain_as_a_pre_stop_hook(cluster, world, tmp_path):
    """Where a shell is PID 1, `ray start` gets no signal, either. Both actors are in mid-collective."""
    actors, pids = world("asyncio")
    running = [actors[0].blocked.remote(), actors[1].busy.remote()]
    for rank, what in enumerate(["blocked", "busy"]):
        wait_in(tmp_path, what, rank)
    command = [sys.executable, "-m", "autoteardown", "drain", "--json"]
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(cluster.folder / "runtime")}
    hook = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert (hook.returncode, hook.stderr) == (1, ""), (
        hook
    )  # in time, but not clean: on gloo one was in a collective
    told = {rank["pid"]: (rank["outcome"], rank["signal"]) for rank in json.loads(hook.stdout)["ranks"]}
    assert told == dict(zip(pids, [(Released(), signal.SIGTERM), ("partial", signal.SIGTERM)]))
    for reference in running:
        assert isinstance(failure(reference), ray.exceptions.RayActorError)
    # Whichever came first to each of them: its own signal, or word of the other's.
    said = [(outcome, code) for _, outcome, code in outcomes(cluster, pids)]
    assert said == [(Released(), 0), ("partial", 0)]


@pytest.mark.parametrize(
    "evicted, other", [("blocked", "busy"), pytest.param("busy", "blocked", marks=pytest.mark.slow)]
)
def test_tasks(cluster, tmp_path, evicted, other):
    port = free_port()
    running = [
        ray_ranks.task.remote(str(tmp_path), rank, port, what) for rank, what in enumerate([evicted, other])
    ]
    pids = [wait_in(tmp_path, what, rank) for rank, what in enumerate([evicted, other])]
    os.kill(pids[0], signal.SIGTERM)
    for reference in running:
        assert isinstance(failure(reference), ray.exceptions.WorkerCrashedError)
    assert outcomes(cluster, pids) == ends(evicted, other)


def test_control_tasks(cluster, tmp_path):
    port = free_port()
    task = ray_ranks.task.options(runtime_env={"env_vars": OFF})
    states = ["blocked", "busy"]
    running = [task.remote(str(tmp_path), rank, port, what) for rank, what in enumerate(states)]
    pids = [wait_in(tmp_path, what, rank) for rank, what in enumerate(states)]
    os.kill(pids[0], signal.SIGTERM)
    ready, _ = ray.wait(running, timeout=6)
    assert not ready
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


RESTARTS = [("sync", "busy", "signal"), ("sync", "idle", "0"), ("asyncio", "busy", "0")]
RESTARTS += [
    pytest.param(kind, state, "0", marks=pytest.mark.slow)
    for kind in ("sync", "asyncio", "threaded")
    for state in ("idle", "busy", "blocked")
    if (kind, state, "0") not in RESTARTS
]


@pytest.mark.parametrize("kind, state, code", RESTARTS)
def test_restarts(cluster, world, tmp_path, kind, state, code):
    """`max_restarts` counts, whatever the code and the state: to Ray an eviction is an intended exit in none."""
    actors, pids = world(kind, {"AUTOTEARDOWN_EXIT_CODE": code}, max_restarts=1)
    running = None if state == "idle" else getattr(actors[0], state).remote()
    if running is not None:
        wait_in(tmp_path, state, 0)
    os.kill(pids[0], signal.SIGTERM)
    if running is not None:
        assert isinstance(failure(running), ray.exceptions.RayActorError)
    gone(*pids)

    def answer(actor):
        try:
            return ray.get(actor.pid.remote(), timeout=100)
        except ray.exceptions.ActorUnavailableError:  # it is being restarted
            return None
        except ray.exceptions.ActorDiedError as error:
            return error

    again = [wait_until(lambda actor=actor: answer(actor), "an answer", 100) for actor in actors]
    assert all(isinstance(each, int) for each in again), again
    if code == "signal":
        # The new ones are guarded like the first.
        port = free_port()
        ray.get([actor.init.remote(str(tmp_path), rank, port) for rank, actor in enumerate(actors)])
        running = actors[1].blocked.remote()
        wait_in(tmp_path, "blocked", 1)
        os.kill(again[1], signal.SIGTERM)
        assert isinstance(failure(running), ray.exceptions.RayActorError)
        gone(*again)
        assert [cluster.report(pid)["cause"] for pid in again] == ["peer", "signal"]


def left_unbroken(cluster, pids):
    """A SystemExit in Ray's own part of a call fails a check of its C++ layer: SIGABRT, whatever the report says."""
    gone(*pids)
    assert [cluster.report(pid)["exit_code"] for pid in pids] == [0, 143]
    for pid in pids:
        log = cluster.log(pid)
        assert "Check failed" not in log and "SIGABRT" not in log, log


@pytest.mark.parametrize("again", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_calls_that_come_at_the_eviction(cluster, world, again):
    actors, pids = world("sync")
    calls = [actors[0].pid.remote() for _ in range(300)]
    os.kill(pids[0], signal.SIGTERM)
    calls += [actors[0].pid.remote() for _ in range(300)]
    left_unbroken(cluster, pids)
    assert isinstance(failure(calls[-1]), ray.exceptions.RayActorError)


@pytest.mark.parametrize("kind", ["sync", "groups", "asyncio"])
def test_a_call_that_has_not_come_to_its_method(cluster, world, tmp_path, kind):
    """Right above Ray's loop is the standard library's part of one of Ray's context managers."""
    actors, pids = world(kind)
    ray.get(actors[0].linger.remote())
    call = actors[0].pid.remote()
    wait_in(tmp_path, "lingers", 0)
    os.kill(pids[0], signal.SIGTERM)
    left_unbroken(cluster, pids)
    assert isinstance(failure(call), ray.exceptions.RayActorError)


@pytest.mark.parametrize(
    "kind, sleeps",
    [
        ("sync", True),
        ("asyncio", False),
        pytest.param("sync", False, marks=pytest.mark.slow),
        pytest.param("asyncio", True, marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_never_inits_is_as_without_the_agent(cluster, tmp_path, kind, sleeps):
    """Same error to the driver, same log."""
    seen = []
    for env in ({}, OFF):
        folder = tmp_path / str(len(seen))
        folder.mkdir()
        actor = (
            ray.remote(num_cpus=0)(KINDS[kind][0])
            .options(runtime_env={"env_vars": {"X": "1", **env}})
            .remote()
        )
        pid = ray.get(actor.pid.remote())
        running = []
        if sleeps:
            running = [actor.sleeps.remote(str(folder))]
            wait_in(folder, "sleeps", "none")
        os.kill(pid, signal.SIGTERM)
        if kind == "asyncio" and sleeps:  # Ray waits for the method, without limit
            assert isinstance(failure(*running, within=4), ray.exceptions.GetTimeoutError)
            error = "waits"
            os.kill(pid, signal.SIGKILL)
        else:
            gone(pid)  # Ray itself crashes now and then on a call that reaches a worker on its way out
            error = str(failure(*running or [actor.pid.remote()]))
        # Numbers, among them identities, differ from one process to the next.
        seen.append(re.sub(r"[0-9a-f]{32,}|\d+", "#", f"{error}\n{cluster.log(pid)}"))
    assert seen[0] == seen[1]
    assert "autoteardown" not in seen[0]


@pytest.mark.parametrize("order", ["first", pytest.param("last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [AGENT, NONE])
def test_a_driver_that_is_a_rank(cluster, job, order, mode):
    """Ray's C++ layer has a driver aborted 3 s after its SIGTERM (ray-project/ray#64830); a wedge takes longer."""
    port = free_port()
    where = {"WORLD_SIZE": 2, "MASTER_PORT": port, "fresh": True}
    driver = job.start(
        "ray_driver.py", cluster.address, order, mode=mode, RANK=0, AUTOTEARDOWN_GRACE=25, **where
    )
    job.start("bystander.py", mode=NONE, RANK=1, **where)
    driver.wait_blocked("^ready$")
    code = driver.evict(25)
    if mode == NONE:
        assert code == -signal.SIGABRT, driver.transcript()
        return
    assert code == 0, driver.transcript()
    report = driver.report()
    assert (report["outcome"], report["exit_code"]) == ("aborted", 0)
    assert report["phases"][-1]["end"] > 4, "too short to tell"


@pytest.mark.parametrize("what, max_failures", [("stuck", 0), ("steps", 1)])
def test_ray_train(cluster, job, tmp_path, what, max_failures):
    """TorchTrainer: all ranks stop after the same step, and Ray Train reports it, or starts again and trains on."""
    driver = job.start("ray_trainer.py", cluster.address, tmp_path, what, max_failures, mode=NONE, fresh=True)
    at = "stepping" if what == "steps" else "training"
    pids = [wait_in(tmp_path, at, rank, driver) for rank in range(2)]
    if what == "stuck":
        path = tmp_path / "training-0"
        path.rename(tmp_path / "blocked-0")
        wait_in(tmp_path, "blocked", 0)
        (tmp_path / "blocked-0").rename(path)
    os.kill(pids[0], signal.SIGTERM)
    expected = (
        [("signal", "clean", 0), ("peer", "clean", 143)] if what == "steps" else ends("blocked", "busy")
    )
    assert outcomes(cluster, pids) == expected
    steps = [cluster.report(pid)["steps"] for pid in pids]
    if what == "steps":
        assert steps[0]["stopped_at"] == steps[1]["stopped_at"] >= 5
    else:
        assert steps == [None, None]
    driver.wait(200)
    if max_failures:
        assert "fit returned" in driver.stdout, driver.transcript()
        assert all((tmp_path / f"trained-{rank}").exists() for rank in range(2))
    else:
        assert "fit raised WorkerGroupError" in driver.stdout, driver.transcript()
