"""Ray Train on two nodes and a spare one, when one of the two leaves: what it learns and saves, how it continues."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import AGENT, NONE, alive, free_port, marked, wait_until
from namespaces import in_pid_namespace
from test_ray_node import sockets  # noqa: F401

pytest.importorskip("ray")
pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(500)]

RAY = str(Path(sys.executable).with_name("ray"))
SOON = 150.0  # for what takes half a minute on an idle machine


class Nodes:
    """A head and nodes, each with a place for one worker, and the training."""

    def __init__(self, job, folder, sockets, mode):  # noqa: F811
        self.job, self.folder, self.mode = job, folder, mode
        self.address = f"127.0.0.1:{free_port()}"
        options = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={sockets}"]
        self.start(*options, "--include-dashboard=false", "--disable-usage-stats")

    def start(self, *options, pod=False):
        """A node, in a PID namespace of its own if it is to be a pod."""
        common = ["--block", '--resources={"slot": 1}', "--object-store-memory=80000000", "--num-cpus=1"]
        env = {"AUTOTEARDOWN_GRACE": 25, "RAY_enable_metrics_collection": "0"}
        launcher = in_pid_namespace() if pod else ()
        node = self.job.start(
            RAY, "start", *options, *common, fresh=True, mode=self.mode, launcher=launcher, **env
        )
        node.wait_for("block forever", SOON)
        return node

    def join(self, pod=False):
        """One more node."""
        return self.start(f"--address={self.address}", pod=pod)

    def train(self, max_failures):
        """Start the training, whose driver connects to the only node that there is: to any, where there are several."""
        env = {"PYTHONUNBUFFERED": 1}
        self.driver = self.job.start(
            "ray_preempted.py", self.address, self.folder, max_failures, fresh=True, mode=self.mode, **env
        )
        self.until(lambda: "Connected to Ray cluster" in self.driver.stderr, "the driver")

    def until(self, condition, what):
        """Wait, and tell the driver's transcript if it does not come."""
        try:
            return wait_until(condition, what, SOON)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.driver.transcript()}") from None

    def files(self, what):
        """What the ranks have written."""
        paths = [self.folder / f"{what}-{rank}" for rank in range(2)]
        self.until(lambda: all(path.exists() and path.read_text() for path in paths), what)
        return [path.read_text().split() for path in paths]

    def pids(self, node):
        """The pids of the ranks as this test sees them, that on the node first."""
        found = {}
        for pid in marked(self.job.mark):
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    namespace = os.readlink(f"/proc/{pid}/ns/pid")
                    found[pid] = namespace != os.readlink("/proc/self/ns/pid") or node in ancestors(pid)
        assert sorted(found.values()) == [False, True], found
        return sorted(found, key=lambda pid: not found[pid])


def ancestors(pid):
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


@pytest.fixture
def nodes(job, tmp_path, sockets):  # noqa: F811
    def start(mode=AGENT, pod=False, max_failures=0):
        found = Nodes(job, tmp_path, sockets, mode)
        found.train(max_failures)
        node = found.join(pod)
        found.files("stepping")
        pids = found.pids(node.pid)
        found.join()  # the spare one
        return found, node, pids

    return start


def goes_on_where_it_was(nodes):
    """It has saved just in time, its retry was free, and it has gone on from there."""
    assert nodes.driver.wait(SOON) == 0, nodes.driver.transcript()
    said = nodes.driver.stdout + nodes.driver.stderr
    assert "fit returned" in said, nodes.driver.transcript()
    assert "Source: preemption" in said, nodes.driver.transcript()
    saved = nodes.files("saved")[0][0]
    assert [words[0] for words in nodes.files("resumed")] == [saved, saved]


@pytest.mark.parametrize("mode", [AGENT, pytest.param(NONE, marks=pytest.mark.slow)])
def test_it_hears_of_the_preemption_before_its_ranks_are_drained(nodes, mode):
    """SIGTERM to `ray start`."""
    found, node, pids = nodes(mode)
    began = time.monotonic()
    node.signal()
    found.files("saved")
    assert all(map(alive, pids)), "the just-in-time checkpoint came after the drain"
    wait_until(lambda: not any(map(alive, pids)), "the end of the ranks")
    if mode == AGENT:
        assert time.monotonic() - began < 24, "Ray had to kill them, or the pod's SIGKILL would have"
    assert node.wait(60) == 1
    goes_on_where_it_was(found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [AGENT, NONE])
def test_drain_node(nodes, mode):
    """Nobody is signalled: Ray Train stops its workers at the deadline, and the agent has nothing to do."""
    found, node, pids = nodes(mode)
    rank = [int(words[0]) for words in found.files("stepping")].index(pids[0])
    here = (found.folder / f"node-{rank}").read_text()
    drain = [RAY, "drain-node", f"--address={found.address}", f"--node-id={here}", "--reason-message=evicted"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=10"]
    done = subprocess.run(drain, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done
    found.files("saved")
    goes_on_where_it_was(found)
    assert not list(found.job.reports.iterdir())
    assert node.running


@pytest.mark.slow
@pytest.mark.parametrize("mode", [AGENT, NONE])
@pytest.mark.parametrize("way", ["node killed", "ray stop"])
def test_it_hears_nothing_before(nodes, way, mode):
    """A failure, which `max_failures` counts; with `ray stop` its ranks are torn down first, after the same step."""
    found, node, pids = nodes(mode, pod=True, max_failures=1)
    (inside,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    if way == "node killed":
        os.kill(int(inside), signal.SIGKILL)
    else:
        words = ["nsenter", f"--target={inside}", "--pid", "--mount", RAY, "stop"]
        entries = Path(f"/proc/{inside}/environ").read_text().split("\0")
        env = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
        assert "Stopped" in done.stdout, done
        if mode == AGENT:
            reports = found.job.all_reports()
            assert sorted(report["cause"] for report in reports.values()) == ["peer", "signal"]
            assert {report["outcome"] for report in reports.values()} == {"clean"}
            assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1
    wait_until(lambda: not any(map(alive, pids)), "the end of the ranks", SOON)
    assert found.driver.wait(SOON) == 0, found.driver.transcript()
    assert "fit returned" in found.driver.stdout, found.driver.transcript()
    assert not (found.folder / "saved-0").exists()
