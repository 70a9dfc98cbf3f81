"""Fixtures of the tests on torch's own ProcessGroupNCCL, and the table of the jobs' results."""

import os
import signal
import time
from pathlib import Path

import pytest
from harness import AGENT, TESTS
from simulated_accelerator import Device

from nccl import build, plugin

PROGRAM = Path(__file__).parent / "program.py"
START = 180.0  # to import a CUDA build on a busy machine takes its time
# The agent need not be installed where these tests run.
AGENT_PATH = os.pathsep.join([str(TESTS.parent / "sitecustomize"), str(TESTS.parent)])
COLUMNS = ("test", "ranks", "out after, s", "exit codes", "outcomes", "faults")


def pytest_collection_modifyitems(items):
    """All of this folder need an environment of their own, but for the quick tests, which look for it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != "test_quick.py":
            item.add_marker(pytest.mark.nccl)
            item.add_marker(pytest.mark.timeout(600))


def pytest_terminal_summary(terminalreporter):
    """The table."""
    reports = [each for group in terminalreporter.stats.values() for each in group]
    calls = [each for each in reports if getattr(each, "when", None) == "call"]
    rows = [value for each in calls for name, value in each.user_properties if name == "job"]
    for row in [COLUMNS, ["---"] * len(COLUMNS), *rows] if rows else ():
        terminalreporter.write_line("| " + " | ".join(map(str, row)) + " |")


@pytest.fixture(scope="session")
def libraries():
    """What a rank has in its environment to run on the libraries, or the reason why it cannot."""
    try:
        return plugin.environment()
    except build.CannotBuild as reason:
        pytest.skip(f"{reason}: `make nccl` makes what this needs")


@pytest.fixture
def devices(libraries, tmp_path):
    """The devices of this test's job. A fault that the test does not expect fails it."""
    made = Device(tmp_path)
    yield made
    unexpected = [fault for fault in made.faults if fault not in made.expected]
    assert not unexpected, made.transcript()


class World:
    """The ranks of one job, and what an eviction made of them."""

    def __init__(self, ranks, devices, record):
        self.ranks, self._devices, self._record = ranks, devices, record
        self._start = 0.0

    def __getitem__(self, rank):
        return self.ranks[rank]

    def wait_for(self, *texts):
        """Of each rank that its line is there; the last text is for all further ranks."""
        for index, rank in enumerate(self.ranks):
            rank.wait_for(texts[min(index, len(texts) - 1)], START)

    def evict(self, *signalled, grace=25.0):
        """SIGTERM to these ranks (to the first, if none is named); wait for the end of all."""
        self._start = time.monotonic()
        for rank in signalled or (0,):
            self.ranks[rank].signal()
        self.wait_for_end(grace)

    def wait_for_end(self, grace=25.0):
        """Of every rank, which a platform ends after the grace period."""
        self._start = self._start or time.monotonic()
        while [rank for rank in self.ranks if rank.running]:  # asks each: that takes the time of its end
            if time.monotonic() > self._start + grace:
                for rank in self.ranks:
                    if rank.running:
                        os.kill(rank.pid, signal.SIGKILL)
                        rank.wait()
            time.sleep(0.005)
        self._record(
            (
                len(self.ranks),
                " ".join(f"{seconds:.2f}" for seconds in self.seconds),
                " ".join(str(rank.code) for rank in self.ranks),
                " ".join(self.outcomes),
                len(self._devices.faults),
            )
        )

    @property
    def seconds(self):
        """From the signal to the end, of each rank."""
        return [max(0.0, rank.ended - self._start) for rank in self.ranks]

    @property
    def outcomes(self):
        """As the reports say."""
        return [rank.report()["outcome"] if self.has_report(rank) else "-" for rank in self.ranks]

    @staticmethod
    def has_report(rank):
        """Whether it has left one: a rank that was killed has not."""
        return bool(list((rank.folder.parent / "reports").glob(f"*-{rank.pid}-*Z.json")))

    def transcript(self):
        """Everything known, for a failure message."""
        return "\n\n".join([self._devices.transcript(), *(rank.transcript() for rank in self.ranks)])


@pytest.fixture
def world(job, devices, libraries, record_property, request):
    """Starts a world with a device for each rank, and waits until all of it is there."""

    def record(row):
        record_property("job", (request.node.name, *row))

    def start(role, ranks=2, *arguments, mode=AGENT, said="^ready", settings=None, each=None, **env):
        env = {
            "AUTOTEARDOWN_GRACE": 25,
            **devices.settings(devices=str(ranks), **(settings or {})),
            **libraries,
            **env,
        }
        launcher = ("env", f"PYTHONPATH={AGENT_PATH}")
        options = {"mode": mode, "fresh": True, "launcher": launcher, "each": each, **env}
        made = World(job.world(str(PROGRAM), ranks, role, *arguments, **options), devices, record)
        made.wait_for(said)
        return made

    return start
