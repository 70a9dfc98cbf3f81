"""SIGTERM to `ray start --block`: the node's ranks first, then what Ray does."""

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

from autoteardown.node import ray_start as ray_node

# Has its handler put in as Ray does it: in Python, late, on the main thread.
NODE = """
    import os, signal, sys, time
    from autoteardown.node import ray_start as ray_node

    runtime = os.environ["AUTOTEARDOWN_RUNTIME_DIR"]
    os.makedirs(runtime, 0o700, exist_ok=True)
    if "twice" in sys.argv:
        ray_node.install(signal)
    ray_node.install(signal)

    def handler(signum, frame):
        line = f"Ray's handler {signum} {frame is not None} {len(os.listdir(runtime))} left\\n"
        os.write(1, line.encode())  # it may come in the middle of the print below
        sys.exit(1)

    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.signal(signal.SIGTERM, handler) is handler
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""

RANK = """
    import os, signal, sys
    from autoteardown.node import registry

    def leave(signum, frame):
        print("got", signum, flush=True)
        if sys.argv[1] == "clean":
            entry.leave("clean", 0)
            os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    entry = registry.enter(os.environ["AUTOTEARDOWN_RUNTIME_DIR"], {"rank": 0, "world_size": 1}, print)
    print("ready", flush=True)
    while True:
        signal.pause()
"""


@pytest.fixture
def start(job):
    def start(program, *args, **env):
        process = job.start(program, *args, mode=NONE, fresh=True, **env)
        process.wait_for("^ready$")
        return process

    return start


@pytest.mark.parametrize("twice", [(), ("twice",)])
def test_the_ranks_go_first(start, twice):
    rank = start(RANK, "clean")
    node = start(NODE, *twice)
    node.signal()
    assert node.wait() == 1
    assert rank.wait() == 0
    assert node.stdout.endswith(f"Ray's handler {signal.SIGTERM:d} True 0 left\n")
    first, second, last = node.stderr.splitlines()
    assert first == "autoteardown: ray start: SIGTERM: draining 1 rank(s) of this node"
    assert second.startswith(f"autoteardown: ray start: rank=0/1 pid={rank.pid} -: clean, exit 0 (")
    assert last == "autoteardown: ray start: 1 of 1 left cleanly; Ray's own shutdown goes on"


def test_a_node_without_ranks_is_as_without_us(start):
    node = start(NODE)
    node.signal()
    assert node.wait() == 1
    assert node.stderr == ""


def test_quiet_is_quiet(start):
    start(RANK, "clean")
    node = start(NODE, AUTOTEARDOWN_LOG="quiet")
    node.signal()
    assert node.wait() == 1
    assert node.stderr == ""


def test_a_rank_that_stays_does_not_keep_ray(start):
    rank = start(RANK, "stay")
    node = start(NODE, AUTOTEARDOWN_GRACE=2)
    node.signal()
    rank.wait_for("^got")
    assert node.wait() == 1
    assert "Ray's handler" in node.stdout
    assert "still running" in node.stderr
    assert rank.running


def test_a_second_signal_does_not_start_rays_part_early(start):
    rank = start(RANK, "stay")
    node = start(NODE)
    node.signal()
    rank.wait_for("^got")
    node.signal()
    rank.signal(signal.SIGKILL)
    assert node.wait() == 1
    assert node.stdout.count("Ray's handler") == 1
    assert "died without a teardown" in node.stderr


def test_a_registry_that_cannot_be_trusted_stops_nothing(start, job):
    job.runtime.mkdir()
    job.runtime.chmod(0o777)
    node = start(NODE)
    node.signal()
    assert node.wait() == 1
    assert "Ray's handler" in node.stdout
    assert "0777" in node.stderr
    assert node.stderr.count("\n") == 1


def test_a_log_that_nobody_reads_does_not_keep_ray(start, job):
    rank = start(RANK, "clean")
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    program = f"import os; os.dup2({write}, 2)\n{textwrap.dedent(NODE)}"
    env = environment(NONE, job.mark, AUTOTEARDOWN_RUNTIME_DIR=job.runtime)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, pass_fds=[write]) as node:
        assert node.stdout.readline() == "ready\n"
        node.send_signal(signal.SIGTERM)
        assert "Ray's handler" in node.stdout.readline()
    assert node.returncode == 1
    assert rank.wait() == 0
    os.close(read)
    os.close(write)


def test_our_own_bugs_stop_nothing(start):
    program = NODE.replace("def handler", "sys.modules['autoteardown.node.registry'] = None\n    def handler")
    node = start(program)
    node.signal()
    assert node.wait() == 1
    assert "Ray's handler" in node.stdout
    assert "the node was not drained" in node.stderr


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
    assert ray_node.is_ray_start(line.split())


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
    assert not ray_node.is_ray_start(line.split())


def test_a_test_run_is_not_ray_start():
    assert not ray_node.is_ray_start()


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
        assert node.evict(grace=60) == 1, node.story()  # Ray's own code
        assert "received SIGTERM. Draining for up to" in node.stderr  # Ray's own handling, in both cases
        return node, driver, pids

    return stop


@pytest.mark.frameworks
def test_actors_in_a_collective_are_torn_down_when_ray_start_is_stopped(job, stopped_node):
    """Each is signalled, reports, and is gone before Ray would SIGKILL it."""
    node, driver, pids = stopped_node(AGENT)
    reports = job.all_reports()
    assert {rank: report["pid"] for rank, report in reports.items()} == dict(enumerate(pids))
    for report in reports.values():
        assert (report["cause"], report["signal"], report["exit_code"]) == ("signal", "SIGTERM", 0)
        said = f"pid={report['pid']} .*: {report['outcome']}, exit 0 "
        assert re.search(said, node.stderr), node.story()
    wait_until(lambda: driver.stdout.count("actor error") == 2, driver.story())


@pytest.mark.frameworks
def test_control_ray_start_is_stopped(job, stopped_node):
    """Without us nobody signals the actors. They die of SIGKILL, and say nothing."""
    node, _, pids = stopped_node(NONE, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=2)
    wait_until(lambda: not any(map(alive, pids)), "the actors' end")
    assert not list(job.reports.iterdir())
    assert "autoteardown" not in node.stderr
