"""Fixtures of the tests that start real ranks."""

import os
import signal

import pytest
from harness import ForkServer, Job

# c10d looks the name of every client of a store up, on the server's only thread: where DNS packets get lost, each loss
# stalls a rendezvous for 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")

# Who has started Ray here before has a token in ~/.ray, with which `ray start` makes a cluster that `ray.init` of an
# address cannot join.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

# A shell without job control has what it puts into the background ignore SIGINT, and nohup SIGHUP; a program that
# ignores them would hand that on to every process that the tests start.
for _signum, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, _usual)


try:  # what `make gpu` runs needs no hypothesis
    import hypothesis
except ImportError:
    pass
else:
    # How long an example takes says how busy the machine is.
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def fork_servers():
    """Fork servers by mode, started when first asked for."""
    servers = {}

    def server(mode):
        if mode not in servers:
            servers[mode] = ForkServer(mode)
        return servers[mode]

    yield server
    for each in servers.values():
        each.close()


@pytest.fixture
def job(tmp_path, fork_servers):
    """The ranks of this test. Nothing that they started outlives it."""
    job = Job(tmp_path, fork_servers)
    yield job
    job.close()
