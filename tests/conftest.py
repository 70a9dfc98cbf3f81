"""Fixtures of the tests that start real ranks."""

import pytest
from harness import ForkServer, Job


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
