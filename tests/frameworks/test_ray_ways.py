"""The ways in which a Ray node, or an actor of it, ends: what happens to its ranks, and to their peers elsewhere.

The node is a pod: `ray start` in a PID namespace of its own, started as KubeRay starts it. Its peers are on the head.
Rank 0 is on the node and waits in a collective; ranks 1 and 2 wait for each other, and nothing but the agent can tell
them that rank 0 has ended. In a world with weights, an engine waits for them in a group made without init.
"""

from __future__ import annotations

import contextlib
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
from namespaces import in_pid_namespace
from schema import validate_report

ray = pytest.importorskip("ray")
sys.path.insert(0, str(PROGRAMS))
import ray_worlds  # noqa: E402
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(400)]

RAY = str(Path(sys.executable).with_name("ray"))
LOST = 3  # AUTOTEARDOWN_LOST
SOON = 40.0  # for what takes some seconds on an idle machine
# The pod's, and the ranks'. Ray is told 30 s less 10, the drain begins after that, and all is over by then.
GRACE = 18
# What nobody frees in this time is stuck for as long as the test could wait.
STUCK = LOST + 5.0
COMMON = ["--disable-usage-stats", "--object-store-memory=80000000"]
FORMS = {
    # bash executes its last command: `ray start` is process 1.
    "bash -c": "ulimit -n 65536; {ray}",
    # What ray-project/kuberay#5042 proposes.
    "kuberay#5042": "{ray} & pid=$!; trap 'kill -TERM $pid 2>/dev/null; wait $pid; exit 0' TERM; wait $pid",
    # A shell that waits: as process 1 it drops SIGTERM, and forwards nothing.
    "shell": "{ray}; true",
}


class Head:
    """The node of the peers, for the whole module."""

    def __init__(self):
        # Ray's sockets are in there, and their paths may not be longer than 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self.address = f"127.0.0.1:{free_port()}"
        env = environment(
            AGENT,
            self.mark,
            AUTOTEARDOWN_RUNTIME_DIR=self.folder / "runtime",
            PYTHONPATH=PROGRAMS,
            RAY_enable_metrics_collection="0",
        )
        options = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}/ray"]
        options += ["--include-dashboard=false", "--num-cpus=1", '--resources={"home": 100}', *COMMON]
        subprocess.run([RAY, "start", *options], env=env, check=True, stdout=subprocess.DEVNULL, timeout=200)

    def close(self):
        """End every process of it."""
        while pids := marked(self.mark):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head():
    head = Head()
    try:
        ray.init(head.address, log_to_driver=False)
        yield head
        ray.shutdown()
    finally:
        head.close()


class Pod:
    """A node of its own: `ray start --block` in a PID namespace, with the command line of a container."""

    def __init__(self, job, head, form, mode, **env):
        self.job = job
        words = f"{RAY} start --address={head.address} --block --num-cpus=1 " + " ".join(COMMON)
        words += """ --resources='{"away": 100}'"""
        launcher = [*in_pid_namespace(), "bash", "-c", FORMS[form].format(ray=words)]
        env = {"AUTOTEARDOWN_GRACE": GRACE, "RAY_enable_metrics_collection": "0", **env}
        for _ in range(3):
            # The rest of the command line becomes bash's $0 and so on, which nobody looks at.
            self.process = job.start("bystander.py", fresh=True, mode=mode, launcher=launcher, **env)
            try:
                self.process.wait_for("block forever", 120)
                break
            except AssertionError:  # Ray gives its own processes 30 s, which a busy machine may need
                if "timed out during startup" not in self.process.stderr:
                    raise
        self.node = wait_until(self._node, "the node", 60)

    def _node(self):
        return next(
            (each["NodeID"] for each in ray.nodes() if each["Alive"] and "away" in each["Resources"]), None
        )

    def pid(self, inside):
        """The pid of one of its processes as this test sees it, by the one that it has inside."""
        for pid in marked(self.job.mark):
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                seen = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
                if len(seen) > 1 and int(seen[-1]) == inside:
                    return pid
        raise AssertionError(f"no process {inside} in the pod")

    def signal(self, signum=signal.SIGTERM):
        """What a kubelet does: to process 1."""
        os.kill(self.pid(1), signum)

    def execute(self, *command):
        """As a preStop hook does, or `kubectl exec`."""
        entries = Path(f"/proc/{self.pid(1)}/environ").read_text().split("\0")
        env = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        words = ["nsenter", f"--target={self.pid(1)}", "--pid", "--mount", *command]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)


class World:
    """Three trainers, the first of them in the pod, and with weights an engine; all wait."""

    def __init__(self, head, job, folder, pod, mode, weights=False, group=None):
        self.job, self.pod = job, pod
        env = {
            "AUTOTEARDOWN": str(int(mode == AGENT)),
            "AUTOTEARDOWN_REPORT_DIR": str(job.reports),
            "AUTOTEARDOWN_LOST": str(LOST),
            "AUTOTEARDOWN_GRACE": str(GRACE),
        }
        how = {"num_cpus": 0, "runtime_env": {"env_vars": env}}
        trainer = ray.remote(**how)(ray_worlds.Trainer)
        where = {"resources": {"away": 1} if pod else {"home": 1}}
        if group is not None:
            where = {
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
                "resources": {"away": 1},
            }
        self.trainers = [trainer.options(**where).remote()]
        self.trainers += [trainer.options(resources={"home": 1}).remote() for _ in range(2)]
        port = free_port()
        joined = [each.join.remote(str(folder), rank, port) for rank, each in enumerate(self.trainers)]
        pids = ray.get(joined, timeout=200)
        self.pids = [pod.pid(pids[0]) if pod else pids[0], *pids[1:]]
        self.engine = self.received = None
        if weights:
            sync = free_port()
            self.engine = ray.remote(**how)(ray_worlds.Engine).options(resources={"home": 1}).remote()
            made = [self.engine.join.remote(str(folder), sync), self.trainers[0].sync.remote(sync)]
            self.engine_pid = ray.get(made, timeout=200)[0]
            self.received = self.engine.receive.remote()
            self._blocked(folder, "receives-0", self.engine_pid)
        self.running = [each.wait.remote() for each in self.trainers]
        for rank, pid in enumerate(self.pids):
            self._blocked(folder, f"waits-{rank}", pid)

    def _blocked(self, folder, what, pid):
        wait_until(lambda: (folder / what).exists(), what, 100)
        seen, times = None, 0
        while times < 10:
            now = stat(pid, pid)
            times = times + 1 if now[0] == "S" and now == seen else 0
            seen = now
            time.sleep(0.02)

    def report(self, rank, size=3):
        """The report of a trainer, or with 2 of the engine."""
        for path in self.job.reports.glob("*Z.json"):
            report = json.loads(path.read_text())
            if (report["rank"], report["world_size"]) == (rank, size):
                validate_report(report)
                return report
        return None

    def preempted(self, rank):
        """What Ray says of a trainer that has died."""
        with pytest.raises(ray.exceptions.RayActorError) as caught:
            ray.get(self.running[rank], timeout=SOON)
        return caught.value.preempted

    def gone(self, *ranks):
        wait_until(lambda: not any(alive(self.pids[rank]) for rank in ranks), f"the end of {ranks}", SOON)

    def end(self):
        for each in (*self.trainers, self.engine):
            if each is not None:
                ray.kill(each)


@pytest.fixture
def away(head, job, tmp_path):
    """Start a pod, and a world whose first rank is in it."""
    worlds = []
    job.reports.mkdir(exist_ok=True)

    def start(form, mode, weights=False, grouped=False, **env):
        pod = Pod(job, head, form, mode, **env)
        group = None
        if grouped:
            group = placement_group([{"away": 1}])
            ray.get(group.ready(), timeout=60)
        world = World(head, job, tmp_path, pod, mode, weights, group)
        world.group = group
        worlds.append(world)
        return pod, world

    yield start
    for world in worlds:
        world.end()
    job.close()
    # Its pod has ended; so that the next test does not take it for its own.
    wait_until(
        lambda: not any(each["Alive"] and "away" in each["Resources"] for each in ray.nodes()),
        "Ray to miss the node",
        100,
    )


# -- the ways ---------------------------------------------------------------------------------------------------------


def sigterm(pod, world):
    pod.signal()


def pre_stop(pod, world):
    """In this order: Ray hears of it first. The shell that is process 1 keeps the node."""
    words = f"ray drain-node --address={ray.get_runtime_context().gcs_address} --node-id={pod.node}"
    words += " --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=evicted --deadline-remaining-seconds=10"
    first = pod.execute(RAY, *words.split()[1:])
    assert first.returncode == 0, first
    second = pod.execute(sys.executable, "-m", "autoteardown", "drain", "--timeout", "15")
    assert "rank=0/3" in second.stdout, second


def to_the_actor(pod, world):
    os.kill(world.pids[0], signal.SIGTERM)


def ray_stop(pod, world):
    done = pod.execute(RAY, "stop")
    assert "Stopped" in done.stdout, done
    world.stopped = done


def ray_stop_force(pod, world):
    done = pod.execute(RAY, "stop", "--force")
    assert "autoteardown" not in done.stderr, done


def node_killed(pod, world):
    pod.signal(signal.SIGKILL)


def raylet_killed(pod, world):
    (raylet,) = (pid for pid in marked(pod.job.mark) if Path(f"/proc/{pid}/comm").read_text() == "raylet\n")
    os.kill(raylet, signal.SIGKILL)


def ray_kill(pod, world):
    ray.kill(world.trainers[0])


def group_removed(pod, world):
    remove_placement_group(world.group)


TOLD = {"sigterm": "bash -c", "sigterm, kuberay#5042": "kuberay#5042", "preStop": "shell", "actor": "bash -c"}
TOLD["ray stop"] = "shell"
KILLED = {"node killed": "bash -c", "raylet killed": "shell", "ray stop --force": "shell"}
KILLED |= {"ray.kill": "bash -c", "placement group removed": "bash -c"}
ACT = {
    "sigterm": sigterm,
    "sigterm, kuberay#5042": sigterm,
    "preStop": pre_stop,
    "actor": to_the_actor,
    "ray stop": ray_stop,
    "node killed": node_killed,
    "raylet killed": raylet_killed,
    "ray stop --force": ray_stop_force,
    "ray.kill": ray_kill,
    "placement group removed": group_removed,
}
FEW = ("sigterm", "ray stop", "node killed")  # what each run of the Ray tests does


def cases(ways):
    return [pytest.param(way, marks=() if way in FEW else pytest.mark.slow) for way in ways]


def frees(world, *causes):
    """The peers on the other node: what they say of it."""
    world.gone(1, 2)
    for rank in (1, 2):
        report = world.report(rank)
        assert report is not None, rank
        assert report["cause"] in causes, json.dumps(report, indent=1)
        assert report["exit_code"] == 143
        assert report["origin"]["rank"] == 0


@pytest.mark.parametrize("weights", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", cases(TOLD))
def test_its_ranks_are_torn_down(away, way, weights):
    """The rank is signalled and reports; its peers stop with it; an engine is freed by gloo and lives on."""
    pod, world = away(TOLD[way], AGENT, weights)
    ACT[way](pod, world)
    world.gone(0)
    report = world.report(0)
    assert report is not None
    assert (report["cause"], report["signal"], report["exit_code"]) == ("signal", "SIGTERM", 0)
    assert report["outcome"] in ("aborted", "partial")
    frees(world, "peer")
    if way == "sigterm, kuberay#5042":
        assert pod.process.wait(SOON) == 0
    if way == "sigterm":
        assert pod.process.wait(SOON) == 1
        assert world.preempted(0) is False  # docs/ray.md; the control below has True
    if way == "ray stop":
        assert re.search(r"rank=0/3 .*: (aborted|partial) \(.+\), exit 0", world.stopped.stderr), (
            world.stopped
        )
    if weights:
        assert ray.get(world.received, timeout=SOON) == "RuntimeError"
        assert ray.get(world.engine.pid.remote(), timeout=SOON) == world.engine_pid
        assert world.report(1, 2) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, weights", [("sigterm", True), *((way, False) for way in TOLD if way != "preStop")]
)
def test_control_without_the_agent(away, way, weights):
    """The rank dies of SIGKILL and says nothing, or stays; its peers wait."""
    pod, world = away(TOLD[way], NONE, weights, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=2)
    ACT[way](pod, world)
    if way == "actor":
        time.sleep(STUCK)
        assert alive(world.pids[0])
    else:
        world.gone(0)
        time.sleep(STUCK)
    assert all(map(alive, world.pids[1:]))
    assert not list(world.job.reports.iterdir())
    if way == "sigterm":
        assert world.preempted(0) is True
    if weights:
        assert ray.get(world.received, timeout=SOON) == "RuntimeError"


@pytest.mark.parametrize("weights", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", cases(KILLED))
def test_its_peers_are_freed_when_it_is_killed(away, way, weights):
    """Nothing tears the rank down; its peers do not wait for ever."""
    pod, world = away(KILLED[way], AGENT, weights, grouped=way == "placement group removed")
    ACT[way](pod, world)
    world.gone(0)
    # Where a placement group is removed, Ray sends SIGTERM a moment before: enough to tell the peers, and no more.
    frees(world, *(("peer", "lost") if way == "placement group removed" else ("lost",)))
    if weights:
        assert ray.get(world.received, timeout=SOON) == "RuntimeError"
        assert ray.get(world.engine.pid.remote(), timeout=SOON) == world.engine_pid


@pytest.mark.slow
@pytest.mark.parametrize("way", ["node killed", "ray.kill", "placement group removed"])
def test_control_they_wait_without_the_agent(away, way):
    pod, world = away(KILLED[way], NONE, grouped=way == "placement group removed")
    ACT[way](pod, world)
    world.gone(0)
    time.sleep(STUCK)
    assert all(map(alive, world.pids[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [AGENT, NONE])
def test_a_shell_that_forwards_nothing(away, mode):
    """SIGTERM is lost, and the pod's end is a SIGKILL: then the agent frees the peers."""
    pod, world = away("shell", mode)
    pod.signal()
    time.sleep(STUCK)
    assert all(map(alive, world.pids))
    pod.signal(signal.SIGKILL)
    world.gone(0)
    if mode == AGENT:
        frees(world, "lost")
    else:
        time.sleep(STUCK)
        assert all(map(alive, world.pids[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [AGENT, NONE])
def test_drain_node_signals_nobody(away, mode):
    """As the autoscaler's scale-down does it. Ranks run on, past the deadline, agent or not."""
    pod, world = away("bash -c", mode)
    words = f"--node-id={pod.node} --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=evicted"
    address = f"--address={ray.get_runtime_context().gcs_address}"
    done = pod.execute(RAY, "drain-node", address, *words.split(), "--deadline-remaining-seconds=3")
    assert done.returncode == 0, done
    time.sleep(3 + STUCK)
    assert all(map(alive, world.pids))
    assert not list(world.job.reports.iterdir())


DRIVER = """
    import sys, time
    from pathlib import Path
    import ray
    import ray_worlds
    from harness import free_port

    address, folder, how = sys.argv[1:]
    ray.init(address, log_to_driver=False)
    trainers = [ray.remote(num_cpus=0, resources={"home": 1})(ray_worlds.Trainer).remote() for _ in range(3)]
    port = free_port()
    print("pids", *ray.get([each.join.remote(folder, rank, port) for rank, each in enumerate(trainers)]))
    running = [each.wait.remote() for each in trainers]
    print("ready", flush=True)
    while not Path(folder, "go").exists():
        time.sleep(0.1)
    if how == "shutdown":
        ray.shutdown()
        print("shut down", flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "ends", "shutdown"])
def test_the_driver_is_gone(head, job, tmp_path, how):
    """Ray ends its actors, all of them, within seconds and by SIGKILL: there is nobody to be freed."""
    job.reports.mkdir()
    path = f"{PROGRAMS}:{PROGRAMS.parent}"
    driver = job.start(
        DRIVER, head.address, tmp_path, how, fresh=True, mode=NONE, launcher=["env", f"PYTHONPATH={path}"]
    )
    pids = [int(pid) for pid in driver.wait_for(r"^pids (\d+) (\d+) (\d+)$", 100).groups()]
    driver.wait_for("^ready$")
    for rank in range(3):
        wait_until(lambda rank=rank: (tmp_path / f"waits-{rank}").exists(), "a trainer")
    if how == "killed":
        driver.signal(signal.SIGKILL)
    else:
        (tmp_path / "go").touch()
    wait_until(lambda: not any(map(alive, pids)), "the actors' end", SOON)


# -- one actor, or one world ------------------------------------------------------------------------------------------


def test_an_engine_is_evicted_and_the_trainers_go_on(head, job, tmp_path):
    """It has no default group: it is guarded for the group that syncs weights, alone."""
    job.reports.mkdir(exist_ok=True)
    world = World(head, job, tmp_path, None, AGENT, weights=True)
    os.kill(world.engine_pid, signal.SIGTERM)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(world.received, timeout=SOON)
    report = wait_until(lambda: world.report(1, 2), "its report")
    assert (report["cause"], report["outcome"], report["exit_code"]) == ("signal", "aborted", 0)
    time.sleep(LOST + 1)
    assert all(map(alive, world.pids)), "they are not told"
    world.end()
    wait_until(lambda: not any(map(alive, world.pids)), "their end")


def test_two_worlds_on_one_node(head, job, tmp_path):
    """One is evicted; the other one trains on."""
    env = {"AUTOTEARDOWN_REPORT_DIR": str(job.reports)}
    job.reports.mkdir(exist_ok=True)
    actor = ray.remote(num_cpus=0, resources={"home": 1}, runtime_env={"env_vars": env})(ray_worlds.Stepper)
    worlds = [[actor.remote() for _ in range(2)] for _ in range(2)]
    pids = []
    for number, world in enumerate(worlds):
        port = free_port()
        (tmp_path / str(number)).mkdir()
        joined = [each.join.remote(f"{tmp_path}/{number}", rank, port) for rank, each in enumerate(world)]
        pids.append(ray.get(joined, timeout=200))
    stop = tmp_path / "stop"
    running = [[each.train.remote(str(stop)) for each in world] for world in worlds]
    for path in (tmp_path / str(number) / f"steps-{rank}" for number in range(2) for rank in range(2)):
        wait_until(path.exists, path.name)
    os.kill(pids[0][1], signal.SIGTERM)
    for reference in running[0]:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(reference, timeout=SOON)
    wait_until(lambda: not any(map(alive, pids[0])), "the end of the first world")
    reports = {report["pid"]: report for report in job_reports(job)}
    said = [(reports[pid]["cause"], reports[pid]["outcome"]) for pid in pids[0]]
    assert said == [("peer", "clean"), ("signal", "clean")], json.dumps(reports, indent=1)
    assert len({reports[pid]["steps"]["stopped_at"] for pid in pids[0]}) == 1
    ready, _ = ray.wait(running[1], timeout=2)
    assert not ready
    stop.touch()
    first, second = ray.get(running[1], timeout=SOON)
    assert first == second > 100
    assert set(reports) == set(pids[0])
    for each in worlds[1]:
        ray.kill(each)


def job_reports(job):
    return [json.loads(path.read_text()) for path in job.reports.glob("*Z.json")]


def test_an_actor_that_inits_and_destroys_fifty_times(head):
    """Nothing is left behind: descriptors and threads are at the end what they were after the first few."""
    actor = ray.remote(num_cpus=0, resources={"home": 1})(ray_worlds.Restless).remote()
    held = ray.get(actor.again.remote(free_port(), 50), timeout=200)
    assert [(armed, state) for armed, state, _, _ in held] == [("armed", "idle")] * 50
    early, late = held[4], held[-1]
    assert late[2] <= early[2] and late[3] <= early[3], held
    ray.kill(actor)
