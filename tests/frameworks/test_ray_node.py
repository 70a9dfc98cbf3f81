"""SIGTERM to `ray start --block`: what Ray does, at once; the node's ranks beside it, before Ray kills them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from harness import AGENT, NONE, alive, environment, free_port, wait_until

from autoteardown import settings
from autoteardown.launchers import ray_start as ray_node

# Has its handler put in as Ray does it: in Python, late, on the main thread. Its Node is where Ray has it.
NODE = """
    import os, signal, subprocess, sys, time, types
    from autoteardown.launchers import ray_start as ray_node

    runtime = os.environ["AUTOTEARDOWN_RUNTIME_DIR"]
    os.makedirs(runtime, 0o700, exist_ok=True)
    if "twice" in sys.argv:
        ray_node.install(signal)
    ray_node.install(signal)
    began = False

    def say(text):
        os.write(1, f"{text}\\n".encode())  # it may come in the middle of a print

    def left():
        return sum(not name.startswith("drain-") for name in os.listdir(runtime))

    class Node:
        def kill_all_processes(self):
            say(f"Ray kills, {left()} left")
            for rank in ranks:
                rank.kill()

    def handler(signum, frame):
        global began
        if began:
            return say("again")
        began = True
        say(f"Ray's handler {signum} {frame is not None} {left()} left")
        for rank in ranks if "killed" in sys.argv else []:  # as by raylet, which has got the signal, too
            rank.kill()
            rank.wait()
        time.sleep(float(os.environ.get("RAYS_TIME", "0")))
        sys.modules["ray._private.node"].Node().kill_all_processes()
        sys.exit(1)

    sys.modules["ray._private.node"] = types.ModuleType("ray._private.node")
    sys.modules["ray._private.node"].Node = Node
    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.signal(signal.SIGTERM, handler) is handler
    how = [each for each in sys.argv[1:] if each in ("clean", "stay", "ends")]
    code = [sys.executable, "-c", os.environ["RANK_CODE"]]
    ranks = [subprocess.Popen([*code, each], stdout=subprocess.PIPE) for each in how]
    for rank in ranks:
        assert rank.stdout.readline() == b"ready\\n"
        print("rank", rank.pid)
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""

RANK = """
    import os, signal, sys, time
    from autoteardown.node import registration

    runtime = os.environ["AUTOTEARDOWN_RUNTIME_DIR"]

    def leave(signum, frame):
        with open(runtime + ".told", "a") as told:
            print(entry.time_left(), file=told)
        if sys.argv[1] == "clean":
            entry.leave("clean", 0)
            os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    entry = registration.enter(runtime, {"rank": 0, "world_size": 1}, print)
    print("ready", flush=True)
    if sys.argv[1] == "ends":
        time.sleep(1)
        entry.leave()
        os._exit(0)
    while True:
        signal.pause()
"""


@pytest.fixture
def start(job):
    """Start a node, with ranks below it as raylet's workers are; `NODE` says how each of them takes its signal."""

    def start(program, *args, **env):
        env = {"RANK_CODE": textwrap.dedent(RANK), **env}
        process = job.start(program, *args, mode=NONE, fresh=True, **env)
        process.wait_for("^ready$")
        return process

    return start


@pytest.mark.parametrize("twice", [(), ("twice",)])
def test_ray_reacts_at_once_and_kills_when_the_ranks_are_gone(start, twice):
    node = start(NODE, "clean", *twice, AUTOTEARDOWN_GRACE=25)
    node.signal()
    assert node.wait() == 1
    assert node.stdout.endswith(f"Ray's handler {signal.SIGTERM:d} True 1 left\nRay kills, 0 left\n")
    first, second, last = node.stderr.splitlines()
    assert (
        first
        == "autoteardown: ray start: SIGTERM: Ray drains this node; its 1 rank(s) are drained in 15s at the latest"
    )
    pid = node.wait_for(r"^rank (\d+)$").group(1)
    assert second.startswith(f"autoteardown: ray start: rank=0/1 pid={pid} -: clean, exit 0 (")
    assert last == "autoteardown: ray start: 1 of 1 left cleanly; Ray's own shutdown continues"


def test_the_ranks_are_drained_in_the_time_that_ray_gives(start, job):
    """Ray is still waiting then: it is not needed for that. They hear how little time is left by then."""
    node = start(NODE, "clean", RAYS_TIME=12, AUTOTEARDOWN_GRACE=20, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=16)
    node.signal()
    assert node.wait() == 1
    assert node.stdout.endswith("1 left\nRay kills, 0 left\n")
    seconds = float(re.search(r"drained in (\d+)s", node.stderr).group(1))
    assert 0 <= seconds < 11
    left = float(job.runtime.with_name("runtime.told").read_text())
    assert 20 - seconds - 3 < left < 20 - seconds
    assert "1 of 1 left cleanly" in node.stderr


def test_ranks_that_leave_by_themselves_are_not_signalled(start):
    node = start(NODE, "ends", RAYS_TIME=3)
    node.signal()
    assert node.wait() == 1
    assert "Ray kills, 0 left" in node.stdout
    assert node.stderr.endswith("its ranks have left; Ray's own shutdown continues\n")


def test_ranks_that_raylet_kills_are_named(start):
    """Every process of the node has been signalled: raylet does not wait for its workers."""
    node = start(NODE, "stay", "killed", RAYS_TIME=3)
    node.signal()
    assert node.wait() == 1
    pid = node.wait_for(r"^rank (\d+)$").group(1)
    _, second, last = node.stderr.splitlines()
    assert second.startswith(f"autoteardown: ray start: rank=0/1 pid={pid} -: died without a teardown (")
    assert last == "autoteardown: ray start: 0 of 1 left cleanly; Ray's own shutdown continues"
    assert "Ray kills, 0 left" in node.stdout


def test_the_ranks_of_another_node_are_not_signalled(start):
    """Several nodes, or other jobs, may share a machine and the registry."""
    other, node = start(NODE, "clean"), start(NODE, "clean")
    node.signal()
    assert node.wait() == 1
    assert "Ray kills, 1 left" in node.stdout
    assert "1 of 1 left cleanly" in node.stderr
    other.signal()
    assert other.wait() == 1
    assert "1 of 1 left cleanly" in other.stderr


def test_a_node_without_ranks_is_as_without_us(start):
    node = start(NODE)
    node.signal()
    assert node.wait() == 1
    assert node.stderr == ""


def test_quiet_is_quiet(start):
    node = start(NODE, "clean", AUTOTEARDOWN_LOG="quiet")
    node.signal()
    assert node.wait() == 1
    assert "Ray kills, 0 left" in node.stdout
    assert node.stderr == ""


def test_a_rank_that_stays_does_not_keep_ray(start):
    node = start(NODE, "stay", AUTOTEARDOWN_GRACE=2)
    node.signal()
    assert node.wait() == 1
    assert "Ray kills, 1 left" in node.stdout
    assert "still running" in node.stderr


def test_a_second_signal_is_rays(start):
    node = start(NODE, "stay", AUTOTEARDOWN_GRACE=4)
    node.signal()
    node.wait_for("^Ray's handler")
    node.signal()
    assert node.wait() == 1
    assert node.stdout.count("again") == 1
    assert node.stderr.count("draining") <= 1
    assert "still running" in node.stderr


def test_a_registry_that_cannot_be_trusted_stops_nothing(start, job):
    job.runtime.mkdir()
    job.runtime.chmod(0o777)
    node = start(NODE)
    node.signal()
    assert node.wait() == 1
    assert "Ray's handler" in node.stdout
    assert "0777" in node.stderr
    assert node.stderr.count("\n") == 1


def test_a_log_that_nobody_reads_does_not_keep_ray(job):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    program = f"import os; os.dup2({write}, 2)\n{textwrap.dedent(NODE)}"
    env = environment(NONE, job.mark, AUTOTEARDOWN_RUNTIME_DIR=job.runtime, RANK_CODE=textwrap.dedent(RANK))
    command = [sys.executable, "-c", program, "clean"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, pass_fds=[write]) as node:
        while node.stdout.readline() != "ready\n":
            pass
        node.send_signal(signal.SIGTERM)
        assert "Ray's handler" in node.stdout.readline()
        assert "Ray kills, 0 left" in node.stdout.readline()
    assert node.returncode == 1
    os.close(read)
    os.close(write)


def test_our_own_bugs_stop_nothing(start):
    program = NODE.replace("def handler", "sys.modules['autoteardown.node.registry'] = None\n    def handler")
    node = start(program)
    node.signal()
    assert node.wait() == 1
    assert "Ray kills" in node.stdout
    assert "the node is not drained" in node.stderr


@pytest.mark.parametrize(
    "environ, total, notice",
    [
        ({}, 25, 15),
        ({"TERMINATION_GRACE_PERIOD_SECONDS": "20"}, 20, 10),
        ({"TERMINATION_GRACE_PERIOD_SECONDS": "62"}, 25, 15),
        ({"AUTOTEARDOWN_GRACE": "120"}, 120, 20),
        ({"AUTOTEARDOWN_GRACE": "120", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "110"}, 120, 100),
        ({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}, 25, 0),
        ({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "x", "TERMINATION_GRACE_PERIOD_SECONDS": "nan"}, 25, 15),
    ],
)
def test_the_least_of_what_everybody_gives(environ, total, notice):
    found, _ = settings.load(environ)
    assert ray_node.times(found, environ) == (total, notice)


PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    "line",
    [
        f"{PYTHON} /opt/bin/ray start --head --block",
        f"{PYTHON} -I -X dev /opt/bin/ray start",
        f"{PYTHON} /opt/bin/ray --logging-level debug start --address=x:1",
        f"{PYTHON} /opt/bin/ray --logging-level=debug start",
        f"{PYTHON} -m ray.scripts.scripts start --head",
        f"{PYTHON} -mray.scripts.scripts start --head",
        "/start/ray/ray /start/ray start",
    ],
)
def test_ray_start_is_recognised(line):
    assert ray_node.command(line.split())[:1] == ["start"]


@pytest.mark.parametrize(
    "line",
    [
        f"{PYTHON}",
        f"{PYTHON} /opt/bin/ray",
        f"{PYTHON} /opt/bin/ray stop",
        f"{PYTHON} /opt/bin/ray --logging-level start status",
        f"{PYTHON} /opt/bin/ray job submit -- python train.py start",
        f"{PYTHON} /opt/bin/xray start",
        f"{PYTHON} ray.py start",
        f"{PYTHON} -m ray.dashboard.dashboard start",
        f"{PYTHON} -c start",
        f"{PYTHON} -c pass /opt/bin/ray start",
        "",
    ],
)
def test_nothing_else_is(line):
    assert ray_node.command(line.split())[:1] != ["start"]


def test_a_test_run_is_not_ray_start():
    assert not ray_node.command()


# -- the real thing ------------------------------------------------------------------------------------------------

DRIVER = """
    import sys, time
    import ray

    @ray.remote(num_cpus=0)
    class Actor:
        def init(self, rank, port):
            import os
            import torch.distributed as dist
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
            return os.getpid()

        def work(self, rank):
            import time
            import torch
            import torch.distributed as dist
            if rank == 0:
                dist.all_reduce(torch.ones(1))  # which the other one never joins
            time.sleep(1000)

    ray.init(address=sys.argv[1], log_to_driver=False)
    actors = [Actor.remote() for _ in range(2)]
    print("pids", *ray.get([actor.init.remote(rank, int(sys.argv[2])) for rank, actor in enumerate(actors)]))
    results = [actor.work.remote(rank) for rank, actor in enumerate(actors)]
    time.sleep(1)  # nothing tells from here that a method has begun
    print("ready", flush=True)
    for result in results:
        try:
            ray.get(result)
        except ray.exceptions.RayActorError as error:
            print("actor error", flush=True)
"""


@pytest.fixture
def sockets():
    """A folder for Ray's sockets, whose paths may not be longer than 107 bytes."""
    path = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def stopped_node(job, sockets):
    """Stop `ray start --head --block`, a pod's main process, with two ranks in an all_reduce that never completes.

    Returns that process, the driver, and the pids of the ranks.
    """
    pytest.importorskip("ray")

    def stop(mode, **env):
        address = f"127.0.0.1:{free_port()}"
        options = ["--head", "--block", f"--port={address.rpartition(':')[2]}", f"--temp-dir={sockets}"]
        options += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
        ray = Path(sys.executable).with_name("ray")
        node = job.start(str(ray), "start", *options, fresh=True, mode=mode, AUTOTEARDOWN_GRACE=25, **env)
        node.wait_for("block forever")
        driver = job.start(DRIVER, address, free_port(), fresh=True, mode=mode)
        pids = [int(pid) for pid in driver.wait_for(r"^pids (\d+) (\d+)$").groups()]
        driver.wait_for("^ready$")
        assert node.evict(grace=60) == 1, node.transcript()  # Ray's own code
        assert "received SIGTERM. Draining for up to" in node.stderr  # Ray's own handling, in both cases
        return node, driver, pids

    return stop


@pytest.mark.frameworks
def test_actors_in_a_collective_are_torn_down_when_ray_start_is_stopped(job, stopped_node):
    """Each is signalled, reports, and exits before Ray would SIGKILL it."""
    node, driver, pids = stopped_node(AGENT)
    reports = job.all_reports()
    assert {rank: report["pid"] for rank, report in reports.items()} == dict(enumerate(pids))
    for report in reports.values():
        assert (report["cause"], report["signal"], report["exit_code"]) == ("signal", "SIGTERM", 0)
        assert report["phases"][-1]["end"] < 8
        said = f"pid={report['pid']} .*: {report['outcome']}( \\(.*\\))?, exit 0 "
        assert re.search(said, node.stderr), node.transcript()
    wait_until(lambda: driver.stdout.count("actor error") == 2, driver.transcript())


@pytest.mark.frameworks
def test_control_ray_start_is_stopped(job, stopped_node):
    """Without us nobody signals the actors. They die of SIGKILL, and say nothing."""
    node, _, pids = stopped_node(NONE, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=2)
    wait_until(lambda: not any(map(alive, pids)), "the actors' end")
    assert not list(job.reports.iterdir())
    assert "autoteardown" not in node.stderr
