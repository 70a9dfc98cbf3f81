"""Every process of a Ray node is signalled at once, as systemd and SLURM do it; against that, `ray start` alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import pytest
from harness import AGENT, NONE, PROGRAMS, alive, free_port, wait_until

ray = pytest.importorskip("ray")
sys.path.insert(0, str(PROGRAMS))
import ray_worlds  # noqa: E402
from test_ray_ways import SOON, STUCK, away, frees, head  # noqa: E402, F401

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(400)]

SAVE = 4.0  # seconds


@pytest.fixture
def node(away, tmp_path):  # noqa: F811
    """A pod with a rank whose peers are on another node, and one that saves; returns the pod, the world, the saver."""

    def start(mode):
        pod, world = away("bash -c", mode, AUTOTEARDOWN_GRACE=25)
        actor = ray.remote(num_cpus=0, resources={"away": 1})(ray_worlds.Saver).remote()
        world.trainers.append(actor)  # ended with it
        actor.train.remote(str(tmp_path), free_port(), SAVE)
        path = tmp_path / "trains-0"
        wait_until(path.exists, "the saver")
        return pod, world, pod.pid(int(path.read_text().split()[0]))

    return start


def processes(pod):
    """The processes in the pod's namespace, not the one that has made it. Some of Ray's have overwritten their mark."""
    here = os.readlink(f"/proc/{pod.pid(1)}/ns/pid")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == here:
                yield int(pid)


def signal_everybody(pod):
    for pid in list(processes(pod)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("mode", [AGENT, pytest.param(NONE, marks=pytest.mark.slow)])
def test_everybody(node, tmp_path, mode):
    """raylet kills its workers as soon as the GCS has taken note of its end: nothing is saved, nothing is reported."""
    pod, world, saver = node(mode)
    signal_everybody(pod)
    world.gone(0)
    wait_until(lambda: not alive(saver), "the end of the saver", SOON)
    assert pod.process.wait(SOON) == 1
    assert not (tmp_path / "saved-0").exists()
    assert world.report(0) is None
    assert world.report(0, 1) is None
    assert world.preempted(0) is False  # Ray's deadline has not passed
    if mode == AGENT:
        frees(world, "peer", "lost")  # it may have had the time to tell them
        if "rank(s)" in pod.process.stderr:  # `ray start` has still seen them
            assert "died without a teardown" in pod.process.stderr, pod.process.transcript()
            assert "0 of " in pod.process.stderr, pod.process.transcript()
    else:
        time.sleep(STUCK)
        assert all(map(alive, world.pids[1:]))


def test_ray_start_alone(node, tmp_path):
    """What `KillMode=mixed` does: the same ranks have their time."""
    pod, world, saver = node(AGENT)
    pod.signal()
    world.gone(0)
    wait_until(lambda: not alive(saver), "the end of the saver", SOON)
    assert pod.process.wait(SOON) == 1
    assert (tmp_path / "saved-0").exists()
    assert world.report(0, 1)["outcome"] == "clean"
    frees(world, "peer")
